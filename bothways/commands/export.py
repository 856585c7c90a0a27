"""`bothways export`: a run becomes a directory that transformers opens."""

import tyro

from bothways.commands.shared import show_converted
from bothways.log import log

Positional = tyro.conf.Positional


def export(run: Positional[str], dest: Positional[str], json: bool = False) -> None:
    """A run becomes a Hugging Face directory, which `transformers` opens.

    Args:
        run: A run directory.
        dest: The directory to write, on a disk.
        json: Print the result as one JSON object.
    """
    from bothways.convert.run import export_run
    from bothways.rundir import directory, on_disk

    show_converted(export_run(directory(run), on_disk(dest), log), json)
