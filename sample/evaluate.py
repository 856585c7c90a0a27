"""Figures of a run on held-out text, each with its interval."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from bothways import rundir
from bothways.data import examples, mixture, pairs, pipeline, tokens
from bothways.data.corpora import Corpus
from bothways.data.metrics import Ratio
from bothways.data.tokens import Tokens
from bothways.errors import InputError
from bothways.sample import score as scoring
from bothways.sample.batching import READ_AHEAD, rows_that_fit
from bothways.sample.diffusion import DiffusionModel
from bothways.sample.hybrid import HybridModel
from bothways.sample.masked import MaskedModel, hidden_logprobs, next_sentence_right
from bothways.sample.text import TextModel

T = TypeVar("T")

SUITES = ("validation", "test")
MOST_PAIRS = 4096
"""Pairs of a split that are translated, by default."""
BOUND_ROWS = 64
"""Rows whose bound is estimated: each takes many forward passes."""
UNIGRAM_TOKENS = 2**24
"""Tokens of training text that `unigram` counts."""


@dataclasses.dataclass(frozen=True)
class Metric:
    suite: str
    metric: str
    value: float
    interval: tuple[float, float]
    """95 %, by resampling what `resampled` says."""
    n: int
    """How many of those there are."""
    resampled: str
    """rows of text, pairs, or items of a task: what the interval takes to be drawn at random."""


class Ratios:
    """Figures that are ratios of sums over rows, by name."""

    def __init__(self, resampled: str = "rows"):
        self.resampled, self.of = resampled, dict[str, Ratio]()

    def add(self, name: str, above: np.ndarray, below: np.ndarray) -> None:
        self.of.setdefault(name, Ratio()).add(above, below)

    def metrics(self, suite: str) -> list[Metric]:
        """
        Raises:
          InputError: nothing was counted.
        """
        if not self.of or not all(ratio.below > 0 for ratio in self.of.values()):
            raise InputError(f"the {suite} split has no token that the model predicts: give more text")
        of = self.of.items()
        return [Metric(suite, name, r.value, r.interval(), r.n, self.resampled) for name, r in of]


def evaluate(
    model: TextModel | MaskedModel, suites: Sequence[str], log: Callable[[str], None] = lambda _: None, limit: int = 0
) -> list[Metric]:
    """Figures on splits of the run's own corpus, in memory that does not depend on their size.

    Of a causal run: loss (nats per token) and bits_per_byte. Of a masked run: mlm, the loss at masked positions;
    unigram, what knowing only how often each token occurs in training gives there; nsp_accuracy; and
    bits_per_byte by the diffusion bound, which shares its scale with a causal run's (see MaskedModel.score).
    Of a decoder trained by diffusion: bits_per_byte by the bound, for each of its block sizes; exact at 1.
    Of a run trained on conversations: loss and bits_per_byte of the answers alone (of diffusion, the bound).
    Of a hybrid run: both, the bidirectional ones with `both_ways_` before their names.

    Of an encoder-decoder: loss and bits_per_byte of targets given their sources; of pairs also bleu and chrf of its
    translations (beam 4, length penalty 0.6), beside copy_bleu and copy_chrf, those of the sources themselves.

    Of a mixture, every figure of each corpus, of the suite SUITE/NAME, and their mean by the shares of the last phase.

    Args:
      log: gets what else a reader of the figures should know, such as sacrebleu's signatures.
      limit: at most so many rows or pairs of a split, spread evenly; 0: all rows, and at most MOST_PAIRS pairs. A bound on
        running text uses at most BOUND_ROWS pieces.

    Raises:
      InputError: no such suite, a corpus that cannot be read, or nothing in it that the model predicts.
    """
    for suite in suites:
        if suite not in SUITES:
            raise InputError(f"no suite {suite!r}; there are {', '.join(SUITES)}")
    cfg = model.recipe.data
    text = mixture.load(cfg)
    if not rundir.trained_on(model.run.home, text.fingerprint, *text.earlier):
        log(f"{cfg.named} is no longer the text that {model.run.home} was trained on: it may have seen what is held out")
    figures = []
    for suite in suites:
        of = [figures_of(model, suite, corpus, log, limit) for corpus in text.corpora]
        figures += of[0] if len(of) == 1 else weighted(of, shares_of(model, text))
        if len(of) > 1:
            named = zip(text.names, of, strict=True)
            figures += [dataclasses.replace(f, suite=f"{suite}/{name}") for name, each in named for f in each]
    return figures


def figures_of(
    model: TextModel | MaskedModel, suite: str, corpus: Corpus, log: Callable[[str], None], limit: int
) -> list[Metric]:
    """The figures of a split of one corpus, as `evaluate` has them."""
    if model.recipe.objective.kind == "pairs":
        return pair_figures(model, suite, corpus, log, limit)
    cache = model.recipe.data.cache
    train = functools.partial(tokens.prepare, corpus, "train", model.tokenizer, cache)  # for masked runs alone
    held = tokens.prepare(corpus, suite, model.tokenizer, cache)
    if held.scored is not None:
        return conversation_figures(model, suite, held, limit)
    if isinstance(model, MaskedModel):
        return masked_figures(model, suite, held, train(), limit)
    if isinstance(model, DiffusionModel):
        return diffusion_figures(model, suite, held, limit)
    if model.recipe.objective.kind == "spans":
        return span_figures(model, suite, held, limit)
    figures = causal_figures(model, suite, held, limit)
    if isinstance(model, HybridModel):
        both = masked_figures(model.both_ways, suite, held, train(), limit)
        figures += [dataclasses.replace(f, metric=f"both_ways_{f.metric}") for f in both]
    return figures


def shares_of(model: TextModel | MaskedModel, text: mixture.Text) -> list[float]:
    """The shares of the corpora in the last phase of training."""
    sizes = [1] * len(text.corpora)
    if any(part.in_epochs for part in text.parts):
        sizes = [len(t.ids) for t in text.prepare("train", model.tokenizer, model.recipe.data.cache)]
    return text.shares(sizes, last=True)


def weighted(of: Sequence[Sequence[Metric]], shares: Sequence[float]) -> list[Metric]:
    """The mean over corpora of each figure but those of translations, by shares. Its interval is of independent corpora:
    shares of half-widths add up in squares (Zou and Donner 2008, "Construction of confidence limits", section 2)."""
    found = []
    for same in zip(*of, strict=True):
        if same[0].resampled == "pairs" and same[0].metric not in ("loss", "bits_per_byte"):
            continue
        value = sum(share * f.value for share, f in zip(shares, same, strict=True))
        low, high = (
            sum((share * (f.interval[side] - f.value)) ** 2 for share, f in zip(shares, same, strict=True)) ** 0.5
            for side in (0, 1)
        )
        n = sum(f.n for f in same)
        found.append(dataclasses.replace(same[0], value=value, interval=(value - low, value + high), n=n))
    return found


def spread(items: Iterable[T], limit: int) -> list[T]:
    """At most `limit` items of a stream of unknown length, evenly spread, holding twice as many at most.

    >>> spread(range(10), 3)
    [0, 4, 8]
    """
    kept, stride = [], 1
    for i, item in enumerate(items):
        if i % stride == 0:
            kept.append(item)
        if len(kept) == 2 * limit:
            kept, stride = kept[::2], 2 * stride
    return [kept[i] for i in np.linspace(0, len(kept) - 1, min(limit, len(kept))).astype(int)]


def rows_of(model: TextModel | MaskedModel) -> int:
    """Rows of the model's context that are read at a time."""
    return rows_that_fit(model.recipe.model)(model.recipe.model.context_length)


