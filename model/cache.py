"""Key-value cache: an explicit pytree. Training has none."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from model.config import TransformerConfig


@flax.struct.dataclass
class LayerCache:
    """Keys and values of one layer, by position."""

    k: Float[jax.Array, "B S G K"]
    v: Float[jax.Array, "B S G K"]

    def write(
        self, k: Float[jax.Array, "B T G K"], v: Float[jax.Array, "B T G K"], start: Int[jax.Array, " B"]
    ) -> "LayerCache":
        """T new places per row, each row from its own `start`."""

        def put(row: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice(row, new.astype(row.dtype), (at, 0, 0))

        return LayerCache(jax.vmap(put)(self.k, k, start), jax.vmap(put)(self.v, v, start))


@flax.struct.dataclass
class Cache:
    """What a decoder remembers of a batch: for each layer its keys and values, for each row its length."""

    layers: tuple[LayerCache, ...]
    length: Int[jax.Array, " B"]

    @classmethod
    def empty(cls, cfg: TransformerConfig, batch: int, size: int) -> "Cache":
        """Room for `size` tokens in each of `batch` rows."""
        cfg = cfg.resolved()
        shape = (batch, size, cfg.n_kv_heads, cfg.d_head)

        def zeros() -> jax.Array:
            return jnp.zeros(shape, cfg.compute_dtype)

        layers = tuple(LayerCache(zeros(), zeros()) for _ in range(cfg.n_layers))
        return cls(layers, jnp.zeros((batch,), jnp.int32))

    @property
    def size(self) -> int:
        return self.layers[0].k.shape[1]

    def take(self, rows: Int[jax.Array, " N"]) -> "Cache":
        """The rows at these indices: how a beam search follows its survivors."""
        return jax.tree.map(lambda x: x[rows], self)
