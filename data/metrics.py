"""The papers' metrics, from scikit-learn and scipy; those of SQuAD and CoNLL by their own definition."""

import collections
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bothways.errors import InputError

POSITIVE = {
    "equivalent": "equivalent",
    "not_equivalent": "equivalent",
    "duplicate": "duplicate",
    "not_duplicate": "duplicate",
}
"""The label that F1 counts in MRPC and QQP, by any label of the task."""


def sklearn_metrics():
    try:
        import sklearn.metrics
    except ModuleNotFoundError as e:
        raise InputError(
            "fine-tuning reports through scikit-learn, which is not installed: pip install 'bothways[finetune]'"
        ) from e
    return sklearn.metrics


def normalised(answer: str) -> list[str]:
    """Words of an answer: lower case, without punctuation and articles (arXiv 1606.05250, section 6.1)."""
    text = "".join(c for c in answer.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def span_scores(gold: Sequence[str], got: str) -> tuple[float, float]:
    """(exact match, F1 of words) of an answer against the best of the accepted ones; no answer is the empty text."""
    exact, f1, words = 0.0, 0.0, normalised(got)
    for answer in gold or [""]:
        right = normalised(answer)
        exact = max(exact, float(words == right))
        common = sum((collections.Counter(words) & collections.Counter(right)).values())
        if not words or not right:
            f1 = max(f1, float(words == right))
        elif common:
            f1 = max(f1, 2 * common / (len(words) + len(right)))
    return exact, f1


def entity_f1(gold: Sequence[Sequence[str]], got: Sequence[Sequence[str]]) -> float:
    """F1 of whole entities, micro-averaged, from B-, I-, O tags (CoNLL-2003)."""

    def entities(tags: Sequence[str]) -> set[tuple[int, int, str]]:
        found, start, kind = set(), None, ""
        for i, tag in enumerate([*tags, "O"]):
            prefix, _, name = tag.partition("-")
            if start is not None and (prefix != "I" or name != kind):
                found.add((start, i, kind))
                start = None
            if prefix in ("B", "I") and start is None:
                start, kind = i, name
        return found

    pairs = [(entities(a), entities(b)) for a, b in zip(gold, got, strict=True)]
    right = sum(len(a & b) for a, b in pairs)
    total = sum(len(a) + len(b) for a, b in pairs)
    return 2 * right / total if total else 1.0


def compute(metric: str, gold: Sequence, got: Sequence) -> float:
    """One metric over items. Tags come as a list per item, several labels as a frozenset, spans as (accepted answers)
    against (answer). F1 of several labels is over all decisions (micro_f1) or the mean over labels (macro_f1)."""
    if metric == "entity_f1":
        return entity_f1(gold, got)
    if metric in ("span_f1", "exact_match"):
        return float(np.mean([span_scores(a, b)[metric == "span_f1"] for a, b in zip(gold, got, strict=True)]))
    if gold and isinstance(gold[0], frozenset):
        each = sorted(frozenset().union(*gold, *got))
        gold, got = ([[int(label in item) for label in each] for item in items] for items in (gold, got))
        average = (
            metric.partition("_")[0] if len(each) > 1 else "binary"
        )  # scikit-learn would count its absence as a label
        return float(sklearn_metrics().f1_score(gold, got, average=average, zero_division=0.0)) if each else 1.0
    if gold and isinstance(gold[0], list):
        gold, got = [g for item in gold for g in item], [g for item in got for g in item]
    if metric in ("pearson", "spearman"):
        import scipy.stats

        measure = scipy.stats.pearsonr if metric == "pearson" else scipy.stats.spearmanr
        return float(measure(gold, got).statistic) if min(len(set(gold)), len(set(got))) > 1 else 0.0
    m = sklearn_metrics()
    measures: dict[str, Callable[[], float]] = {
        "accuracy": lambda: m.accuracy_score(gold, got),
        "macro_f1": lambda: m.f1_score(gold, got, average="macro", zero_division=0.0),
        "matthews": lambda: m.matthews_corrcoef(gold, got),
        "f1": lambda: m.f1_score(
            gold, got, pos_label=POSITIVE.get(str(gold[0]), sorted(set(gold))[-1]), zero_division=0.0
        ),
    }
    return float(measures[metric]())


def decisions_of(kind: str, gold: Sequence, found: Sequence[tuple[Any, Any]]) -> tuple[list[float], list[bool]]:
    """How sure each answer of a task was, a probability, and whether it was right; none for numbers and spans.

    Args:
      gold: the right answers, as `compute` has them.
      found: (answer, probability) of every item; of tags a list of each, of several labels {label: probability}.
    """
    pairs: list[tuple[float, bool]] = []
    for right, (answer, p) in zip(gold, found, strict=True):
        match kind:
            case "classify" | "choice":
                pairs.append((p, answer == right))
            case "tag":
                pairs += [(q, a == r) for q, a, r in zip(p, answer, right, strict=True)]
            case "multilabel":
                pairs += [(max(q, 1 - q), (label in answer) == (label in right)) for label, q in p.items()]
    return [p for p, _ in pairs], [right for _, right in pairs]


def calibration_error(confidences: Sequence[float], right: Sequence[bool], bins: int = 15) -> float:
    """Expected calibration error: how far confidence is from accuracy, in bins of equal width, by how many answers lie in
    each (arXiv 1706.04599, equation 3)."""
    p, hit = np.asarray(confidences, float), np.asarray(right, float)
    of = np.minimum((p * bins).astype(int), bins - 1)
    return float(np.abs(np.bincount(of, p - hit, bins)).sum() / len(p))


def confusion(labels: Sequence[str], gold: Sequence, got: Sequence) -> list[list[int]]:
    """How often an item, or word, of each label (rows) was given each label (columns)."""
    if gold and isinstance(gold[0], list):
        gold, got = [g for item in gold for g in item], [g for item in got for g in item]
    number = {label: i for i, label in enumerate(labels)}
    counts = np.zeros((len(labels), len(labels)), int)
    np.add.at(counts, ([number[g] for g in gold], [number[g] for g in got]), 1)
    return counts.tolist()


WORD = r"(?u)\b\w+\b"


def naive_bayes(train: Sequence[str], labels: Sequence[str], texts: Sequence[str]) -> list[str] | None:
    """Multinomial naive Bayes on words: what counting alone can do. None where texts have no words, as emoji have none."""
    sklearn_metrics()
    if not any(re.search(WORD, text) for text in train):
        return None
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB

    words = CountVectorizer(token_pattern=WORD)
    model = MultinomialNB().fit(words.fit_transform(train), labels)
    return list(model.predict(words.transform(texts)))


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): the 95 % interval of a mean by Student's t; of one value, the value."""
    import scipy.stats

    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, mean, mean
    half = float(scipy.stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
    return mean, mean - half, mean + half


class Ratio:
    """sum(above) / sum(below) over items that come in batches, with a bootstrap that keeps nothing per item.

    In each of `resamples` an item counts Poisson(1) times: what drawing n of n items with replacement comes to as n grows
    (Hanley and MacGibbon 2006). Those of one item count together.
    """

    def __init__(self, seed: int = 0, resamples: int = 2000):
        self.n, self.above, self.below = 0, 0.0, 0.0
        self._rng, self._drawn = np.random.default_rng(seed), np.zeros((2, resamples))

    def add(self, above: np.ndarray, below: np.ndarray) -> None:
        """Of so many items more, [n] each."""
        for i in range(0, len(above), 256):
            items = np.stack([above[i : i + 256], below[i : i + 256]]).astype(float)
            self._drawn += items @ self._rng.poisson(1.0, (items.shape[1], self._drawn.shape[1]))
        self.n, self.above, self.below = self.n + len(above), self.above + np.sum(above), self.below + np.sum(below)

    @property
    def value(self) -> float:
        return float(self.above / self.below)

    def interval(self) -> tuple[float, float]:
        """95 %; of one item, its value."""
        if self.n < 2:
            return self.value, self.value
        above, below = self._drawn[:, self._drawn[1] > 0]
        low, high = np.percentile(above / below, [2.5, 97.5])
        return float(low), float(high)
