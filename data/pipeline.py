"""The input pipeline: one global order of examples, this host's share of it, resumed from one integer."""

from collections.abc import Callable, Iterator

import grain
import numpy as np

from data.examples import Example

ExampleFn = Callable[[Example, np.random.Generator], Example]


def training_batches(
    rows,
    example: ExampleFn,
    *,
    batch_size: int,
    seed: int,
    position: int = 0,
    mine: np.ndarray | None = None,
) -> Iterator[Example]:
    """This host's part of every global batch, for ever.

    All rows are shuffled anew in each epoch. Row k of a global batch is example position + k of the run; it is the
    same for any number of hosts and any batch size, and its random generator depends on (seed, position + k) alone.

    Args:
      rows: random-access source of rows.
      example: row -> model inputs.
      batch_size: examples in a global batch.
      position: examples already consumed by all hosts together.
      mine: which rows of each global batch this host holds, [rows] indices; None for all.

    Yields:
      numpy arrays [rows, ...].
    """
    dataset = grain.MapDataset.source(rows).seed(seed).shuffle().repeat().random_map(example)
    mine = np.arange(batch_size) if mine is None else mine
    while True:
        yield _stacked([dataset[int(position + k)] for k in mine])
        position += batch_size


def _stacked(examples: list[Example]) -> Example:
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def evaluation_batches(
    rows, example: ExampleFn, *, batch_size: int, seed: int, mine: np.ndarray | None = None, limit: int = 0
) -> Iterator[Example]:
    """Every row once, in order, with the same randomness each time; the last batch is filled with empty examples.

    Args:
      mine: as for training.
      limit: at most so many rows, spread evenly; 0 for all.
    """
    count = min(len(rows), limit) if limit else len(rows)
    chosen = np.linspace(0, len(rows) - 1, count).astype(int)
    mine = np.arange(batch_size) if mine is None else mine
    blank = {name: np.zeros_like(value) for name, value in example(rows[0], np.random.default_rng(0)).items()}
    for begin in range(0, count, batch_size):
        places = begin + mine
        here = [example(rows[i], np.random.default_rng([seed, i])) for i in chosen[places[places < count]]]
        yield _stacked(here + [blank] * (len(mine) - len(here)))
