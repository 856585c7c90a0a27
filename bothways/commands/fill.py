"""`bothways fill`: fills every [MASK] of a text."""

import tyro

import bothways
from bothways.commands.shared import capability, checked_text, emit, which
from bothways.errors import InputError

Positional = tyro.conf.Positional


def fill(
    run: Positional[str],
    texts: Positional[tuple[str, ...]],
    top: int = 5,
    steps: int = 1,
    step: str = "newest",
    json: bool = False,
) -> None:
    """Fill every [MASK] of a text.

    Args:
        run: A run directory of a masked model.
        texts: Texts with [MASK] in them.
        top: Candidates per mask.
        steps: 1 fills all masks at once; more steps fill a few at a time, the most confident first.
        step: Which checkpoint: newest, best (on held-out text), or the step of a kept one.
        json: One JSON object per text.
    """
    if not texts:
        raise InputError('fill wants at least one text after the run: bothways fill RUN "To be, or [MASK] to be"')
    checked_text(texts, "the text")
    why = "was not trained to restore single tokens; if trained on spans, `sample` writes them"
    model = bothways.load(run, step=which(step))
    if model.recipe.family == "gpt":
        why = "reads forward only, so what follows a mask could not help"
    for result in capability(model, "fill", why)(texts, top=top, steps=steps):
        lines = ["  " + "  ".join(f"{c['token']!r} {c['p']:.3f}" for c in mask) for mask in result.masks]
        emit(result, json, "\n".join([result.filled, *lines]))
