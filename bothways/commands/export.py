"""`bothways export`: turns a run into a directory that transformers opens."""

from typing import Literal

import tyro

from bothways.commands.shared import show_converted
from bothways.errors import InputError
from bothways.log import log

Positional = tyro.conf.Positional


def export(
    run: Positional[str],
    dest: Positional[str],
    adapters: bool = False,
    license: str = "",
    embeds: Literal["", "mean", "cls", "last"] = "",
    dtype: Literal["", "float32", "bfloat16", "float16", "q8_0"] = "",
    push: str = "",
    json: bool = False,
) -> None:
    """Turn a run into a Hugging Face directory, which `transformers` opens.

    Args:
        run: A run directory.
        dest: The directory to write, on a disk; or a file that ends in .gguf, for llama.cpp.
        adapters: Write only the run's adapters, as PEFT's files, and not the merged model.
        license: Licence for the model card, as an identifier of the hub such as apache-2.0.
        embeds: Also make the directory open in sentence-transformers, with this pooling: the mean over all tokens, or the
            features of the first (cls) or the last. A run that came from there is exported as it came.
        dtype: Type in which matrices and tables are written; empty: that of the run. float16 and q8_0 are for GGUF.
        push: A name on the hub, OWNER/NAME: the directory is uploaded there with the token that `hf auth login` stored. A
            new repository is private; an existing one keeps its visibility.
        json: Print the result as one JSON object.
    """
    from bothways.convert.adapters import export_adapters
    from bothways.convert.hub import check_name, push_directory
    from bothways.convert.run import export_run
    from bothways.rundir import directory, on_disk

    if push and dest.endswith(".gguf"):
        raise InputError("--push uploads a directory; give DEST without .gguf")
    if push:
        check_name(push)
    if adapters:
        unused = {"--license": license, "--embeds": embeds, "--dtype": dtype, dest: dest.endswith(".gguf")}
        if given := [name for name, value in unused.items() if value]:
            raise InputError(
                f"--adapters writes PEFT's files into a directory and takes no {', '.join(given)}; leave it out"
            )
    home, to = directory(run), on_disk(dest)
    done = export_adapters(home, to, log) if adapters else export_run(home, to, log, license, embeds, dtype)
    if push:
        log(f"uploaded to {push_directory(on_disk(dest), push)}")
    show_converted(done, json)
