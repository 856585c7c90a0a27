"""`bothways import`: turns a published checkpoint into a run."""

from pathlib import Path
from typing import Literal

import tyro

from bothways.commands.shared import show_converted
from bothways.errors import InputError
from bothways.log import log

Positional = tyro.conf.Positional


def import_(
    source: Positional[str],
    run: Positional[str],
    corpus: str = "shakespeare",
    dtype: Literal["float32", "bfloat16"] = "float32",
    base: str = "",
    json: bool = False,
) -> None:
    """Turn a published checkpoint into a run; docs/weights.md lists the families.

    Args:
        source: A Hugging Face directory with safetensors, a .gguf file, or a name on the hub.
        run: The run directory to write, on a disk.
        corpus: The text that `evaluate` and `train` use for this run unless another is given.
        base: For PEFT's adapters (a directory with adapter_config.json): the run that they belong to.
        dtype: Type in which matrices and tables are kept: bfloat16 halves the disk space, and loses nothing of a bfloat16
            checkpoint.
        json: Print the result as one JSON object.
    """
    from bothways.convert.run import import_run
    from bothways.rundir import directory, on_disk

    adapters = (Path(source) / "adapter_config.json").exists()
    if adapters != bool(base):
        raise InputError(
            f"{source} holds PEFT's adapters: name the run that they are for with --base RUN"
            if adapters
            else f"--base is for PEFT's adapters, and {source} has no adapter_config.json; leave it out"
        )
    if adapters:
        unused = {"--dtype": dtype != "float32", "--corpus": corpus != "shakespeare"}
        if given := [name for name, value in unused.items() if value]:
            raise InputError(f"adapters are kept as they are, beside their base's text: leave {', '.join(given)} out")
        from bothways.convert.adapters import import_adapters

        show_converted(import_adapters(Path(source), on_disk(run), directory(base), log), json)
        return
    show_converted(import_run(source, on_disk(run), corpus, log, dtype), json)
