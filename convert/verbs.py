"""The verbs `import` and `export`: thin faces over convert/run.py. `verbs.py` lists them with the others."""

import dataclasses
import functools
import json as jsons
import sys
from typing import TYPE_CHECKING

import tyro

if TYPE_CHECKING:
    from convert.run import Converted

Positional = tyro.conf.Positional
say = functools.partial(print, file=sys.stderr)


def import_verb(source: Positional[str], run: Positional[str], corpus: str = "shakespeare", json: bool = False) -> None:
    """A published checkpoint becomes a run: GPT-2, BERT, RoBERTa, ModernBERT, the Llama family.

    Args:
        source: A Hugging Face directory with safetensors, a .gguf file of the Llama family, or a name on the hub.
        run: The run directory to write, on a disk.
        corpus: The text that `evaluate` and `train` take for this run unless told otherwise.
        json: Print the result as one JSON object.
    """
    from common.rundir import on_disk
    from convert.run import import_run

    _show(import_run(source, on_disk(run), corpus, say), json)


def export_verb(run: Positional[str], dest: Positional[str], json: bool = False) -> None:
    """A run becomes a Hugging Face directory, which `transformers` opens.

    Args:
        run: A run directory.
        dest: The directory to write, on a disk.
        json: Print the result as one JSON object.
    """
    from common.rundir import directory, on_disk
    from convert.run import export_run

    _show(export_run(directory(run), on_disk(dest), say), json)


def _show(result: "Converted", as_json: bool) -> None:
    checked = "" if result.max_difference is None else f"; logits differ by at most {result.max_difference:.2g}"
    shown = f"{result.run}: {result.family}, {result.parameters:,} parameters{checked}"
    print(jsons.dumps(dataclasses.asdict(result)) if as_json else shown, flush=True)