def held_out_pairs(
    model: TextModel,
    suite: str,
    log: Callable[[str], None] = lambda _: None,
    limit: int = 0,
    corpus: Corpus | None = None,
) -> list[tuple[str, str]]:
    """(source, target) of the pairs of a split that fit into the context, at most `limit` (0: MOST_PAIRS), evenly spread,
    those with an empty side left out as in training; of a run that restores spans, of a few sources with masks in them.

    Args:
      corpus: one of the run's; by default all of them, one after the other.
    """
    restores = model.recipe.objective.kind == "spans"
    if restores:
        texts = [
            "To be, or [MASK] to be",
            "",
            "I pray you, [MASK] me the [MASK].",
            "",
            "My [MASK], I am your servant.",
            "",
        ]
    else:
        texts = (text for _, text in (corpus or mixture.load(model.recipe.data)).documents(suite))
    texts, context, limit, count = iter(texts), model.recipe.model.context_length, limit or MOST_PAIRS, [0, 0]

    tokenizer, writes = model.tokenizer, model.tokenizer.of_targets
    around, starts = sum(map(len, tokenizer.around_source())), len(tokenizer.target_start)

    def fitting() -> Iterator[tuple[str, str]]:
        for pair in zip(texts, texts, strict=True):
            source, target = len(tokenizer.encode(pair[0])), len(writes.encode(pair[1]))
            if not source or not (target or restores):
                continue
            count[0] += 1
            # The decoder reads all of a target but the token that ends it.
            if max(source + around, target + starts) <= context:
                count[1] += 1
                yield pair

    found = spread(fitting(), limit)
    if count[1] < count[0]:
        log(f"{count[0] - count[1]} of {count[0]} pairs are longer than the context of {context} and left out")
    if len(found) < count[1]:
        log(f"{len(found)} of {count[1]} pairs are evaluated, evenly spread")
    return found


