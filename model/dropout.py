"""Dropout whose mask is a function of (seed, position), not of a stream of random bits.

A stream depends on who draws it: each device of a mesh would draw the whole batch's bits, or masks would differ from mesh
to mesh. Here the bit of an element is a hash of two numbers: the index of its row among all rows, and its column. Any part
of an array can be drawn by itself, on any mesh, in a kernel, and again in the backward pass. The constants
of the hash are those of "lowbias32" (C. Wellons, "Prospecting for hash functions", 2018).
"""

import math

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt

GOLDEN = np.uint32(0x9E3779B9)


def mix(x: UInt[jax.Array, "..."]) -> UInt[jax.Array, "..."]:
    """A bijection of 32-bit numbers in which every bit of x changes half of the result's."""
    x = x ^ (x >> 16)
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> 15)
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def seed_words(key: jax.Array) -> UInt[jax.Array, " 2"]:
    """A random key as the two words that `row_hash` and `column_hash` take."""
    return jax.random.bits(key, (2,), jnp.uint32)


def row_hash(seed: UInt[jax.Array, " 2"], row: UInt[jax.Array, "..."]) -> UInt[jax.Array, "..."]:
    return mix(mix(row + seed[0]) ^ seed[1])


def column_hash(seed: UInt[jax.Array, " 2"], column: UInt[jax.Array, "..."]) -> UInt[jax.Array, "..."]:
    return mix(column * GOLDEN + seed[1])


def keep_factor(rate: float, row: UInt[jax.Array, "..."], column: UInt[jax.Array, "..."]) -> Float[jax.Array, "..."]:
    """0 where an element is dropped, 1 / (1 - rate) where it stays, float32; of two hashes that broadcast."""
    x = row ^ column
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> 15)
    x = x * np.uint32(0x846CA68B)
    keep = 1 - rate
    kept = (x >> 8).astype(jnp.int32) < int(keep * 2**24)  # TPU kernels compare signed numbers only
    return jnp.where(kept, jnp.float32(1 / keep), jnp.float32(0))


@flax.struct.dataclass
class ScoreDropout:
    """Dropout of attention probabilities [B, H, T, S]: any part of them can be drawn."""

    seed: UInt[jax.Array, " 2"]
    rate: float = flax.struct.field(pytree_node=False)

    def rows(self, B: int, H: int, T: int, queries: jax.Array | None = None) -> UInt[jax.Array, "B H t"]:
        """Hashes of rows: those of these queries among T; None: of all."""
        queries = jnp.arange(T) if queries is None else queries
        heads = jnp.arange(B * H, dtype=jnp.uint32).reshape(B, H, 1)
        return row_hash(self.seed, heads * np.uint32(T) + queries.astype(jnp.uint32))

    def factor(
        self, B: int, H: int, T: int, queries: jax.Array | None, keys: UInt[jax.Array, " s"]
    ) -> Float[jax.Array, "B H t s"]:
        """What probabilities of these queries (indices among T; None: all) and keys are multiplied by."""
        columns = column_hash(self.seed, keys.astype(jnp.uint32))
        return keep_factor(self.rate, self.rows(B, H, T, queries)[..., None], columns)


class Dropout(nn.Module):
    """x [..., D] with elements set to 0 at `rate`, the others divided by 1 - rate; as nn.Dropout is called."""

    rate: float
    deterministic: bool = False

    @nn.compact
    def __call__(self, x: Float[jax.Array, "... D"], deterministic: bool | None = None) -> Float[jax.Array, "... D"]:
        if self.rate == 0 or (self.deterministic if deterministic is None else deterministic):
            return x
        seed, outer = seed_words(self.make_rng("dropout")), x.shape[:-1]
        # Not one arange of all rows, reshaped: the indices of a part of a spread array are then made where the part is.
        row = sum(
            jax.lax.broadcasted_iota(jnp.uint32, outer, i) * np.uint32(math.prod(outer[i + 1 :]) % 2**32)
            for i in range(len(outer))
        )
        columns = column_hash(seed, jnp.arange(x.shape[-1], dtype=jnp.uint32))
        factor = keep_factor(self.rate, row_hash(seed, row)[..., None], columns)
        return (x.astype(jnp.float32) * factor).astype(x.dtype)  # 1 / 0.9 is not a bfloat16
