"""Random numbers for many examples at once: those of an example depend on the seed and its number alone."""

import math

import numpy as np

STEP = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(x: np.ndarray) -> np.ndarray:
    """The bits of every number thoroughly mixed: the last steps of splitmix64 (Steele et al., OOPSLA 2014, figure 17).

    Args:
      x: uint64, not a scalar, for which numpy warns of the overflow that is meant here.
    """
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def keys(seed: int, numbers: np.ndarray) -> np.ndarray:
    """[n] uint64, one of each number; those of different seeds have nothing to do with each other."""
    return splitmix64(splitmix64(np.full(1, seed, np.uint64) + STEP) + np.asarray(numbers).astype(np.uint64) * STEP)


class ExampleRng:
    """A stream of random numbers for each of n examples, distinguished by their indices."""

    def __init__(self, seed: int, numbers: np.ndarray):
        self.keys, self.used = keys(seed, numbers), 0
        self.seed, self.numbers = seed, np.asarray(numbers)

    def bits(self, *shape: int) -> np.ndarray:
        """[n, *shape] uint64."""
        at = np.arange(self.used + 1, self.used + 1 + math.prod(shape), dtype=np.uint64)
        self.used += len(at)
        return splitmix64(self.keys[:, None] + at * STEP).reshape(-1, *shape)

    def uniform(self, *shape: int) -> np.ndarray:
        """[n, *shape] float64 in [0, 1)."""
        return (self.bits(*shape) >> np.uint64(11)) * 2.0**-53

    def stratified(self) -> np.ndarray:
        """[n] float64 in [0, 1) that cover it evenly over any consecutive examples: multiples of the golden ratio, from a
        start that depends on the seed (additive recurrence; Niederreiter 1992, section 3.1)."""
        start = (keys(self.seed, np.array([-1]))[0] >> np.uint64(11)) * 2.0**-53
        return (start + self.numbers * 0.6180339887498949) % 1.0

    def generators(self) -> list[np.random.Generator]:
        """numpy's generators, for examples that are made one at a time."""
        return [np.random.default_rng(int(key)) for key in self.bits(1)[:, 0]]


def epoch_permutation(numbers: np.ndarray, count: int, seed: int, rounds: int = 6) -> np.ndarray:
    """Which of `count` rows each example of an endless run reads: all of them in every epoch, in an order of its own.

    A Feistel network over the least even number of bits that holds `count`, walked until it is below `count` (Black
    and Rogaway, 2002, section 4): nothing is stored, however many rows there are.
    """
    epoch, row = np.divmod(np.asarray(numbers, np.int64), count)
    row, key = row.astype(np.uint64), keys(seed, epoch)
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    walking = np.arange(len(row))
    while len(walking):
        left, right, own = row[walking] >> half, row[walking] & low, key[walking]
        for r in range(1, rounds + 1):
            left, right = right, left ^ (splitmix64(own + ((right << np.uint64(8)) + np.uint64(r)) * STEP) & low)
        row[walking] = (left << half) | right
        walking = walking[row[walking] >= count]
    return row.astype(np.int64)
