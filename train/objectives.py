"""Objectives: what an example is, and what the loss asks for. GPT and BERT part here and in model/mask.py.

causal   every token asks for the next one      the decoder's mask hides what comes after
masked   hidden tokens ask for themselves       the encoder's mask hides nothing
hybrid   some rows as causal; in the others a hidden token is asked for one place before it, and nothing is out of sight
pairs    as causal, after a source              the decoder sees all of what the encoder made of it
spans    as pairs, with hidden spans of a text for targets
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bothways.config import ObjectiveConfig
from bothways.data import examples, pairs
from bothways.data.pipeline import ExampleFn, RowSource
from bothways.data.tokenizer import Vocabulary
from bothways.data.tokens import Rows, Tokens
from bothways.errors import InputError
from bothways.model.loss import TokenLoss, cross_entropy

Batch = dict[str, jax.Array]
Sums = dict[str, TokenLoss]


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss is the sum over terms of (sum of nats) / (sum of weights), each division made once, globally.

    Args:
      source: tokens, row length, whether a last short row counts -> rows, and the pure function (rows, draws) ->
        model inputs, in numpy.
      weights: batch -> weight of every term; a function of the batch alone.
      terms: bound module, batch, deterministic -> sums of every term.
    """

    source: Callable[[Tokens, int, bool], tuple[RowSource, ExampleFn]]
    weights: Callable[[Batch], dict[str, jax.Array]]
    terms: Callable[[Any, Batch, bool], Sums]


def causal(cfg: ObjectiveConfig, vocabulary: Vocabulary, separate: bool) -> Objective:
    """Next-token prediction: the objective of GPT (GPT-1, section 3.1)."""

    def source(tokens: Tokens, length: int, padded: bool) -> tuple[RowSource, ExampleFn]:
        return Rows(tokens, length, vocabulary.pad, separate, padded), examples.causal

    def weights(batch: Batch) -> dict[str, jax.Array]:
        return {"nll": jnp.sum(batch["weights"])}

    def terms(module: Any, batch: Batch, deterministic: bool) -> Sums:
        # Where documents are not kept apart only padding has a segment of its own; it stands last, where causality hides
        # it from all that counts, and a kernel that knows nothing but causality can be taken.
        segments = batch["segments"] if separate else None
        features, _ = module(batch["tokens"], batch["positions"], segments, deterministic=deterministic)
        smoothing = 0.0 if deterministic else cfg.label_smoothing
        return {"nll": cross_entropy(features, *module.unembedding(), batch["targets"], batch["weights"], smoothing)}

    return Objective(source, weights, terms)


def masked(cfg: ObjectiveConfig, vocabulary: Vocabulary, separate: bool) -> Objective:
    """Masked language modelling, and next-sentence prediction where the recipe asks for it (arXiv 1810.04805, 3.1)."""
    masking = examples.Masking(cfg.mask_rate, cfg.mask_token_prob, cfg.random_token_prob, cfg.whole_words)

    def source(tokens: Tokens, length: int, padded: bool) -> tuple[RowSource, ExampleFn]:
        pairs = {"pairs": cfg.next_sentence, "separate": separate, "padded": padded}
        return examples.masked_source(tokens, length, vocabulary, masking, **pairs)

    def weights(batch: Batch) -> dict[str, jax.Array]:
        mlm = {"mlm": jnp.sum(batch["weights"])}
        return mlm | ({"nsp": jnp.sum(batch["pair_weight"])} if cfg.next_sentence else {})

    def terms(module: Any, batch: Batch, deterministic: bool) -> Sums:
        features = module(batch["tokens"], batch["positions"], batch["segments"], batch.get("types"), deterministic)
        asked = jnp.take_along_axis(
            features, batch["mask_positions"][..., None], axis=1
        )  # only these meet the vocabulary
        smoothing = 0.0 if deterministic else cfg.label_smoothing
        hidden = module.transform(asked)
        sums = {"mlm": cross_entropy(hidden, *module.unembedding(), batch["targets"], batch["weights"], smoothing)}
        if cfg.next_sentence:
            sums["nsp"] = class_loss(module.next_sentence(features), batch["random_next"], batch["pair_weight"])
        return sums

    return Objective(source, weights, terms)


