"""What sits on top of the features: output layers, each a few lines."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from bothways.model.block import ACTIVATIONS
from bothways.model.config import TransformerConfig
from bothways.model.layers import Norm, Projection, soft_cap
from bothways.model.products import table_product


class Unembedding(NamedTuple):
    """An output layer: features to the scores of all tokens."""

    table: Float[jax.Array, "V D"]
    bias: Float[jax.Array, " V"] | None
    """Also what hides the rows that fill up the table."""
    cap: float
    """TransformerConfig.logit_cap."""


class LMHead(nn.Module):
    """What an output layer has of its own: a table, where it is not tied to the token embeddings, and a bias."""

    cfg: TransformerConfig

    def setup(self):
        if not self.cfg.tie_embeddings:
            init = nn.initializers.normal(self.cfg.init_std)
            self.embedding = self.param("embedding", init, (self.cfg.table_rows, self.cfg.narrow), jnp.float32)
        if self.cfg.output_bias:
            self.bias = self.param("bias", nn.initializers.zeros, (self.cfg.table_rows,), jnp.float32)


class OutputTransform(nn.Module):
    """What stands between features and output layer in BERT's MLM head: dense, activation, norm."""

    cfg: TransformerConfig

    def setup(self):
        self.dense = Projection(self.cfg, (self.cfg.narrow,))
        self.norm = Norm(self.cfg)

    def __call__(self, features: Float[jax.Array, "... D"]) -> Float[jax.Array, "... E"]:
        return self.norm(ACTIVATIONS[self.cfg.activation](self.dense(features)))


class MLMTransform(OutputTransform):
    """BERT's MLM head without its tied output layer: the transform, and the output bias [V]."""

    def setup(self):
        super().setup()
        self.bias = self.param("bias", nn.initializers.zeros, (self.cfg.table_rows,), jnp.float32)


class NextSentence(nn.Module):
    """BERT's pooler, tanh of a dense layer on the first token, and, with next_sentence, two classes on top of it."""

    cfg: TransformerConfig

    def setup(self):
        self.pooler = Projection(self.cfg, (self.cfg.d_model,))
        if self.cfg.next_sentence:
            self.classes = Projection(self.cfg, (2,))

    def pool(self, features: Float[jax.Array, "B T D"]) -> Float[jax.Array, "B D"]:
        return jnp.tanh(self.pooler(features[:, 0]))

    def __call__(self, features: Float[jax.Array, "B T D"]) -> Float[jax.Array, "B 2"]:
        return self.classes(self.pool(features)) if self.cfg.next_sentence else self.pool(features)


def mask_padded_vocab(cfg: TransformerConfig, bias: Float[jax.Array, " V"] | None) -> Float[jax.Array, " V"] | None:
    """The output bias with the rows that stand for no token made impossible (TransformerConfig.pad_vocab_to_multiple_of)."""
    if cfg.table_rows == cfg.vocab_size:
        return bias
    real = jnp.arange(cfg.table_rows) < cfg.vocab_size
    return jnp.where(real, 0.0 if bias is None else bias, -1e30)


def logits_of(
    features: Float[jax.Array, "... D"],
    table: Float[jax.Array, "V D"],
    bias: Float[jax.Array, " V"] | None,
    cap: float,
) -> Float[jax.Array, "... V"]:
    """Scores of every token, float32; the last three arguments are an Unembedding."""
    logits = soft_cap(table_product(features, table.astype(features.dtype)), cap)
    return logits if bias is None else logits + bias
