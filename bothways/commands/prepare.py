"""`bothways prepare`: tokenizes text into shards, once, in parallel."""

import dataclasses
import shlex
from typing import Annotated

import tyro

from bothways.commands.shared import emit, parse_recipe
from bothways.errors import InputError
from bothways.log import log


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Tokenize a recipe's corpus into a directory or bucket, which train and launch take as --data.corpus. Each corpus of
    a mixture gets its own folder there; all share one vocabulary."""

    to: str
    """The directory, or gs://BUCKET/PATH; it is empty, or holds what an earlier call did not finish."""
    workers: int = 1
    """Number of processes on this machine."""
    beam: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """An option of an Apache Beam runner (pip install 'bothways[prepare]'); may be given several times:
    --beam=--runner=DataflowRunner --beam=--project=P."""
    json: bool = False
    """Print one JSON object."""


def prepare(argv: list[str]) -> None:
    """Prepare a recipe's text."""
    example = "bothways prepare RECIPE --to gs://BUCKET/text [--data.corpus 'raw/*.jsonl.zst'] [--workers N]"
    recipe, o = parse_recipe("prepare", argv, PrepareOptions, example)
    if problems := recipe.data.problems():
        raise InputError("; ".join(problems))
    if o.workers < 1:
        raise InputError(f"--workers is {o.workers}; it must be 1 or more")
    from bothways.data.mixture_config import moved
    from bothways.data.preparing import prepare_all

    made = prepare_all(recipe.data, o.to, workers=o.workers, beam=o.beam, log=log)
    where = {corpus: done.to for corpus, done in made.items()}
    how = (
        f"--data.mixture {shlex.join(moved(recipe.data.mixture, where))}"
        if recipe.data.mixture
        else f"--data.corpus {o.to}"
    )
    for number, done in enumerate(made.values(), 1):
        rate = done.tokens / max(1e-9, done.seconds)
        shown = (
            f"{done.to}: {done.tokens:,} tokens of {done.documents:,} documents, {done.shards} shards, in {done.seconds:.0f} s "
            f"({rate:,.0f} tokens/s)"
        )
        emit(done, o.json, shown + (f"; train with {how}" if number == len(made) else ""))
