"""Batches of labelled examples by length: texts of about the same length together, filled up to one of a few lengths.

Which examples make batch k is a function of (seed, k) alone, so that a resumed run goes on with the same ones.
"""

from collections.abc import Iterator

import numpy as np

from bothways.data.examples import Example
from bothways.data.rng import epoch_permutation
from bothways.data.task_examples import TaskRows

SHARES = (1.0, 0.9, 0.6, 0.3)
"""Shares of the examples that fit into each of the lengths: four programs at most."""
MIXED = 32
"""Batches whose examples are sorted by length together; of more, neighbours would be alike in more than length."""


def batch_lengths(lengths: np.ndarray, longest: int) -> list[int]:
    """At most four lengths to fill batches up to, the last one for all; of two that are nearly alike the longer one.

    Args:
      lengths: [n] tokens of every example.
      longest: what the model takes.

    >>> batch_lengths(np.array([9, 17, 18, 19, 20, 21, 22, 60, 61, 200]), 128)
    [24, 64, 128]
    """
    found: list[int] = []
    for share in SHARES:
        size = min(longest, -(-int(np.quantile(lengths, share, method="inverted_cdf")) // 8) * 8)
        if not found or size <= 0.8 * found[-1]:
            found.append(size)
    return found[::-1]


def fitting(sizes: list[int], length: int) -> int:
    """The shortest of the batch lengths that holds so many tokens."""
    return next(size for size in sizes if size >= length)


def epoch_batches(lengths: np.ndarray, batch_size: int, epoch: int, seed: int) -> np.ndarray:
    """[steps, batch_size] which examples each batch of an epoch takes, in random order.

    All examples are shuffled; those of MIXED batches are sorted by length and cut into batches, which are shuffled
    again. Where there are less than a batch of examples, some are taken twice.
    """
    steps = max(1, len(lengths) // batch_size)
    numbers = epoch * steps * batch_size + np.arange(steps * batch_size)
    order = epoch_permutation(numbers, len(lengths), seed)
    for begin in range(0, len(order), MIXED * batch_size):
        part = order[begin : begin + MIXED * batch_size]
        order[begin : begin + len(part)] = part[np.argsort(lengths[part], kind="stable")]
    return np.random.default_rng((seed, epoch)).permutation(order.reshape(steps, batch_size))


def training_batches(rows: TaskRows, sizes: list[int], batch_size: int, seed: int, step: int = 0) -> Iterator[Example]:
    """The batches from a step on, for ever.

    Args:
      sizes: lengths that batches are filled up to.
    """
    steps = max(1, len(rows) // batch_size)
    while True:
        epoch, first = divmod(step, steps)
        for chosen in epoch_batches(rows.lengths, batch_size, epoch, seed)[first:]:
            yield rows.batch(chosen, fitting(sizes, rows.lengths[chosen].max()))
            step += 1


def evaluation_batches(rows: TaskRows, sizes: list[int], batch_size: int) -> Iterator[tuple[np.ndarray, Example]]:
    """Every example once, the shortest first: which ones, and the batch, whose last rows have weight 0 where it is not full."""
    order = np.argsort(rows.lengths, kind="stable")
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        filled = np.concatenate([chosen, np.full(batch_size - len(chosen), chosen[0])])
        batch = rows.batch(filled, fitting(sizes, rows.lengths[chosen].max()))
        batch["weight"][len(chosen) :] = 0
        yield chosen, batch
