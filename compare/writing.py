"""Measures of what is written: a reader that only counts, and how varied the texts are."""

import collections
import itertools
from collections.abc import Sequence

import numpy as np


class Judge:
    """Counts of one, two and three tokens in training, mixed 0.2, 0.3, 0.5: a reader that belongs to neither family."""

    def __init__(self, ids: np.ndarray):
        ids = ids.tolist()
        self.size = len(ids)
        self.counts = [collections.Counter(zip(*(ids[k:] for k in range(n)), strict=False)) for n in (1, 2, 3)]
        self.kinds = len(self.counts[0])

    def bits(self, ids: Sequence[int]) -> float:
        """Bits per token, each given the two before it."""
        one, two, three = self.counts
        total = 0.0
        for i in range(2, len(ids)):
            a, b, c = ids[i - 2 : i + 1]
            p = 0.2 * (one[(c,)] + 1) / (self.size + self.kinds + 1)
            p += 0.3 * two[b, c] / max(1, one[(b,)]) + 0.5 * three[a, b, c] / max(1, two[a, b])
            total -= np.log2(p)
        return total / max(1, len(ids) - 2)


def distinct(texts: list[list[int]], n: int = 2) -> float:
    """Share of all n-grams that are different from each other (arXiv 1510.03055)."""
    grams = [tuple(t[i : i + n]) for t in texts for i in range(len(t) - n + 1)]
    return len(set(grams)) / len(grams)


def entropy(texts: list[list[int]]) -> float:
    """Bits of the distribution of tokens."""
    counts = np.array(list(collections.Counter(itertools.chain(*texts)).values()), float)
    p = counts / counts.sum()
    return float(-(p * np.log2(p)).sum())


def self_bleu(texts: list[list[int]], most: int = 3) -> float:
    """Mean BLEU of each text against all others, n-grams of up to `most` tokens (arXiv 1802.01886): high is monotonous."""
    logs = np.zeros(len(texts))
    for n in range(1, most + 1):
        grams = [collections.Counter(tuple(t[i : i + n]) for i in range(len(t) - n + 1)) for t in texts]
        # The two texts that have an n-gram most often: for each text one of them is another. So all texts are passed once.
        first: dict[tuple[int, ...], tuple[int, int]] = {}
        second: collections.Counter = collections.Counter()
        for i, mine in enumerate(grams):
            for gram, count in mine.items():
                most_often, _ = first.get(gram, (0, -1))
                second[gram] = max(second[gram], min(count, most_often))
                first[gram] = max(first.get(gram, (0, -1)), (count, i))
        for i, mine in enumerate(grams):
            others = {gram: second[gram] if first[gram][1] == i else first[gram][0] for gram in mine}
            clipped = sum(min(count, others[gram]) for gram, count in mine.items())
            logs[i] += np.log(max(clipped, 0.1) / max(1, sum(mine.values())))
    return float(np.mean(np.exp(logs / most)))