def pair_figures(model: TextModel, suite: str, corpus: Corpus, log: Callable[[str], None], limit: int) -> list[Metric]:
    from sacrebleu.metrics import BLEU, CHRF

    fitting = held_out_pairs(model, suite, log, limit, corpus)
    if not fitting:
        raise InputError(
            f"no pair of the {suite} split fits into model.context_length={model.recipe.model.context_length} tokens"
        )
    sources, targets = (list(side) for side in zip(*fitting, strict=True))
    logprobs, tokens_of = model.score_pairs(fitting)
    nats, count = -np.array(logprobs), np.array(tokens_of)
    size = np.array([len(target.encode()) for target in targets])
    ratios = Ratios("pairs")
    ratios.add("loss", nats, count)
    ratios.add("bits_per_byte", nats / np.log(2), size)
    figures = ratios.metrics(suite)
    translations = [sample.text for sample in model.sample(sources, beams=4, length_penalty=0.6)]
    for metric, scorer in (("bleu", BLEU()), ("chrf", CHRF())):
        for name, texts in ((metric, translations), (f"copy_{metric}", sources)):
            score = scorer.corpus_score(texts, [targets], n_bootstrap=1000)
            interval = (score._mean - score._ci, score._mean + score._ci)
            figures.append(Metric(suite, name, score.score, interval, len(targets), "pairs"))
        log(f"{metric}: {scorer.get_signature()}")
    return figures


def span_figures(model: TextModel, suite: str, held: Tokens, limit: int) -> list[Metric]:
    recipe, lengths, ratios = model.recipe, model.tokenizer.byte_lengths(), Ratios()
    ask, context = recipe.objective, recipe.model.context_length
    rows = pairs.Spans(held, context, model.tokenizer.vocabulary(), ask.mask_rate, ask.span_length, padded=True)
    example = functools.partial(pairs.corrupted, source=rows)
    batches = {"batch_size": rows_of(model), "seed": recipe.train.seed, "limit": limit}
    for batch in pipeline.evaluation_batches(rows, example, **batches):
        real = batch["weights"].sum(axis=1) > 0
        nats = -np.asarray(scoring.pair_logprobs(model.run.module, model.run.params, batch))[real]
        ratios.add("loss", nats, batch["weights"].sum(axis=1)[real])
        ratios.add("bits_per_byte", nats / np.log(2), (lengths[batch["targets"]] * batch["weights"]).sum(axis=1)[real])
    return ratios.metrics(suite)


