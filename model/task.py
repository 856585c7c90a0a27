"""A trained body with a new head: classify, regress, tag tokens, mark a span, choose."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from bothways.model.bert import BERT
from bothways.model.block import ACTIVATIONS
from bothways.model.config import TransformerConfig
from bothways.model.dropout import Dropout
from bothways.model.gpt import GPT
from bothways.model.layers import Norm, Projection

Kind = Literal["classify", "regress", "multilabel", "tag", "span", "choice"]
Pool = Literal["token", "mean", "late"]
Hidden = Literal["", "tanh", "relu", "gelu"]


def mean_over(features: Float[jax.Array, "B T D"], segments: Int[jax.Array, "B T"]) -> Float[jax.Array, "B D"]:
    """The mean of the features of every token that is no padding."""
    real = (segments > 0)[..., None]
    return jnp.sum(features * real, axis=1) / jnp.maximum(jnp.sum(real, axis=1), 1)


def text_vectors(
    features: Float[jax.Array, "B T D"],
    segments: Int[jax.Array, "B T"],
    pool: Literal["mean", "cls", "last"],
    texts: int = 1,
) -> Float[jax.Array, "B N D"]:
    """A vector for each text of a row, segments 1 to N = `texts`: features of its first token (cls) or its last, or the mean
    over it; zeros for a segment that is not there."""
    mine = segments[:, None, :] == jnp.arange(1, texts + 1)[:, None]
    if pool == "mean":
        count = jnp.maximum(jnp.sum(mine, axis=-1, keepdims=True), 1)
        return jnp.einsum("bnt,btd->bnd", mine.astype(features.dtype), features, precision="highest") / count
    T = features.shape[1]
    at = jnp.argmax(mine, axis=-1) if pool == "cls" else T - 1 - jnp.argmax(mine[..., ::-1], axis=-1)
    return jnp.where(mine.any(axis=-1, keepdims=True), jnp.take_along_axis(features, at[..., None], axis=1), 0)


class TaskHead(nn.Module):
    """Dropout and one linear layer, float32; before them a dense layer and a norm, where published heads have them."""

    cfg: TransformerConfig
    outputs: int
    dropout: float
    hidden: Hidden = ""
    """The dense layer's activation: tanh (RoBERTa), relu (DistilBERT), gelu (ELECTRA, ModernBERT). Empty: no such layer."""
    hidden_bias: bool | None = None
    """Whether the dense layer has a bias; None: as the body's projections."""
    hidden_norm: bool = False

    @nn.compact
    def __call__(self, x: Float[jax.Array, "... D"], deterministic: bool) -> Float[jax.Array, "... O"]:
        x = x.astype(jnp.float32)
        if self.hidden:
            x = Projection(self.cfg, (x.shape[-1],), bias=self.hidden_bias, name="dense")(x)
            x = jnp.tanh(x) if self.hidden == "tanh" else ACTIVATIONS[self.hidden](x)
        if self.hidden_norm:
            x = Norm(self.cfg, name="norm")(x)
        x = Dropout(self.dropout, deterministic=deterministic)(x)
        kernel = self.param("kernel", nn.initializers.normal(0.02), (x.shape[-1], self.outputs), jnp.float32)
        return x @ kernel + self.param("bias", nn.initializers.zeros, (self.outputs,), jnp.float32)


class TaskModel(nn.Module):
    """A GPT or BERT under a task head (arXiv 1810.04805, section 3.2; GPT-1, section 3.2).

    classify, multilabel, regress and choice read one vector per text: of a BERT the pooler's (or the first token's where
    there is no pooler), of a GPT the last token's features; with pool "mean" the mean over the text, with "late" every
    token's, whose scores are averaged. tag and span read every token's features.
    """

    cfg: TransformerConfig
    family: Literal["gpt", "bert"]
    kind: Kind
    outputs: int
    dropout: float = 0.1
    both_ways: bool = False
    """A GPT that was trained in both directions: every token sees the whole text."""
    pool: Pool = "token"
    hidden: Hidden = ""
    hidden_bias: bool | None = None
    hidden_norm: bool = False

    def setup(self):
        self.body = GPT(self.cfg) if self.family == "gpt" else BERT(self.cfg)
        self.task_head = TaskHead(self.cfg, self.outputs, self.dropout, self.hidden, self.hidden_bias, self.hidden_norm)

    def features(
        self,
        tokens: Int[jax.Array, "B T"],
        segments: Int[jax.Array, "B T"],
        types: Int[jax.Array, "B T"],
        deterministic: bool = True,
    ) -> Float[jax.Array, "B T D"]:
        if self.family == "gpt":
            prefix = jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32) if self.both_ways else None
            return self.body(tokens, segments=segments, prefix=prefix, deterministic=deterministic)[0]
        return self.body(tokens, segments=segments, types=types, deterministic=deterministic)

    def __call__(
        self,
        tokens: Int[jax.Array, "B T"],
        segments: Int[jax.Array, "B T"],
        types: Int[jax.Array, "B T"],
        deterministic: bool = True,
    ) -> Float[jax.Array, "..."]:
        """[B, outputs], or [B, T, outputs] for tag and span."""
        return self.read(self.features(tokens, segments, types, deterministic), segments, deterministic)

    def read(
        self, features: Float[jax.Array, "B T D"], segments: Int[jax.Array, "B T"], deterministic: bool = True
    ) -> Float[jax.Array, "..."]:
        """The head's view of the features."""
        if self.kind in ("tag", "span"):
            return self.task_head(features, deterministic)
        if self.pool == "late":
            return mean_over(self.task_head(features, deterministic), segments)
        if self.pool == "mean":
            summary = mean_over(features, segments)
        elif self.family == "gpt":
            last = jnp.sum(segments > 0, axis=1) - 1
            summary = jnp.take_along_axis(features, last[:, None, None], axis=1)[:, 0]
        else:
            summary = self.body.pooled(features) if self.cfg.pooled else features[:, 0]
        return self.task_head(summary, deterministic)
