"""Figures of a run on held-out text, each with its interval."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from bothways import rundir
from bothways.data import corpora, examples, pairs, pipeline, tokens
from bothways.data.metrics import ratio_interval
from bothways.data.tokens import Tokens
from bothways.errors import InputError
from bothways.sample import score as scoring
from bothways.sample.diffusion import DiffusionModel
from bothways.sample.hybrid import HybridModel
from bothways.sample.masked import MaskedModel, hidden_logprobs, next_sentence_right
from bothways.sample.text import TextModel

SUITES = ("validation", "test")


@dataclasses.dataclass(frozen=True)
class Metric:
    suite: str
    metric: str
    value: float
    interval: tuple[float, float]
    """95 %, by resampling rows."""
    n: int
    """Rows of text."""


def ratio(suite: str, metric: str, above: np.ndarray, below: np.ndarray) -> Metric:
    return Metric(suite, metric, float(above.sum() / below.sum()), ratio_interval(above, below), len(above))


def evaluate(
    model: TextModel | MaskedModel, suites: Sequence[str], log: Callable[[str], None] = lambda _: None
) -> list[Metric]:
    """Figures on splits of the run's own corpus.

    Of a causal run: loss (nats per token) and bits_per_byte. Of a masked run: mlm, the loss at hidden places;
    unigram, what knowing only how often each token occurs in training gives at the same places; nsp_accuracy; and
    bits_per_byte by the diffusion bound, which shares its scale with a causal run's (see MaskedModel.score).
    Of a decoder trained by diffusion: bits_per_byte by the bound, for each of its block sizes; exact at 1.
    Of a hybrid run: both, those of its reading both ways with `both_ways_` before their names.

    Of an encoder-decoder: loss and bits_per_byte of targets given their sources; of pairs also bleu and chrf of its
    translations (beam 4, length penalty 0.6), beside copy_bleu and copy_chrf, those of the sources themselves.

    Args:
      log: told what else a reader of the figures should know, such as sacrebleu's signatures.

    Raises:
      InputError: no such suite, or a corpus that cannot be read.
    """
    for suite in suites:
        if suite not in SUITES:
            raise InputError(f"no suite {suite!r}; there are {', '.join(SUITES)}")
    cfg = model.recipe.data
    corpus = corpora.load(cfg)
    if not rundir.trained_on(model.run.home, corpus.fingerprint, *corpus.earlier):
        log(f"{cfg.corpus} is no longer the text that {model.run.home} was trained on: it may have seen what is held out")
    train = functools.partial(tokens.prepare, corpus, "train", model.tokenizer, cfg.cache)  # for masked runs alone
    figures = []
    for suite in suites:
        if model.recipe.objective.kind == "pairs":
            figures += pair_figures(model, suite, log)
            continue
        held = tokens.prepare(corpus, suite, model.tokenizer, cfg.cache)
        figures += (
            masked_figures(model, suite, held, train())
            if isinstance(model, MaskedModel)
            else diffusion_figures(model, suite, held)
            if isinstance(model, DiffusionModel)
            else span_figures(model, suite, held)
            if model.recipe.objective.kind == "spans"
            else causal_figures(model, suite, held)
        )
        if isinstance(model, HybridModel):
            both = masked_figures(model.both_ways, suite, held, train())
            figures += [dataclasses.replace(f, metric=f"both_ways_{f.metric}") for f in both]
    return figures


def held_out_pairs(model: TextModel, suite: str, log: Callable[[str], None] = lambda _: None) -> list[tuple[str, str]]:
    """(source, target) of every pair of a split that fits into the context; of a run that restores spans, of a few
    sources with masks in them."""
    if model.recipe.objective.kind == "spans":
        texts = [
            "To be, or [MASK] to be",
            "",
            "I pray you, [MASK] me the [MASK].",
            "",
            "My [MASK], I am your servant.",
            "",
        ]
    else:
        texts = [text for _, text in corpora.load(model.recipe.data).documents(suite)]
    found, context = list(zip(texts[::2], texts[1::2], strict=True)), model.recipe.model.context_length
    lengths = [max(len(model.tokenizer.encode(text)) + 1 for text in pair) for pair in found]
    fitting = [pair for pair, length in zip(found, lengths, strict=True) if length <= context]
    if len(fitting) < len(found):
        log(f"{len(found) - len(fitting)} of {len(found)} pairs are longer than the context of {context} and left out")
    return fitting


def pair_figures(model: TextModel, suite: str, log: Callable[[str], None]) -> list[Metric]:
    from sacrebleu.metrics import BLEU, CHRF

    fitting = held_out_pairs(model, suite, log)
    if not fitting:
        raise InputError(
            f"no pair of the {suite} split fits into model.context_length={model.recipe.model.context_length} tokens"
        )
    sources, targets = (list(side) for side in zip(*fitting, strict=True))
    logprobs, tokens_of = model.score_pairs(fitting)
    nats, count = -np.array(logprobs), np.array(tokens_of)
    size = np.array([len(target.encode()) for target in targets])
    figures = [ratio(suite, "loss", nats, count), ratio(suite, "bits_per_byte", nats / np.log(2), size)]
    said = [sample.text for sample in model.sample(sources, beams=4, length_penalty=0.6)]
    for metric, scorer in (("bleu", BLEU()), ("chrf", CHRF())):
        for name, texts in ((metric, said), (f"copy_{metric}", sources)):
            score = scorer.corpus_score(texts, [targets], n_bootstrap=1000)
            interval = (score._mean - score._ci, score._mean + score._ci)
            figures.append(Metric(suite, name, score.score, interval, len(targets)))
        log(f"{metric}: {scorer.get_signature()}")
    return figures


def span_figures(model: TextModel, suite: str, held: Tokens) -> list[Metric]:
    recipe, lengths = model.recipe, model.tokenizer.byte_lengths()
    ask = recipe.objective
    rows = pairs.Spans(
        held, recipe.model.context_length, model.tokenizer.vocabulary(), ask.mask_rate, ask.span_length, padded=True
    )
    example, nats, count, size = functools.partial(pairs.corrupted, source=rows), [], [], []
    for batch in pipeline.evaluation_batches(rows, example, batch_size=32, seed=recipe.train.seed):
        real = batch["weights"].sum(axis=1) > 0
        nats += (-np.asarray(scoring.pair_logprobs(model.run.module, model.run.params, batch)))[real].tolist()
        count += batch["weights"].sum(axis=1)[real].tolist()
        size += (lengths[batch["targets"]] * batch["weights"]).sum(axis=1)[real].tolist()
    nats = np.array(nats)
    return [
        ratio(suite, "loss", nats, np.array(count)),
        ratio(suite, "bits_per_byte", nats / np.log(2), np.array(size)),
    ]


def causal_figures(model: TextModel, suite: str, held: Tokens) -> list[Metric]:
    cfg, context, lengths = model.recipe.data, model.recipe.model.context_length, model.tokenizer.byte_lengths()
    rows = tokens.Rows(held, context, model.tokenizer.pad, cfg.separate_documents, padded=True)
    pieces = []
    for ids, segments in zip(*rows[np.arange(len(rows))].values(), strict=True):
        for segment in range(1, segments.max() + 1):  # one document's part of a row: nothing sees another document
            pieces.append(ids[segments == segment].tolist())
    pieces = [p for p in pieces if len(p) > 1]
    nats = -np.array(scoring.causal_logprobs(model.run.module, model.run.params, pieces, context + 1))
    count = np.array([len(p) - 1 for p in pieces])
    size = np.array([lengths[p[1:]].sum() for p in pieces])
    bits = nats / np.log(2)
    return [ratio(suite, "loss", nats, count), ratio(suite, "bits_per_byte", bits, size)]


def masked_figures(model: MaskedModel, suite: str, held: Tokens, train: Tokens, bound_rows: int = 64) -> list[Metric]:
    recipe, vocabulary, context = model.recipe, model.vocabulary, model.context_length
    ask = recipe.objective
    masking = examples.Masking(ask.mask_rate, ask.mask_token_prob, ask.random_token_prob, ask.whole_words)
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
    pieces = held_pieces(held, vocabulary.special, context - 1 - len(model.closing), bound_rows)
    bits = -model.score_tokens(pieces, "bound") / np.log(2)
    lengths = model.tokenizer.byte_lengths()
    return [*figures, ratio(suite, "bits_per_byte", bits, np.array([lengths[p].sum() for p in pieces]))]


def held_pieces(held: Tokens, special: np.ndarray, room: int, count: int) -> list[list[int]]:
    """At most `count` pieces of running text, of `room` tokens each, spread evenly over a split."""
    plain = np.asarray(held.ids)[~special[np.asarray(held.ids)]]
    begins = np.linspace(0, max(0, len(plain) - room), min(count, -(-len(plain) // room))).astype(int)
    return [plain[b : b + room].tolist() for b in begins]


def diffusion_figures(
    model: DiffusionModel, suite: str, held: Tokens, bound_rows: int = 64, draws: int = 16
) -> list[Metric]:
    special = model.tokenizer.vocabulary().special
    pieces = held_pieces(held, special, model.recipe.model.context_length - 1, bound_rows)
    lengths = model.tokenizer.byte_lengths()
    rows, size = [[model.tokenizer.bos, *p] for p in pieces], np.array([lengths[p].sum() for p in pieces])
    found = []
    for block in sorted(set(model.block_sizes), key=lambda b: b or len(rows[0])):
        name = "bits_per_byte" if len(set(model.block_sizes)) == 1 else f"bits_per_byte_block_{block or 'row'}"
        bits = -model.bound_rows(rows, None, draws, block) / np.log(2)
        found.append(ratio(suite, name, bits, size))
    return found
