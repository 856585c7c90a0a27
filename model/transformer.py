"""Embeddings, blocks, last norm: what an encoder and a decoder have in common. They differ in the mask they bring."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from bothways.model.cache import Cache
from bothways.model.config import TransformerConfig
from bothways.model.embed import Embedding
from bothways.model.layers import Norm
from bothways.model.mask import Mask
from bothways.model.score_bias import RelativePositions, alibi
from bothways.model.stack import Stack


def position_ids(tokens: Int[jax.Array, "B T"]) -> Int[jax.Array, "B T"]:
    """Positions 0, 1, 2 ... of every row."""
    return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)


class Transformer(nn.Module):
    """Tokens to features. Subclasses build the mask."""

    cfg: TransformerConfig
    cross: bool = False
    """Whether the blocks attend to an encoder's output too."""
    shared: Embedding | None = None
    """An embedding that another Transformer has already; None: one of its own."""
    both_ways: ClassVar[bool] = True
    """Whether relative positions tell keys behind a query from those before it."""

    def setup(self):
        self.embed = Embedding(self.cfg) if self.shared is None else self.shared
        self.stack = Stack(self.cfg, cross=self.cross)
        if self.cfg.score_bias == "relative":
            self.relative = RelativePositions(self.cfg, self.both_ways)
        if self.cfg.norm_position != "post":
            self.final_norm = Norm(self.cfg)

    def read(
        self,
        tokens: Int[jax.Array, "B T"],
        mask: Mask,
        positions: Int[jax.Array, "B T"],
        *,
        types: Int[jax.Array, "B T"] | None = None,
        cache: Cache | None = None,
        memory: Float[jax.Array, "B S D"] | None = None,
        memory_mask: Mask | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[jax.Array, "B T D"], Cache | None]:
        x = self.embed(tokens, positions, types, deterministic)
        bias = alibi(self.cfg) if self.cfg.score_bias == "alibi" else None
        bias = self.relative() if self.cfg.score_bias == "relative" else bias
        x, cache = self.stack(x, mask, positions, cache, memory, memory_mask, deterministic, bias)
        return (self.final_norm(x) if self.cfg.norm_position != "post" else x), cache

    def token_table(self) -> Float[jax.Array, "V D"]:
        """The token embeddings, for an output layer tied to them."""
        return self.embed.token.embedding
