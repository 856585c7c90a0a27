"""Figures of a run on held-out text, each with its interval."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from common.errors import InputError
from data import corpora, tokens
from sample import score as scoring
from sample.text import TextModel

SUITES = ("validation", "test")


@dataclasses.dataclass(frozen=True)
class Figure:
    suite: str
    metric: str
    value: float
    interval: tuple[float, float]
    """95 %, by resampling rows."""
    n: int
    """Rows of text."""


def ratio_interval(above: np.ndarray, below: np.ndarray, seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of sum(above) / sum(below), pairs drawn together (Efron, Tibshirani 1993, ch. 13)."""
    picks = np.random.default_rng(seed).integers(0, len(above), (draws, len(above)))
    ratios = above[picks].sum(axis=1) / below[picks].sum(axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)


def evaluate(model: TextModel, suites: Sequence[str]) -> list[Figure]:
    """Held-out loss (nats per token) and bits per byte on splits of the run's own corpus.

    Raises:
      InputError: no such suite, or the corpus is not what the run was trained on any more.
    """
    for suite in suites:
        if suite not in SUITES:
            raise InputError(f"no suite {suite!r}; there are {', '.join(SUITES)}")
    cfg, context = model.recipe.data, model.recipe.model.context
    corpus, lengths = corpora.load(cfg), model.tokenizer.byte_lengths()
    figures = []
    for suite in suites:
        held = tokens.prepare(corpus, suite, model.tokenizer, cfg.cache)
        rows = tokens.Rows(held, context, model.tokenizer.pad, cfg.separate_documents, padded=True)
        pieces = []
        for i in range(len(rows)):  # one document's part of a row is one piece: nothing sees another document
            row = rows[i]
            for segment in range(1, row["segments"].max() + 1):
                pieces.append(row["tokens"][row["segments"] == segment].tolist())
        pieces = [p for p in pieces if len(p) > 1]
        nats = -np.array(scoring.causal_logprobs(model.run.module, model.run.params, pieces, context + 1))
        count = np.array([len(p) - 1 for p in pieces])
        size = np.array([lengths[p[1:]].sum() for p in pieces])
        bits = nats / np.log(2)
        figures.append(Figure(suite, "loss", nats.sum() / count.sum(), ratio_interval(nats, count), len(pieces)))
        figures.append(Figure(suite, "bits_per_byte", bits.sum() / size.sum(), ratio_interval(bits, size), len(pieces)))
    return figures
