"""Tokens, positions and segment types into vectors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from bothways.model.axes import constrain_activation
from bothways.model.config import TransformerConfig
from bothways.model.dropout import Dropout
from bothways.model.layers import Norm, Projection, sinusoid


class Table(nn.Module):
    """Rows of parameters, [rows, D] float32."""

    cfg: TransformerConfig
    rows: int

    def setup(self):
        init = nn.initializers.normal(self.cfg.init_std)
        self.embedding = self.param("embedding", init, (self.rows, self.cfg.narrow), jnp.float32)

    def __call__(self, ids: Int[jax.Array, "..."]) -> Float[jax.Array, "... D"]:
        # The whole width of a row is wanted at once, however the table is stored. Rows are cast after they are gathered:
        # the gradient of a token that occurs often is summed in float32, since in bfloat16 256 + 1 is 256.
        return constrain_activation(self.embedding, "vocab", None)[ids].astype(self.cfg.compute_dtype)


class Embedding(nn.Module):
    """Sum of token, position and segment-type embeddings, [B, T] -> [B, T, D]."""

    cfg: TransformerConfig
    shared: Table | None = None
    """A token table that another Embedding has already; None: one of its own."""

    def setup(self):
        cfg = self.cfg
        self.token = Table(cfg, cfg.table_rows) if self.shared is None else self.shared
        if cfg.position_embedding == "learned":
            self.position = Table(cfg, cfg.context_length)
        if cfg.segment_types:
            self.segment = Table(cfg, cfg.segment_types)
        if cfg.embed_norm:
            self.norm = Norm(cfg)
        if cfg.embed_width:
            self.widen = Projection(cfg, (cfg.d_model,))
        self.dropout = Dropout(cfg.dropout_embed)

    def __call__(
        self,
        tokens: Int[jax.Array, "B T"],
        positions: Int[jax.Array, "B T"],
        types: Int[jax.Array, "B T"] | None = None,
        deterministic: bool = True,
    ) -> Float[jax.Array, "B T D"]:
        cfg = self.cfg
        x = self.token(tokens)
        if cfg.embed_scale:
            x = x * jnp.asarray(cfg.narrow**0.5, x.dtype)
        if cfg.position_embedding == "learned":
            x = x + self.position(positions)
        elif cfg.position_embedding.startswith("sinusoidal"):
            x = x + sinusoid(positions + cfg.first_position, cfg.narrow, cfg.position_embedding).astype(x.dtype)
        if cfg.segment_types:
            x = x + self.segment(jnp.zeros_like(tokens) if types is None else types)
        if cfg.embed_norm:
            x = self.norm(x)
        x = self.dropout(x, deterministic=deterministic)
        x = self.widen(x) if cfg.embed_width else x
        return constrain_activation(x, "batch", "stream", "embed")
