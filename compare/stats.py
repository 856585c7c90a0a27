"""Numbers with their uncertainty: 95 % intervals, differences, and what may be said of a claim."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from bothways.data.metrics import mean_interval


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value, its 95 % interval, and how many observations stand behind it."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        digits = 3 if max(abs(self.low), abs(self.high)) < 100 else 0
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"

    def holds(self, number: float) -> bool:
        """Whether the number lies in the interval."""
        return self.low <= number <= self.high


Values = Sequence[float] | Sequence[Sequence[float]] | np.ndarray
"""[seeds], or [seeds][items] with the same items for every seed."""


def mean(values: Values, below: Sequence[float] | None = None) -> Estimate:
    """The mean, with Student's interval over seeds; with items, `two_way`, each counting as `below` says."""
    if np.ndim(values) == 2:
        return two_way(values, below)
    return Estimate(*mean_interval(values), len(values))


def within(e: Estimate, low: float, high: float) -> Estimate:
    """The interval as far as it lies where the value can be."""
    return dataclasses.replace(e, low=max(low, e.low), high=min(high, e.high))


def mean_share(shares: Values) -> Estimate:
    """As `mean`, of shares, or of items that are right (1) or wrong (0): between 0 and 1."""
    return within(mean(shares), 0.0, 1.0)


def share(right: int, n: int) -> Estimate:
    """A share of n, with Wilson's interval (Wilson 1927); of none, everything is possible."""
    if n == 0:
        return Estimate(0.0, 0.0, 1.0, 0)
    z, p = 1.959964, right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return Estimate(p, max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale), n)


def pooled_share(right: Sequence[int], n: Sequence[int]) -> Estimate:
    """A share of draws that no two seeds have in common: the wider of Wilson's interval of all draws and Student's over
    seeds, [seeds] right of [seeds] n."""
    e = share(sum(right), sum(n))
    if min(n) == 0 or len(n) < 2:
        return e
    by_seed = mean_share([r / k for r, k in zip(right, n, strict=True)])
    return dataclasses.replace(e, low=min(e.low, by_seed.low), high=max(e.high, by_seed.high))


def difference(a: Values, b: Values, below: Sequence[float] | None = None) -> Estimate:
    """`mean` of a - b, over pairs that share a seed, and an item where there are items."""
    return mean(np.subtract(a, b).tolist(), below)


def share_difference(a: Values, b: Values) -> Estimate:
    """As `difference`, of shares: between -1 and 1."""
    return within(difference(a, b), -1.0, 1.0)


def apart(a: Estimate, b: Estimate) -> Estimate:
    """Share a minus share b, of different items, by Newcombe's interval (1998, method 10) from Wilson's of each."""
    low = math.hypot(a.value - a.low, b.high - b.value)
    high = math.hypot(a.high - a.value, b.value - b.low)
    middle = a.value - b.value
    return Estimate(middle, middle - low, middle + high, a.n + b.n)


def two_way(above: Sequence[Sequence[float]], below: Sequence[float] | None = None, seed: int = 0) -> Estimate:
    """sum(above) / sum(below) over seeds and items, with an interval for another draw of seeds and of items together.

    Items are resampled, with what all seeds gave them (a bootstrap); seeds are too few for that and get Student's interval;
    the two are independent, and add in squares.

    Args:
      above: [seeds][items], the same items for every seed; differences of two models as well as values.
      below: [items] what an item counts, such as its bytes; None: 1 each.
    """
    import scipy.stats

    x = np.asarray(above, float)
    y = np.ones(x.shape[1]) if below is None else np.asarray(below, float)
    S, N = x.shape
    rng, draws = np.random.default_rng(seed), 2000
    items = rng.integers(0, N, (draws, N))
    value = x.sum() / (S * y.sum())
    by_items = x.mean(axis=0)[items].sum(axis=1) / y[items].sum(axis=1) - value
    by_seed = x.sum(axis=1) / y.sum()
    half = float(scipy.stats.t.ppf(0.975, S - 1) * by_seed.std(ddof=1) / S**0.5) if S > 1 else 0.0
    low, high = np.hypot(np.percentile(by_items, [2.5, 97.5]), half) * [-1, 1]
    return Estimate(float(value), float(value + low), float(value + high), S * N)


def detectable(spread: float, seeds: int) -> float:
    """The difference that a comparison of so many pairs of seeds finds significant four times out of five, where
    differences vary by this standard deviation from seed to seed (two-sided, 5 %)."""
    import scipy.stats

    t = scipy.stats.t(seeds - 1)
    return float((t.ppf(0.975) + t.ppf(0.8)) * spread / seeds**0.5)


HOLDS, FAILS, OPEN = "holds here", "does not hold here", "not decided here"


def verdict(above_zero: Estimate) -> str:
    """What a difference says of the claim that it is positive: nothing, if zero is in its interval, or if it has none."""
    if above_zero.low == above_zero.high or above_zero.holds(0):
        return OPEN
    return HOLDS if above_zero.low > 0 else FAILS


def all_of(*verdicts: str) -> str:
    """A claim of several parts holds if each part does, and does not if any part does not."""
    if FAILS in verdicts:
        return FAILS
    return OPEN if OPEN in verdicts else HOLDS


def format_difference(above_zero: Estimate, unit: str = "", sign: str = "+") -> str:
    """A difference in words: its value and interval, and that it is not significant where it is not."""
    e = above_zero
    if e.low == e.high:
        return f"{e.value:{sign}.3f}{unit} (no spread between seeds, so no interval)"
    weak = " (not significant)" if e.holds(0) else ""
    return f"{e.value:{sign}.3f}{unit} [{e.low:{sign}.3f}, {e.high:{sign}.3f}]{weak}"


def ranked(differences: dict[str, Estimate]) -> str:
    """Differences by what they log: better at ..., worse at ..., no clear difference in ..."""
    words = {HOLDS: "better at", FAILS: "worse at", OPEN: "not clearly different at"}
    found = []
    for kind, word in words.items():
        named = [
            f"{name} ({e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}])"
            for name, e in differences.items()
            if verdict(e) == kind
        ]
        found += [f"{word} {', '.join(named)}"] if named else []
    return "; ".join(found)
