"""`bothways import`: a published checkpoint becomes a run."""

import tyro

from bothways.commands.shared import show_converted
from bothways.log import log

Positional = tyro.conf.Positional


def import_(source: Positional[str], run: Positional[str], corpus: str = "shakespeare", json: bool = False) -> None:
    """A published checkpoint becomes a run; docs/weights.md lists the families.

    Args:
        source: A Hugging Face directory with safetensors, a .gguf file of the Llama family, or a name on the hub.
        run: The run directory to write, on a disk.
        corpus: The text that `evaluate` and `train` take for this run unless another is given.
        json: Print the result as one JSON object.
    """
    from bothways.convert.run import import_run
    from bothways.rundir import on_disk

    show_converted(import_run(source, on_disk(run), corpus, log), json)
