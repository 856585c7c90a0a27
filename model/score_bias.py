"""What positions add to attention's scores: a learned number by distance (T5), or a slope by head (ALiBi)."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bothways.model.config import TransformerConfig


@flax.struct.dataclass
class ScoreBias:
    """A bias of scores by the distance of key and query, on positions, which restart with every document of a row."""

    table: Float[jax.Array, "N H"]
    """Of each bucket and head; or one row, that of the slopes."""
    buckets: int = flax.struct.field(pytree_node=False, default=0)
    """0: the distance itself is multiplied by a slope."""
    distance: int = flax.struct.field(pytree_node=False, default=0)
    both_ways: bool = flax.struct.field(pytree_node=False, default=False)

    def of(self, q_positions: Int[jax.Array, "B T"], k_positions: Int[jax.Array, "B S"]) -> Float[jax.Array, "B H T S"]:
        """What is added to the scores, float32."""
        away = k_positions[:, None, :] - q_positions[:, :, None]
        if not self.buckets:
            return -self.table[0][:, None, None] * jnp.abs(away)[:, None].astype(jnp.float32)
        return jnp.moveaxis(self.table[self._bucket(away)], -1, 1)

    def _bucket(self, away: Int[jax.Array, "B T S"]) -> Int[jax.Array, "B T S"]:
        """arXiv 1910.10683, section 2.1: near distances have a bucket each, farther ones share it, by their logarithm."""
        count = self.buckets // 2 if self.both_ways else self.buckets
        first = jnp.where(away > 0, count, 0) if self.both_ways else 0
        apart = jnp.abs(away) if self.both_ways else jnp.maximum(-away, 0)
        exact = count // 2
        scale = (count - exact) / np.log(self.distance / exact)
        far = exact + (jnp.log(jnp.maximum(apart, 1).astype(jnp.float32) / exact) * scale).astype(jnp.int32)
        return first + jnp.where(apart < exact, apart, jnp.minimum(far, count - 1))


class RelativePositions(nn.Module):
    """T5's table, [buckets, H] float32, of one side's self-attention."""

    cfg: TransformerConfig
    both_ways: bool

    @nn.compact
    def __call__(self) -> ScoreBias:
        cfg = self.cfg
        init = nn.initializers.normal(cfg.init_std)
        table = self.param("embedding", init, (cfg.relative_buckets, cfg.n_heads), jnp.float32)
        return ScoreBias(table, cfg.relative_buckets, cfg.relative_distance, self.both_ways)


def alibi(cfg: TransformerConfig) -> ScoreBias:
    """Slopes of the heads (arXiv 2108.12409, section 3): 2^(-8/n), 2^(-16/n) ... for n heads, a power of 2; of another number
    those of the next lower power, then every other one of the next higher."""
    n = 2 ** int(np.log2(cfg.n_heads))
    slopes = [2.0 ** (-8 * i / n) for i in range(1, n + 1)]
    slopes += [2.0 ** (-4 * i / n) for i in range(1, 2 * (cfg.n_heads - n), 2)]
    return ScoreBias(jnp.asarray([slopes], jnp.float32))
