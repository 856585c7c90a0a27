"""Attention: projections, rotary positions, grouped queries, and the one place where a kernel is chosen."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from model.axes import constrain_activation
from model.cache import LayerCache
from model.config import TransformerConfig
from model.layers import Norm, Projection, rotate
from model.mask import Mask


def attend(
    q: Float[jax.Array, "B T H K"],
    k: Float[jax.Array, "B S G K"],
    v: Float[jax.Array, "B S G K"],
    mask: Mask,
    dropout=lambda probabilities: probabilities,
) -> Float[jax.Array, "B T H K"]:
    """Scaled dot-product attention (arXiv 1706.03762, section 3.2.1); query heads share G key-value heads.

    The softmax is in float32. A query that may see nothing gets an average that no loss looks at, not NaN.
    """
    B, T, H, K = q.shape
    G = k.shape[2]
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q * K**-0.5, k, v))  # heads before places
    scores = jnp.einsum("bgnk,bgsk->bgns", q.reshape(B, G, H // G * T, K), k, preferred_element_type=jnp.float32)
    scores = scores.reshape(B, H, T, -1)
    scores = jnp.where(mask.dense()[:, None], scores, -1e30)
    probabilities = dropout(jax.nn.softmax(scores, axis=-1)).astype(v.dtype).reshape(B, G, H // G * T, -1)
    y = jnp.einsum("bgns,bgsk->bgnk", probabilities, v)
    return y.reshape(B, H, T, K).transpose(0, 2, 1, 3)


class Attention(nn.Module):
    """Multi-head attention of x on itself, on a cache of its past, or on a memory.

    Args of the call:
      x: [B, T, D].
      mask: which keys each query may see.
      positions: [B, T], for rotary positions.
      cache, length: where this layer's past is kept and how much of it each row has; None in training.
      memory: [B, S, D], the encoder's output, for cross-attention; None for self-attention.

    Returns:
      [B, T, D] and the cache with T more places, or None.
    """

    cfg: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: Float[jax.Array, "B T D"],
        mask: Mask,
        positions: Int[jax.Array, "B T"],
        cache: LayerCache | None = None,
        length: Int[jax.Array, " B"] | None = None,
        memory: Float[jax.Array, "B S D"] | None = None,
        deterministic: bool = True,
        rotary_base: float | None = None,
    ) -> tuple[Float[jax.Array, "B T D"], LayerCache | None]:
        cfg = self.cfg
        source = x if memory is None else memory
        q = Projection(cfg, (cfg.n_heads, cfg.d_head), name="query")(x)
        k = Projection(cfg, (cfg.n_kv_heads, cfg.d_head), name="key")(source)
        v = Projection(cfg, (cfg.n_kv_heads, cfg.d_head), name="value")(source)
        if cfg.qk_norm:
            q, k = Norm(cfg, rms=True, name="query_norm")(q), Norm(cfg, rms=True, name="key_norm")(k)
        if cfg.positions == "rotary" and memory is None:
            base = rotary_base or cfg.rotary_base
            q, k = (rotate(x, positions, base, cfg.rotary_scaling) for x in (q, k))
        q = constrain_activation(q, "batch", "length", "heads", "head")
        k = constrain_activation(k, "batch", "keys", "kv_heads", "head")
        v = constrain_activation(v, "batch", "keys", "kv_heads", "head")
        if cache is not None:
            cache = cache.write(k, v, length)
            k, v = cache.k, cache.v
        dropout = nn.Dropout(cfg.dropout_attention, deterministic=deterministic)
        y = attend(q, k, v, mask, dropout)
        y = Projection(cfg, (cfg.d_model,), n_in=2, residual=True, name="out")(y)
        return y, cache
