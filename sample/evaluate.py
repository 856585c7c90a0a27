"""Figures of a run on held-out text, each with its interval."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from common.errors import InputError
from data import corpora, examples, pipeline, tokens
from data.tokens import Tokens
from sample import score as scoring
from sample.hybrid import HybridModel
from sample.masked import MaskedModel, hidden_logprobs, next_sentence_right
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


def ratio(suite: str, metric: str, above: np.ndarray, below: np.ndarray) -> Figure:
    return Figure(suite, metric, float(above.sum() / below.sum()), ratio_interval(above, below), len(above))


def evaluate(model: TextModel | MaskedModel, suites: Sequence[str]) -> list[Figure]:
    """Figures on splits of the run's own corpus.

    Of a causal run: loss (nats per token) and bits_per_byte. Of a masked run: mlm, the loss at hidden places;
    unigram, what knowing only how often each token occurs in training gives at the same places; nsp_accuracy; and
    bits_per_byte by the diffusion bound, which shares its scale with a causal run's (see MaskedModel.score).
    Of a hybrid run: both, those of its reading both ways with `both_ways_` before their names.

    Raises:
      InputError: no such suite, or a corpus that cannot be read.
    """
    for suite in suites:
        if suite not in SUITES:
            raise InputError(f"no suite {suite!r}; there are {', '.join(SUITES)}")
    cfg = model.recipe.data
    corpus = corpora.load(cfg)
    train = tokens.prepare(corpus, "train", model.tokenizer, cfg.cache)
    figures = []
    for suite in suites:
        held = tokens.prepare(corpus, suite, model.tokenizer, cfg.cache)
        figures += (
            masked_figures(model, suite, held, train)
            if isinstance(model, MaskedModel)
            else causal_figures(model, suite, held)
        )
        if isinstance(model, HybridModel):
            both = masked_figures(model.both_ways, suite, held, train)
            figures += [dataclasses.replace(f, metric=f"both_ways_{f.metric}") for f in both]
    return figures


def causal_figures(model: TextModel, suite: str, held: Tokens) -> list[Figure]:
    cfg, context, lengths = model.recipe.data, model.recipe.model.context, model.tokenizer.byte_lengths()
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
    return [ratio(suite, "loss", nats, count), ratio(suite, "bits_per_byte", bits, size)]


def masked_figures(model: MaskedModel, suite: str, held: Tokens, train: Tokens, bound_rows: int = 64) -> list[Figure]:
    recipe, vocabulary, context = model.recipe, model.vocabulary, model.context
    ask = recipe.objective
    masking = examples.Masking(ask.mask_rate, ask.mask_share, ask.random_share, ask.whole_words)
    rows, example = examples.masked_source(
        held, context, vocabulary, masking, pairs=ask.next_sentence, separate=recipe.data.separate_documents, padded=True
    )
    counts = np.bincount(train.ids, minlength=len(model.tokenizer)) + 1.0
    unigram = np.log(counts / counts.sum())
    nats, guess, asked, right = [], [], [], []
    for batch in pipeline.evaluation_batches(rows, example, batch_size=32, seed=recipe.train.seed):
        real = batch["weights"].sum(axis=1) > 0
        logprobs = np.asarray(hidden_logprobs(model.run.module, model.run.params, batch))
        nats += (-logprobs * batch["weights"]).sum(axis=1)[real].tolist()
        guess += (-unigram[batch["targets"]] * batch["weights"]).sum(axis=1)[real].tolist()
        asked += batch["weights"].sum(axis=1)[real].tolist()
        if ask.next_sentence:
            right += np.asarray(next_sentence_right(model.run.module, model.run.params, batch))[real].tolist()
    weights = np.array(asked)
    figures = [ratio(suite, "mlm", np.array(nats), weights), ratio(suite, "unigram", np.array(guess), weights)]
    if ask.next_sentence:
        figures.append(ratio(suite, "nsp_accuracy", np.array(right, float), np.ones(len(right))))
    plain = np.asarray(held.ids)[~vocabulary.special[np.asarray(held.ids)]]
    room = context - 2
    begins = np.linspace(0, max(0, len(plain) - room), min(bound_rows, -(-len(plain) // room))).astype(int)
    pieces = [plain[b : b + room].tolist() for b in begins]
    bits = -model.score_tokens(pieces, "bound") / np.log(2)
    lengths = model.tokenizer.byte_lengths()
    return [*figures, ratio(suite, "bits_per_byte", bits, np.array([lengths[p].sum() for p in pieces]))]
