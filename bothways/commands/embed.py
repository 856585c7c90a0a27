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
    """Compute a vector per line.

    Args:
        run: A run directory.
        file: A file with a text per line; without it, standard input.
        pool: cls, the features of the first token (masked models); last, those of the last; or mean, over all tokens.
            Empty: the pooling of the run, else mean.
        prompt: Name of the run's prompt to put before each text, such as query; for runs that came from
            sentence-transformers or were trained with data.query_prompt or data.document_prompt.
        step: Which checkpoint: newest, best (on held-out text), or the step of a kept one.
        json: One JSON object per line (the plain form shows numbers separated by spaces).
    """
    texts = read_lines(file)
    for text, vector in zip(
        texts, capability(bothways.load(run, step=which(step)), "embed", "")(texts, pool=pool, prompt=prompt), strict=True
    ):
        values = [round(float(v), 6) for v in vector]
        emit({"text": text, "vector": values}, json, " ".join(f"{v:.6f}" for v in values))
