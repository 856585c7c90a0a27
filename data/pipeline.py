"""The input pipeline: one global order of examples, this host's share of it, resumed from one integer."""

import collections
import concurrent.futures
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from bothways.data.blocks import LANES, block_permutation
from bothways.data.examples import Example, stacked
from bothways.data.rng import ExampleRng, epoch_permutation

AHEAD = 4
"""Batches that are made ahead of the one that is trained on, where text comes from a store."""

ExampleFn = Callable[[Example, ExampleRng], Example]


class RowSource(Protocol):
    """Rows by their index, many at once."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: np.ndarray) -> Example:
        """Arrays [n, ...] of rows [n]."""


class Stacked:
    """Examples of one shape that are in memory already, as a source."""

    def __init__(self, examples: list[Example]):
        self.arrays, self.count = stacked(examples), len(examples)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, indices: np.ndarray) -> Example:
        return {name: values[indices] for name, values in self.arrays.items()}


def training_batches(
    rows: RowSource,
    example: ExampleFn,
    *,
    batch_size: int,
    seed: int,
    position: int = 0,
    mine: np.ndarray | None = None,
) -> Iterator[Example]:
    """This host's part of every global batch, for ever.

    All rows are shuffled anew in each epoch (`order`). Row k of a global batch is example position + k of the run; it is the
    same for any number of hosts and any batch size, and what is drawn for it depends on (seed, position + k) alone.

    Args:
      rows: source of rows.
      example: rows [n, ...] and their draws -> model inputs [n, ...].
      batch_size: examples in a global batch.
      position: examples already consumed by all hosts together.
      mine: which rows of each global batch this host holds, [rows] indices; None for all.

    Yields:
      numpy arrays [rows, ...].
    """
    mine = np.arange(batch_size) if mine is None else mine

    def batch(position: int) -> Example:
        numbers = position + mine
        return example(rows[order(rows, numbers, seed)], ExampleRng(seed, numbers))

    if not blocks_of(rows):
        while True:
            yield batch(position)
            position += batch_size
    for n in range(-(-LANES // batch_size)):  # all blocks that it begins with are read from now on
        order(rows, position + n * batch_size + mine, seed)
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        made = collections.deque(pool.submit(batch, position + n * batch_size) for n in range(AHEAD))
        try:
            while True:
                position += batch_size
                made.append(pool.submit(batch, position + (AHEAD - 1) * batch_size))
                yield made.popleft().result()
        finally:
            for future in made:
                future.cancel()


def blocks_of(rows: RowSource) -> int:
    """Rows of a block, of a source that is read by blocks; else 0."""
    return getattr(rows, "block_rows", 0)


def order(rows: RowSource, numbers: np.ndarray, seed: int) -> np.ndarray:
    """[n] the row that each example of the run reads, of a mixture [n, 2] (data/mixture.py). Of a source that is read by
    blocks, those and the ones of the next examples are read from now on."""
    if own := getattr(rows, "order_of", None):
        return own(numbers, seed)
    count, block = len(rows), blocks_of(rows)
    if not block:
        return epoch_permutation(numbers, count, seed)
    found = block_permutation(numbers, count, block, seed)
    later = block_permutation(numbers[:LANES] + LANES * block, count, block, seed)
    for wanted in (found, later):
        rows.read_ahead(np.unique(wanted // block))
    return found


def evaluation_batches(
    rows: RowSource, example: ExampleFn, *, batch_size: int, seed: int, mine: np.ndarray | None = None, limit: int = 0
) -> Iterator[Example]:
    """Every row once, in order, with the same randomness each time; the last batch is filled with empty examples.

    Args:
      mine: as for training.
      limit: at most so many rows, spread evenly; 0 for all.
    """
    count = min(len(rows), limit) if limit else len(rows)
    chosen = np.linspace(0, len(rows) - 1, count).astype(int)
    mine = np.arange(batch_size) if mine is None else mine
    for begin in range(0, count, batch_size):
        slots = begin + mine
        indices = chosen[np.minimum(slots, count - 1)]
        made = example(rows[indices], ExampleRng(seed, indices))
        yield {name: np.where((slots < count).reshape(-1, *[1] * (x.ndim - 1)), x, 0) for name, x in made.items()}