def after_source(cfg: ObjectiveConfig, vocabulary: Vocabulary, separate: bool) -> Objective:
    """Next-token prediction of a target behind its source (arXiv 1706.03762); the source is a text's other language,
    or the text with spans hidden (arXiv 1910.10683, section 3.1.4)."""

    def source(tokens: Tokens, length: int, padded: bool) -> tuple[RowSource, ExampleFn]:
        if cfg.kind == "pairs":
            return pairs.PackedPairs(tokens, length, vocabulary), examples.as_is
        rows = pairs.Spans(tokens, length, vocabulary, cfg.mask_rate, cfg.span_length, padded)
        return rows, functools.partial(pairs.corrupted, source=rows)

    def weights(batch: Batch) -> dict[str, jax.Array]:
        return {"nll": jnp.sum(batch["weights"])}

    def terms(module: Any, batch: Batch, deterministic: bool) -> Sums:
        names = ("tokens", "source", "positions", "segments", "source_positions", "source_segments")
        features = module(*(batch[name] for name in names), deterministic)
        smoothing = 0.0 if deterministic else cfg.label_smoothing
        return {"nll": cross_entropy(features, *module.unembedding(), batch["targets"], batch["weights"], smoothing)}

    return Objective(source, weights, terms)


def hybrid(cfg: ObjectiveConfig, vocabulary: Vocabulary, separate: bool) -> Objective:
    """Next tokens in some rows, masked next tokens in the others, one decoder for both (arXiv 2410.24159, section 2).

    Each row weighs the same in expectation: a masked row asks for `mask_rate` of its tokens, each with 1 / mask_rate.
    """
    masking = examples.Masking(cfg.mask_rate, cfg.mask_token_prob, cfg.random_token_prob, cfg.whole_words)

    def source(tokens: Tokens, length: int, padded: bool) -> tuple[RowSource, ExampleFn]:
        return Rows(tokens, length, vocabulary.pad, separate, padded), functools.partial(
            examples.hybrid, vocabulary=vocabulary, masking=masking, causal_share=cfg.causal_share
        )

    def weights(batch: Batch) -> dict[str, jax.Array]:
        return {"hybrid": jnp.sum(batch["weights"])}

    def terms(module: Any, batch: Batch, deterministic: bool) -> Sums:
        inputs = (batch[k] for k in ("tokens", "positions", "segments", "prefix"))
        features, _ = module(*inputs, deterministic=deterministic)
        smoothing = 0.0 if deterministic else cfg.label_smoothing
        return {"hybrid": cross_entropy(features, *module.unembedding(), batch["targets"], batch["weights"], smoothing)}

    return Objective(source, weights, terms)


def class_loss(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> TokenLoss:
    """Cross-entropy over a few classes: logits [B, C], labels [B], weights [B]."""
    nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]
    return TokenLoss(jnp.sum(weights * nats), jnp.sum(weights * (jnp.argmax(logits, axis=1) == labels)))


OBJECTIVES: dict[str, Callable[[ObjectiveConfig, Vocabulary, bool], Objective]] = {
    "causal": causal,
    "masked": masked,
    "hybrid": hybrid,
    "pairs": after_source,
    "spans": after_source,
}


def make_objective(cfg: ObjectiveConfig, vocabulary: Vocabulary, separate: bool = True) -> Objective:
    """The objective of a configuration; `separate` keeps documents in one row from seeing each other.

    Raises:
      InputError: it hides tokens, and the vocabulary has no mask to hide them with.
    """
    if vocabulary.mask is None and cfg.kind in ("masked", "hybrid", "spans"):
        raise InputError(
            f"objective.kind={cfg.kind} hides tokens behind a mask, and this tokenizer has no mask token; take another "
            "with --data.tokenizer, or another --objective.kind"
        )
    return OBJECTIVES[cfg.kind](cfg, vocabulary, separate)
