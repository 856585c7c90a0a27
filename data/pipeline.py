"""The input pipeline: one global order of examples, this host's share of it, resumed from one integer."""

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from bothways.data.examples import Example, stacked
from bothways.data.rng import ExampleRng, epoch_permutation

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

    All rows are epoch_permutation anew in each epoch. Row k of a global batch is example position + k of the run; it is the
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
    while True:
        numbers = position + mine
        yield example(rows[epoch_permutation(numbers, len(rows), seed)], ExampleRng(seed, numbers))
        position += batch_size


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
        places = begin + mine
        indices = chosen[np.minimum(places, count - 1)]
        made = example(rows[indices], ExampleRng(seed, indices))
        yield {name: np.where((places < count).reshape(-1, *[1] * (x.ndim - 1)), x, 0) for name, x in made.items()}
