"""The input pipeline: global order, this host's share of it, resumed from one integer."""

from collections.abc import Callable, Iterator

import grain
import numpy as np
from grain.experimental import ElasticIterator

from data.examples import Example

ExampleFn = Callable[[Example, np.random.Generator], Example]

# Reading rows is slicing a memory map; threads cost more than they bring.
READ_OPTIONS = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


def training_batches(
    rows,
    example: ExampleFn,
    *,
    batch_size: int,
    seed: int,
    position: int = 0,
    host: int = 0,
    hosts: int = 1,
) -> Iterator[Example]:
    """This host's part of every global batch, for ever.

    All rows are shuffled anew in each epoch. Example number n of the run is the same for any number of hosts and
    any batch size, and its random generator depends on (seed, n) alone.

    Args:
      rows: random-access source of rows.
      example: row -> model inputs.
      batch_size: examples in a global batch; the hosts share it equally.
      position: examples already consumed by all hosts together.

    Yields:
      numpy arrays [batch_size / hosts, ...].
    """
    dataset = grain.MapDataset.source(rows).seed(seed).shuffle().repeat().random_map(example)
    options = grain.sharding.ShardOptions(shard_index=host, shard_count=hosts)
    iterator = iter(ElasticIterator(dataset, batch_size, options, read_options=READ_OPTIONS))
    iterator.set_state({"global_next_index": position})
    return iterator


def evaluation_batches(
    rows, example: ExampleFn, *, batch_size: int, seed: int, host: int = 0, hosts: int = 1, limit: int = 0
) -> Iterator[Example]:
    """Every row once, in order, with the same randomness each time; the last batch is filled with empty examples.

    Args:
      limit: at most so many rows, spread evenly; 0 for all.
    """
    count = min(len(rows), limit) if limit else len(rows)
    chosen = np.linspace(0, len(rows) - 1, count).astype(int)
    local = batch_size // hosts
    for begin in range(0, count, batch_size):
        mine = chosen[begin + host * local : begin + batch_size][:local]
        examples = [example(rows[i], np.random.default_rng([seed, i])) for i in mine]
        blank = {
            k: np.zeros_like(v)
            for k, v in (examples[0] if examples else example(rows[0], np.random.default_rng(0))).items()
        }
        examples += [blank] * (local - len(examples))
        yield {k: np.stack([e[k] for e in examples]) for k in examples[0]}
