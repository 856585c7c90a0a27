"""`bothways embed`: a vector per line."""

from pathlib import Path

import tyro

import bothways
from bothways.commands.shared import capability, emit, read_lines, which

Positional = tyro.conf.Positional


def embed(
    run: Positional[str],
    file: Positional[Path | None] = None,
    pool: str = "",
    prompt: str = "",
    step: str = "newest",
    json: bool = False,
) -> None:
    """A vector per line.

    Args:
        run: A run directory.
        file: A text per line; without it, standard input.
        pool: cls, the first token's features (masked models); last, the last token's; or mean, over all tokens. Empty: as
            the run says, else mean.
        prompt: The name of what the run puts before such a text, such as query; of runs that came from sentence-transformers.
        step: Which checkpoint: newest, best (on held-out text), or a step that is kept.
        json: One JSON object per line (the plain form shows numbers separated by spaces).
    """
    texts = read_lines(file)
    for text, vector in zip(
        texts, capability(bothways.load(run, step=which(step)), "embed", "")(texts, pool=pool, prompt=prompt), strict=True
    ):
        values = [round(float(v), 6) for v in vector]
        emit({"text": text, "vector": values}, json, " ".join(f"{v:.6f}" for v in values))
