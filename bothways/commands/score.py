"""`bothways score`: how likely each line is."""

from pathlib import Path
from typing import Any

import tyro

import bothways
from bothways.commands.shared import capability, emit, read_lines, which
from bothways.errors import InputError

Positional = tyro.conf.Positional


def score(
    run: Positional[str],
    file: Positional[Path | None] = None,
    rule: str = "",
    block: int | None = None,
    step: str = "newest",
    json: bool = False,
) -> None:
    """Compute how likely each line is.

    Args:
        run: A run directory.
        file: A file with a text per line; without it, standard input.
        rule: causal (the default of causal models): the log-probability of a text from left to right (for
            encoder-decoders, of the target in `source TAB target`); pll: each token given all others; pll_word (the
            default of masked models): with the rest of its word masked too; bound (the default of diffusion models): a
            lower bound on the log-probability.
        block: Tokens per block of the bound, 0 for the whole row (diffusion models; by default the smallest that they
            were trained on). At 1 the bound is exact.
        step: Which checkpoint: newest, best (on held-out text), or the step of a kept one.
        json: One JSON object per line (the plain form shows log-probability, tokens, text). A text without tokens has
            no log-probability: null, or a dash.
    """
    from bothways.sample.batching import growing

    texts = read_lines(file)
    model = bothways.load(run, step=which(step))
    answer = capability(model, "score", "")
    options: dict[str, Any] = {"rule": rule} if rule else {}
    if block is not None:
        if model.recipe.objective.kind != "diffusion" or model.recipe.family != "gpt" or rule not in ("", "bound"):
            raise InputError("--block is for the bound of a decoder trained by diffusion; leave it out")
        options["block"] = block
    for part in growing(texts):  # the first results are shown while the rest waits
        for result in answer(part, **options):
            logprob = "-" if result.logprob is None else f"{result.logprob:.3f}"
            emit(result, json, f"{logprob:>10}  {result.tokens:4d}  {result.text}")