def causal_figures(model: TextModel, suite: str, held: Tokens, limit: int) -> list[Metric]:
    cfg, context, lengths = model.recipe.data, model.recipe.model.context_length, model.tokenizer.byte_lengths()
    rows, ratios = tokens.Rows(held, context, model.tokenizer.pad, cfg.separate_documents, padded=True), Ratios()
    at_once = max(1, READ_AHEAD // context)
    for batch in pipeline.evaluation_batches(rows, examples.as_is, batch_size=at_once, seed=0, limit=limit):
        pieces = []
        for ids, segments in zip(batch["tokens"], batch["segments"], strict=True):
            for segment in range(1, segments.max() + 1):  # one document's part: nothing sees another document
                pieces.append(ids[segments == segment].tolist())
        pieces = [p for p in pieces if len(p) > 1]
        nats = -np.array(scoring.causal_logprobs(model.run.module, model.run.params, pieces, context + 1))
        ratios.add("loss", nats, np.array([len(p) - 1 for p in pieces]))
        ratios.add("bits_per_byte", nats / np.log(2), np.array([lengths[p[1:]].sum() for p in pieces]))
    return ratios.metrics(suite)


def conversation_figures(model: TextModel | MaskedModel, suite: str, held: Tokens, limit: int) -> list[Metric]:
    """Of answers, given all that is said before them; resampled by conversation."""
    context, lengths, ratios = model.recipe.model.context_length, model.tokenizer.byte_lengths(), Ratios("conversations")
    starts, at_once = np.append(held.starts, len(held.ids)), max(1, READ_AHEAD // context)
    chosen = np.linspace(0, len(held.starts) - 1, min(limit or len(held.starts), len(held.starts))).astype(int)
    for i in range(0, len(chosen), at_once):
        rows, first, sizes, of = [], [], [], []
        for one in chosen[i : i + at_once]:
            ids, scored = (x[starts[one] : starts[one + 1]][:context] for x in (held.ids, held.scored))
            edges = np.flatnonzero(np.diff(np.concatenate([[0], scored, [0]])))
            for begin, end in zip(np.maximum(edges[::2], 1).tolist(), edges[1::2].tolist(), strict=True):
                rows.append(ids[:end].tolist())
                first.append(begin)
                sizes.append((end - begin, lengths[ids[begin:end]].sum()))
                of.append(one)
        if not rows:
            continue
        number = np.unique(of, return_inverse=True)[1]
        tokens_of, bytes_of = (np.bincount(number, side) for side in zip(*sizes, strict=True))
        for block, logprobs in answer_logprobs(model, rows, first).items():
            nats = -np.bincount(number, np.asarray(logprobs))
            ratios.add(f"loss{block}", nats, tokens_of)
            ratios.add(f"bits_per_byte{block}", nats / np.log(2), bytes_of)
    if not ratios.of:
        raise InputError(f"no answer of the {suite} split begins within model.context_length={context} tokens")
    return ratios.metrics(suite)


def answer_logprobs(
    model: TextModel | MaskedModel, rows: list[list[int]], first: list[int]
) -> dict[str, Sequence[float] | np.ndarray]:
    """What is behind the names of figures -> [rows] log p(tokens `first` .. | those before them), in nats, or a bound on it:
    several where a model was trained on blocks of several sizes."""
    if isinstance(model, DiffusionModel):
        found = {f"_block_{b or 'row'}": model.bound_rows(rows, first, 16, b) for b in sorted(set(model.block_sizes))}
        return found if len(found) > 1 else {"": next(iter(found.values()))}
    if isinstance(model, MaskedModel):
        return {"": model.bound_rows(rows, first, 16)}
    context = model.recipe.model.context_length
    return {"": scoring.causal_logprobs(model.run.module, model.run.params, rows, context, first=first)}


def unigram_logprobs(ids: np.ndarray, size: int, most: int = UNIGRAM_TOKENS) -> np.ndarray:
    """[size] log-probability of every token by how often it occurs, once more than counted, in at most `most` ids, in blocks
    evenly spread."""
    block = min(2**16, most)
    begins = np.unique(np.linspace(0, max(0, len(ids) - block), min(most // block, -(-len(ids) // block))).astype(int))
    counts = np.ones(size)
    for begin in begins:
        counts += np.bincount(ids[begin : begin + block], minlength=size)
    return np.log(counts / counts.sum())


def masked_figures(model: MaskedModel, suite: str, held: Tokens, train: Tokens, limit: int) -> list[Metric]:
    recipe, vocabulary, context = model.recipe, model.vocabulary, model.context_length
    ask, ratios = recipe.objective, Ratios()
    masking = examples.Masking(ask.mask_rate, ask.mask_token_prob, ask.random_token_prob, ask.whole_words)
    rows, example = examples.masked_source(
        held, context, vocabulary, masking, pairs=ask.next_sentence, separate=recipe.data.separate_documents, padded=True
    )
    unigram = unigram_logprobs(train.ids, len(model.tokenizer))
    batches = {"batch_size": rows_of(model), "seed": recipe.train.seed, "limit": limit}
    for batch in pipeline.evaluation_batches(rows, example, **batches):
        weights = batch["weights"].sum(axis=1)
        real = weights > 0
        logprobs = np.asarray(hidden_logprobs(model.run.module, model.run.params, batch))
        for name, by_token in (("mlm", logprobs), ("unigram", unigram[batch["targets"]])):
            ratios.add(name, -(by_token * batch["weights"]).sum(axis=1)[real], weights[real])
        if ask.next_sentence:
            right = np.asarray(next_sentence_right(model.run.module, model.run.params, batch))[real]
            ratios.add("nsp_accuracy", right, np.ones(len(right)))
    pieces = held_pieces(held, vocabulary.special, context - 1 - len(model.closing), limit)
    lengths = model.tokenizer.byte_lengths()
    bits = -model.score_tokens(pieces, "bound") / np.log(2)
    ratios.add("bits_per_byte", bits, np.array([lengths[p].sum() for p in pieces]))
    return ratios.metrics(suite)


def held_pieces(held: Tokens, special: np.ndarray, room: int, limit: int) -> list[list[int]]:
    """At most `limit` pieces of running text (0: BOUND_ROWS), of up to `room` tokens each, spread evenly over a split."""
    ids = held.ids
    count = min(limit or BOUND_ROWS, BOUND_ROWS, -(-len(ids) // room))
    begins = np.linspace(0, max(0, len(ids) - room), count).astype(int)
    pieces = (row[~special[row]].tolist() for row in (ids[b : b + room] for b in begins))
    return [piece for piece in pieces if piece]


def diffusion_figures(model: DiffusionModel, suite: str, held: Tokens, limit: int, draws: int = 16) -> list[Metric]:
    special, ratios = model.tokenizer.vocabulary().special, Ratios()
    pieces = held_pieces(held, special, model.recipe.model.context_length - 1, limit)
    lengths = model.tokenizer.byte_lengths()
    rows, size = [[model.tokenizer.bos, *p] for p in pieces], np.array([lengths[p].sum() for p in pieces])
    for block in sorted(set(model.block_sizes), key=lambda b: b or model.recipe.model.context_length):
        name = "bits_per_byte" if len(set(model.block_sizes)) == 1 else f"bits_per_byte_block_{block or 'row'}"
        ratios.add(name, -model.bound_rows(rows, None, draws, block) / np.log(2), size)
    return ratios.metrics(suite)
