"""The loss of a labelled task: a head over a body, and beside it, if wanted, the body's own next-token loss."""

import jax
import jax.numpy as jnp

from bothways.data.examples import as_is
from bothways.model.loss import TokenLoss, cross_entropy
from bothways.model.task import TaskModel
from bothways.train.objectives.core import Batch, Objective, Sums, class_loss

INPUTS = ("tokens", "segments", "types")


def task_objective(kind: str, lm_weight: float = 0.0) -> Objective:
    """The loss of a task, as train/step.py wants it; with lm_weight > 0 a GPT's own loss on the same text beside it
    (GPT-1, section 3.2)."""

    def weights(batch: Batch) -> dict[str, jax.Array]:
        found = {"task": jnp.sum(item_weights(batch))}
        return found | ({"lm": jnp.sum(batch["segments"][..., 1:] > 0).astype(jnp.float32)} if lm_weight else {})

    def terms(module: TaskModel, batch: Batch, deterministic: bool) -> Sums:
        tokens, segments, types = inputs(kind, batch)
        features = module.features(tokens, segments, types, deterministic)
        sums = {"task": task_loss(kind, module.read(features, segments, deterministic), batch)}
        if lm_weight:
            seen = (segments[:, 1:] > 0).astype(jnp.float32)
            before = module.body.transform(features[:, :-1])
            lm = cross_entropy(before, *module.body.unembedding(), tokens[:, 1:], seen)
            sums["lm"] = TokenLoss(lm_weight * lm.nats, lm.correct)
        return sums

    return Objective(lambda *_: (None, as_is), weights, terms)


def inputs(kind: str, batch: Batch) -> list[jax.Array]:
    """Tokens, segments and types [B, T] of a batch; each choice of an item is a row of its own."""
    fold = (lambda x: x.reshape(-1, x.shape[-1])) if kind == "choice" else (lambda x: x)
    return [fold(batch[name]) for name in INPUTS]


def item_weights(batch: Batch) -> jax.Array:
    """How much each item, or word, or label of an item, counts in the loss of a batch."""
    each = batch["weight"]
    return each[:, None] * batch["label_weights"] if "label_weights" in batch else each


def task_loss(kind: str, scores: jax.Array, batch: Batch) -> TokenLoss:
    """Sum of nats (of squares for regress) over the items, or words, of a batch, and how many are right.

    Args:
      scores: the head's, as model.task.TaskModel gives them.
    """
    weight = batch["weight"]
    match kind:
        case "classify":
            return class_loss(scores, batch["label"], weight)
        case "multilabel":  # a decision of its own for each label
            scores, weight, has = scores.astype(jnp.float32), item_weights(batch), batch["labels"] > 0
            nats = jax.nn.softplus(jnp.where(has, -scores, scores))
            return TokenLoss(jnp.sum(weight * nats), jnp.sum(weight * ((scores >= 0) == has)))
        case "choice":
            return class_loss(scores.reshape(batch["label"].shape[0], -1), batch["label"], weight)
        case "regress":
            return TokenLoss(jnp.sum(weight * jnp.square(scores[:, 0] - batch["label"])), jnp.zeros(()))
        case "tag":
            return class_loss(scores.reshape(-1, scores.shape[-1]), batch["label"].reshape(-1), weight.reshape(-1))
    start, end = (
        class_loss(x, batch[k], weight) for x, k in zip(span_scores(scores, batch), ("start", "end"), strict=True)
    )
    return TokenLoss((start.nats + end.nats) / 2, (start.correct + end.correct) / 2)


def span_scores(scores: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Scores [B, T] of each position to be the start and the end; only the document's and that of no answer may be."""
    allowed = (batch["begin_char"] >= 0) | (jnp.arange(scores.shape[1]) == batch["null"][:, None])
    return tuple(jnp.where(allowed, scores[..., i].astype(jnp.float32), -1e30) for i in range(2))
