"""`bothways score`: how likely each line is."""

from pathlib import Path

import tyro

import bothways
from bothways.commands.shared import capability, emit, read_lines

Positional = tyro.conf.Positional


def score(run: Positional[str], file: Positional[Path | None] = None, rule: str = "", json: bool = False) -> None:
    """How likely each line is.

    Args:
        run: A run directory.
        file: A text per line; without it, standard input.
        rule: causal (the default of causal models), the log-probability of a text read forward (of encoder-decoders, of
            the target in `source TAB target`); pll, each token given all others; pll_word (the default of masked
            models), the rest of its word hidden too; bound, a lower bound on the log-probability.
        json: One JSON object per line (the plain form shows log-probability, tokens, text). A text without tokens has
            no log-probability: null, or a dash.
    """
    from bothways.sample.batching import growing

    texts = read_lines(file)
    answer = capability(bothways.load(run), "score", "")
    for part in growing(texts):  # the first results are shown while the rest waits
        for result in answer(part, **({"rule": rule} if rule else {})):
            logprob = "-" if result.logprob is None else f"{result.logprob:.3f}"
            emit(result, json, f"{logprob:>10}  {result.tokens:4d}  {result.text}")
