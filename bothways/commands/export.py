"""`bothways export`: a run becomes a directory that transformers opens."""

import tyro

from bothways.commands.shared import show_converted
from bothways.log import log

Positional = tyro.conf.Positional


def export(run: Positional[str], dest: Positional[str], license: str = "", push: str = "", json: bool = False) -> None:
    """A run becomes a Hugging Face directory, which `transformers` opens.

    Args:
        run: A run directory.
        dest: The directory to write, on a disk.
        license: What the card states, by the hub's identifiers, such as apache-2.0.
        push: A name on the hub, OWNER/NAME: the directory is uploaded there, private, with the token that `hf auth login`
            stored.
        json: Print the result as one JSON object.
    """
    from bothways.convert.hub import check_name, push_directory
    from bothways.convert.run import export_run
    from bothways.rundir import directory, on_disk

    if push:
        check_name(push)
    done = export_run(directory(run), on_disk(dest), log, license)
    if push:
        log(f"uploaded to {push_directory(on_disk(dest), push)}")
    show_converted(done, json)
