"""From rows to what a model reads: pure functions of (row, random generator). Seeded per example by the pipeline."""

import numpy as np

Example = dict[str, np.ndarray]


def places_within(segments: np.ndarray) -> np.ndarray:
    """[T] position of every token inside its own segment.

    >>> places_within(np.array([1, 1, 1, 2, 2, 0]))
    array([0, 1, 2, 0, 1, 0], dtype=int32)
    """
    index = np.arange(len(segments), dtype=np.int32)
    if segments[0] == segments[-1]:
        return index
    first = np.concatenate([[True], segments[1:] != segments[:-1]])
    return index - np.maximum.accumulate(np.where(first, index, 0)).astype(np.int32)


def causal(row: Example, rng: np.random.Generator) -> Example:
    """Next-token prediction: a row of T + 1 tokens into T inputs and T targets.

    The last token of a document has no next one, and padding none either: their weight is 0.
    """
    tokens, segments = row["tokens"], row["segments"]
    return {
        "tokens": tokens[:-1],
        "targets": tokens[1:],
        "segments": segments[:-1],
        "positions": places_within(segments[:-1]),
        "weights": ((segments[1:] == segments[:-1]) & (segments[1:] > 0)).astype(np.float32),
    }
