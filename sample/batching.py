"""Items of about the same length together, as many as memory allows: the one way that inference makes batches."""

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from bothways.model.config import TransformerConfig
from bothways.sample.decode import bucket, close_bucket

T = TypeVar("T")

BATCH_BYTES = 2**29
"""What the activations of one batch may take, beside the weights and the logits (model.loss.MAX_LOGITS bounds those)."""
MOST_ROWS = 128
READ_AHEAD = 2**17
"""Tokens of items that are held while they are sorted by length."""
FIRST_TEXTS, MOST_TEXTS = 8, 512
"""Texts answered together: few at first, so that the first result comes early."""


def row_bytes(cfg: TransformerConfig, length: int) -> int:
    """About what one row of `length` tokens takes in a forward pass, in bytes: the activations of one block, and the
    attention scores of a block of queries and their softmax."""
    block = 4 * cfg.d_model + (2 + cfg.gated) * cfg.d_ff + 2 * (cfg.n_heads + cfg.n_kv_heads) * cfg.d_head
    scores = 2 * cfg.n_heads * min(length, 1024)
    return 4 * length * (block + scores)


def rows_that_fit(cfg: TransformerConfig, memory: int = BATCH_BYTES, logits: bool = False) -> Callable[[int], int]:
    """How many rows of a length fit into `memory` bytes: a power of two, from 1 to MOST_ROWS.

    Args:
      logits: whether those of a whole row are there at once.

    >>> rows = rows_that_fit(TransformerConfig(d_model=768, n_heads=12).resolved())
    >>> rows(128), rows(1024), rows(8192)
    (64, 2, 1)
    """
    cfg = cfg.resolved()

    def rows(length: int) -> int:
        T = bucket(length)
        fitting = min(MOST_ROWS, memory // (row_bytes(cfg, T) + 8 * logits * T * cfg.table_rows))
        return 1 << max(1, fitting).bit_length() - 1

    return rows


def rows_that_decode(cfg: TransformerConfig, new: int, memory: int = BATCH_BYTES) -> Callable[[int], int]:
    """How many prompts of a length fit that get up to `new` tokens each: as `rows_that_fit`, and their caches too."""
    prompts, cfg = rows_that_fit(cfg, memory), cfg.resolved()
    per_token = 4 * cfg.n_layers * cfg.n_kv_heads * (cfg.d_head + cfg.d_value)

    def rows(length: int) -> int:
        fitting = memory // (per_token * min(bucket(length) + new, cfg.context_length))
        return min(prompts(length), 1 << max(1, fitting).bit_length() - 1)

    return rows


def batched(
    items: Iterable[T], key: Callable[[T], tuple[int, ...]], rows: Callable[[int], int], ahead: int = READ_AHEAD
) -> Iterator[list[T]]:
    """Batches of items of about the same length, from a stream that may be longer than memory.

    Args:
      key: an item's length in tokens, then whatever else should be alike within a batch.
      rows: length -> most items of that length in a batch.
      ahead: tokens of items that are read and sorted at a time.

    Yields:
      batches, the longest of what was read ahead first; every item once.
    """
    held: list[T] = []
    size = 0

    def sorted_out() -> Iterator[list[T]]:
        ordered = sorted(held, key=key, reverse=True)
        begin = 0
        while begin < len(ordered):
            end = begin + rows(key(ordered[begin])[0])
            yield ordered[begin:end]
            begin = end

    for item in items:
        held.append(item)
        size += key(item)[0]
        if size >= ahead:
            yield from sorted_out()
            held, size = [], 0
    yield from sorted_out()


def sharing_rows(lengths: Sequence[int], width: int, most: int) -> list[list[int]]:
    """Rows of at most `width` tokens and `most` items, by the items' numbers: into each the longest that is left, then always
    the longest that still fits. What is longer than half of `width` has a row of its own.

    >>> sharing_rows([3, 9, 5, 5, 1], 10, 3)
    [[1], [2, 3], [0, 4]]
    """
    left: dict[int, list[int]] = collections.defaultdict(list)
    rows = []
    for i, n in enumerate(lengths):
        if 2 * n > width:
            rows.append([i])
        else:
            left[n].append(i)
    for same in left.values():
        same.reverse()
    while left:
        row, room = [], width
        while len(row) < most and (fitting := [n for n in left if n <= room]):
            n = max(fitting)
            row.append(left[n].pop())
            room -= n
            if not left[n]:
                del left[n]
        rows.append(row)
    return rows


def laid_out(
    rows: Sequence[Sequence[Sequence[int]]], longest: int, pad: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of items beside each other as tokens, positions and segments [B, T], both dimensions in their buckets, T at most
    `longest`. Positions restart with every item; segments are 1, 2, ... and 0 where nothing is."""
    T = min(close_bucket(max(sum(map(len, row)) for row in rows)), longest)
    tokens, positions, segments = np.zeros((3, bucket(len(rows), 1), T), np.int32)
    tokens[:] = pad
    for i, row in enumerate(rows):
        begin = 0
        for number, item in enumerate(row, 1):
            here = slice(begin, begin + len(item))
            tokens[i, here], positions[i, here], segments[i, here] = item, np.arange(len(item)), number
            begin += len(item)
    return tokens, positions, segments


def growing(items: Iterable[T], first: int = FIRST_TEXTS, most: int = MOST_TEXTS) -> Iterator[list[T]]:
    """A stream in parts of `first`, twice that, and so on up to `most` items: an early first result, then full batches.

    >>> [len(part) for part in growing(range(100), 8, 32)]
    [8, 16, 32, 32, 12]
    """
    held: list[T] = []
    for item in items:
        held.append(item)
        if len(held) == first:
            yield held
            held, first = [], min(2 * first, most)
    if held:
        yield held
