"""What an objective is: a source of examples, and sums and weights of every term of the loss."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bothways.config import ObjectiveConfig
from bothways.data.pipeline import ExampleFn, RowSource
from bothways.data.tokenizer import Vocabulary
from bothways.data.tokens import Tokens
from bothways.embedding import EmbeddingInfo
from bothways.model.loss import TokenLoss, cross_entropy
from bothways.recipes import Recipe

Batch = dict[str, jax.Array]
Sums = dict[str, TokenLoss]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What an objective must know beside its own configuration.

    Args:
      separate: documents packed into one row do not see each other.
      predicts: which token an output predicts, `next` or `own` (model/config.py).
    """

    vocabulary: Vocabulary
    separate: bool = True
    predicts: str = "next"


@dataclasses.dataclass(frozen=True)
class Halves:
    """`terms` in two parts, where rows meet only after the model: what each row gives, and the loss over all of them.

    Args:
      encode: bound module, batch, deterministic -> [B, ...] of each row, by itself.
      compare: that of the whole batch, and the batch -> sums of every term.
    """

    encode: Callable[[Any, Batch, bool], jax.Array]
    compare: Callable[[jax.Array, Batch], Sums]


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss is the sum over terms of (sum of nats) / (sum of weights), each division made once, globally.

    Args:
      source: tokens, row length, whether a last short row counts -> rows, and the pure function (rows, draws) ->
        model inputs, in numpy.
      weights: batch -> weight of every term; a function of the batch alone.
      terms: bound module, batch, deterministic -> sums of every term.
      halves: `terms` in two parts, where a row's loss depends on the other rows.
      embedding: how a run of this recipe makes vectors of texts, where it is trained for that.
      likelihood: the term that is the negative log-likelihood of the text or a bound on it, of which bits per byte are made.
    """

    source: Callable[[Tokens, int, bool], tuple[RowSource, ExampleFn]]
    weights: Callable[[Batch], dict[str, jax.Array]]
    terms: Callable[[Any, Batch, bool], Sums]
    halves: Halves | None = None
    embedding: Callable[[Recipe], EmbeddingInfo] | None = None
    likelihood: str = ""


def token_loss(module: Any, features: jax.Array, batch: Batch, cfg: ObjectiveConfig, deterministic: bool) -> TokenLoss:
    """Cross-entropy of the batch's targets, by features [B, T, D] of the outputs that predict them; labels are smoothed in training only."""
    smoothing = 0.0 if deterministic else cfg.label_smoothing
    return cross_entropy(module.transform(features), *module.unembedding(), batch["targets"], batch["weights"], smoothing)


def class_loss(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> TokenLoss:
    """Cross-entropy over a few classes: logits [B, C], labels [B], weights [B]."""
    nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]
    return TokenLoss(jnp.sum(weights * nats), jnp.sum(weights * (jnp.argmax(logits, axis=1) == labels)))
