"""Lines for the person who watches, on standard error; standard output holds results only."""

from rich.console import Console

console = Console(stderr=True, highlight=False, soft_wrap=True)


def log(message: str) -> None:
    """Print a line on standard error, above a progress bar where one is shown."""
    console.print(message, markup=False)
