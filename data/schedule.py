"""Which corpus each example of a run comes from: in every prefix of the run each has its share, to within one row."""

import dataclasses
import heapq
import itertools
import math
from array import array
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

PERIOD = 100_000
"""Shares are kept as so many parts of a whole at most: five digits exactly, and fractions of small numbers."""
NEVER = 2**62


@dataclasses.dataclass(frozen=True)
class Phase:
    """From example `first` on, corpus i has `parts[i]` of every `period` examples."""

    first: int
    parts: tuple[int, ...]

    @property
    def period(self) -> int:
        return sum(self.parts)


def whole_parts(weights: Sequence[Fraction]) -> tuple[int, ...]:
    """Weights as whole numbers whose sum is at most PERIOD: exactly where that can be, else rounded, none of them to 0.

    >>> whole_parts([Fraction("0.6"), Fraction("0.3"), Fraction(0)])
    (2, 1, 0)
    """
    total = sum(weights)
    shares = [Fraction(weight) / total for weight in weights]
    period = math.lcm(*(share.denominator for share in shares))
    if period > PERIOD:
        found = [max(1, math.floor(share * PERIOD)) if share else 0 for share in shares]
        left = sorted(range(len(shares)), key=lambda i: found[i] - shares[i] * PERIOD)  # who lost most, first
        for i in itertools.islice(itertools.cycle(left), max(0, PERIOD - sum(found))):
            found[i] += shares[i] > 0
        return tuple(found)
    return tuple(int(share * period) for share in shares)


@dataclasses.dataclass(frozen=True)
class Segment:
    """Examples from `first` on, `which` over and over again."""

    first: int
    which: np.ndarray
    """[length] the corpus of each."""
    rank: np.ndarray
    """[length] how many before it in `which` are of the same corpus."""
    before: np.ndarray
    """[corpora] how many of each came before `first`."""
    each: np.ndarray
    """[corpora] how many of each are in `which`."""


