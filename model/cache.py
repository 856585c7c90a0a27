"""Key-value cache: an explicit pytree. Training has none."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from bothways.model.config import TransformerConfig


@flax.struct.dataclass
class LayerCache:
    """Keys and values of one layer, by position; in attention's layout, heads before positions."""

    k: Float[jax.Array, "B G S K"]
    v: Float[jax.Array, "B G S W"]
    cross_kv: "LayerCache | None" = None
    """Of a decoder under an encoder: the keys and values of the encoder's features."""

    def write(
        self, k: Float[jax.Array, "B T G K"], v: Float[jax.Array, "B T G W"], start: Int[jax.Array, " B"]
    ) -> "LayerCache":
        """T new slots per row, each row from its own `start`."""

        def put(old: Float[jax.Array, "S K"], new: Float[jax.Array, "T K"], at: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), (at, 0))

        # A start for every head of every row, since XLA's CPU backend would copy the cache of a single row.
        heads_of_rows, at = jax.vmap(jax.vmap(put)), jnp.broadcast_to(start[:, None], self.k.shape[:2])
        return self.replace(k=heads_of_rows(self.k, k.swapaxes(1, 2), at), v=heads_of_rows(self.v, v.swapaxes(1, 2), at))

    @classmethod
    def of(cls, k: Float[jax.Array, "B S G K"], v: Float[jax.Array, "B S G W"]) -> "LayerCache":
        """What holds exactly these."""
        return cls(k.swapaxes(1, 2), v.swapaxes(1, 2))

    def read(self) -> tuple[Float[jax.Array, "B S G K"], Float[jax.Array, "B S G W"]]:
        """Keys and values of all slots."""
        return self.k.swapaxes(1, 2), self.v.swapaxes(1, 2)


@flax.struct.dataclass
class Cache:
    """What a decoder remembers of a batch: for each layer its keys and values, for each row its length."""

    layers: tuple[LayerCache, ...]
    length: Int[jax.Array, " B"]
    cross_segments: Int[jax.Array, "B S"] | None = None
    """Of a decoder under an encoder: 1 where the source is, 0 where it is padded."""

    @classmethod
    def empty(cls, cfg: TransformerConfig, batch: int, size: int) -> "Cache":
        """Room for `size` tokens in each of `batch` rows."""
        cfg = cfg.resolved()

        def zeros(width: int) -> jax.Array:
            return jnp.zeros((batch, cfg.n_kv_heads, size, width), cfg.compute_dtype)

        layers = tuple(LayerCache(zeros(cfg.d_head), zeros(cfg.d_value)) for _ in range(cfg.n_layers))
        return cls(layers, jnp.zeros((batch,), jnp.int32))

    @property
    def size(self) -> int:
        return self.layers[0].k.shape[2]

    def gather_rows(self, rows: Int[jax.Array, " N"], *, cross: bool = True) -> "Cache":
        """The rows at these indices: how a beam search follows its survivors.

        Args:
          cross: False leaves what is known of the sources where it is: the survivors share it with the dead.
        """
        if cross:
            return jax.tree.map(lambda x: x[rows], self)
        layers = tuple(layer.replace(k=layer.k[rows], v=layer.v[rows]) for layer in self.layers)
        return self.replace(layers=layers, length=self.length[rows])
