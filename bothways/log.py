"""Lines for the person who watches, on standard error; standard output holds results only."""

import os
import sys
from typing import TextIO

from rich.console import Console


class _StandardError:
    """Standard error as it is at the moment. Once it takes no more, since its reader, terminal or disk is gone, lines are
    dropped: that nobody watches is no reason to end what is watched.

    Python tries to write once more at its end what a stream did not take, and exits with 120: another takes its place.
    """

    @property
    def _stream(self) -> TextIO:
        if sys.stderr is None:
            self._drop()
        return getattr(sys.stderr, "rich_proxied_file", sys.stderr)  # a progress bar puts itself in between

    @property
    def encoding(self) -> str:
        return self._stream.encoding or "utf-8"

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._drop()
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._drop()

    def _drop(self) -> None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (for the rest of the process)

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()


console = Console(file=_StandardError(), highlight=False, soft_wrap=True)  # type: ignore[arg-type]


def log(message: str) -> None:
    """Print a line on standard error, above a progress bar where one is shown."""
    console.print(message, markup=False)