class Schedule:
    """Which corpus each example comes from, and how many of that corpus came before it.

    With T_i(n) the share that corpus i should have of the first n examples, its j-th row may come as soon as T_i > j - 1 and
    must have come when T_i = j: so its count is never a whole row from T_i. Among the rows that may come, the one that
    must come first does (earliest deadline first), which meets all such deadlines if anything does; and something does
    (Baruah, Cohen, Plaxton, Varvel 1996, "Proportionate progress", theorem 1; with shares that change, Tijdeman 1980, "The
    chairman assignment problem"). Shares are whole parts of a period, so that what is computed is one or two periods of
    each phase, and the rest repeats them: any example is looked up, however far the run is.

    Args:
      phases: (first example, weight of each corpus), the first from 0 on. Weights of one phase need no sum of 1.
    """

    def __init__(self, phases: Sequence[tuple[int, Sequence[Fraction]]]):
        self.phases = [Phase(first, whole_parts(weights)) for first, weights in phases]
        self.count = len(self.phases[0].parts)
        self.due = [self._at_phases(i) for i in range(self.count)]
        self.lines = [self._lines(i) for i in range(self.count)]
        self.segments = self._segments()
        self.firsts = np.array([segment.first for segment in self.segments])

    def __call__(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each example [n] its corpus and, among the examples of that corpus, its number from 0, both [n] int64."""
        numbers = np.asarray(numbers, np.int64)
        which, number = np.empty(numbers.shape, np.int64), np.empty(numbers.shape, np.int64)
        segment_of = np.searchsorted(self.firsts, numbers, side="right") - 1
        for at in np.unique(segment_of):
            segment, mine = self.segments[at], segment_of == at
            times, inside = np.divmod(numbers[mine] - segment.first, len(segment.which))
            corpus = segment.which[inside].astype(np.int64)
            which[mine] = corpus
            number[mine] = segment.before[corpus] + times * segment.each[corpus] + segment.rank[inside]
        return which, number

    def counts(self, examples: int) -> np.ndarray:
        """[corpora] how many of the first `examples` come from each."""
        segment = self.segments[int(np.searchsorted(self.firsts, examples, side="right")) - 1]
        times, left = divmod(examples - segment.first, len(segment.which))
        return segment.before + times * segment.each + np.bincount(segment.which[:left], minlength=self.count)

    def target(self, examples: int) -> list[Fraction]:
        """What the counts would be if rows could be divided."""
        at = max(p for p, phase in enumerate(self.phases) if phase.first <= examples)
        phase = self.phases[at]
        steps = examples - phase.first
        return [due[at] + Fraction(steps * part, phase.period) for due, part in zip(self.due, phase.parts, strict=True)]

    # ---- computing it --------------------------------------------------------------------------------------------------

    def _at_phases(self, corpus: int) -> list[Fraction]:
        """T of a corpus where each phase begins."""
        found = [Fraction(0)]
        for phase, following in itertools.pairwise(self.phases):
            found.append(found[-1] + Fraction((following.first - phase.first) * phase.parts[corpus], phase.period))
        return found

    def _lines(self, corpus: int) -> list[tuple[int, int, int, int, int, Fraction | None]]:
        """T of a corpus in each phase: above / below at its beginning, then per_period / (below * period) an example; and T
        where it ends, None of the last."""
        due = self.due[corpus]
        return [
            (t.numerator, t.denominator, phase.period, t.denominator * phase.parts[corpus], phase.first, end)
            for t, phase, end in zip(due, self.phases, [*due[1:], None], strict=True)
        ]

    def _reached(self, corpus: int, rows: int, beyond: bool) -> int:
        """After how many examples T of a corpus is `rows`; beyond: is more than that."""
        for above, below, period, per_period, first, last in self.lines[corpus]:
            if last is None or last > rows or (last == rows and not beyond):
                if not per_period:
                    return NEVER
                lacking = (rows * below - above) * period
                return first + max(0, lacking // per_period + 1 if beyond else -(-lacking // per_period))
        raise AssertionError

    def _segments(self) -> list[Segment]:
        found, at, counts = [], 0, [0] * self.count
        for phase, following in itertools.zip_longest(self.phases, self.phases[1:]):
            end, period = following.first if following else NEVER, phase.period
            # Rows that may come on both sides of the next phase have other deadlines; all of them may come in the last
            # period before it only.
            settled = end - period - 2
            seen: dict[tuple[int, ...], tuple[int, list[int]]] = {}
            while at < end:
                turn = (at - phase.first) // period
                state = tuple(count - turn * part for count, part in zip(counts, phase.parts, strict=True))
                if state in seen and at <= settled:
                    first = seen[state][0]
                    begin = next(i for i, segment in enumerate(found) if segment.first == first)
                    which = np.concatenate([segment.which for segment in found[begin:]])
                    found[begin:] = [self._segment(first, which, seen[state][1])]
                    if not following:
                        return found
                    times = (settled - first) // (at - first)
                    counts = [b + times * int(e) for b, e in zip(seen[state][1], found[-1].each, strict=True)]
                    at, seen = first + times * len(which), {}
                    settled = -1
                    continue
                seen[state] = at, list(counts)
                until = min(end, phase.first + (turn + 1) * period)
                which, after = self._simulated(at, until, counts)
                found.append(self._segment(at, which, counts))
                at, counts = until, after
        return found

    def _segment(self, first: int, which: np.ndarray, before: Sequence[int]) -> Segment:
        rank, each = np.zeros(len(which), np.int64), np.zeros(self.count, np.int64)
        for corpus in range(self.count):
            mine = which == corpus
            each[corpus] = mine.sum()
            rank[mine] = np.arange(each[corpus])
        return Segment(first, which, rank, np.array(before, np.int64), each)

    def _simulated(self, begin: int, end: int, counts: Sequence[int]) -> tuple[np.ndarray, list[int]]:
        """The corpora of examples `begin` to `end`, and the counts after them."""
        counts, which = list(counts), array("H")
        waiting = [(self._reached(i, counts[i], True) - 1, i) for i in range(self.count)]
        ready: list[tuple[int, int]] = []
        heapq.heapify(waiting)
        for example in range(begin, end):
            while waiting and waiting[0][0] <= example:
                i = heapq.heappop(waiting)[1]
                heapq.heappush(ready, (self._reached(i, counts[i] + 1, False), i))
            i = heapq.heappop(ready)[1]
            which.append(i)
            counts[i] += 1
            heapq.heappush(waiting, (self._reached(i, counts[i], True) - 1, i))
        return np.array(which, np.uint16), counts
