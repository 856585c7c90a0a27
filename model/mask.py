"""Mask: which keys a query may see. This is where GPT and BERT part.

A mask is a value made of small integer vectors, one per row. `dense()` draws it as booleans; a kernel that wants
the structure instead (causal, a window, segment ids) reads the fields. Drawn, `x` where a query (row) sees a key:

    causal      bidirectional   prefix of 2     window of 2,    packed: segments 1 1 1 2 2,
                                                causal          causal
    x . . . .   x x x x x       x x . . .       x . . . .       x . . . .
    x x . . .   x x x x x       x x . . .       x x . . .       x x . . .
    x x x . .   x x x x x       x x x . .       . x x . .       x x x . .
    x x x x .   x x x x x       x x x x .       . . x x .       . . . x .
    x x x x x   x x x x x       x x x x x       . . . x x       . . . x x
"""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int


@flax.struct.dataclass
class Mask:
    """Visible pairs (query, key). All conditions hold together."""

    q_positions: Int[jax.Array, "B T"]
    k_positions: Int[jax.Array, "B S"]
    q_segments: Int[jax.Array, "B T"] | None = None
    """Which document a token belongs to, counted from 1; 0 is padding, which nobody sees."""
    k_segments: Int[jax.Array, "B S"] | None = None
    prefix: Int[jax.Array, " B"] | None = None
    """Keys at positions below this are visible to all queries of the row, even in a causal mask."""
    causal: bool = flax.struct.field(pytree_node=False, default=False)
    window: int = flax.struct.field(pytree_node=False, default=0)
    positions_are_sequential: bool = flax.struct.field(pytree_node=False, default=False)
    """Queries and keys are the same tokens, and positions count up by one along each segment: a kernel may compare
    places in the row instead."""

    @classmethod
    def self_attention(
        cls,
        positions: Int[jax.Array, "B T"],
        *,
        causal: bool,
        segments: Int[jax.Array, "B T"] | None = None,
        prefix: Int[jax.Array, " B"] | None = None,
    ) -> "Mask":
        """Tokens that look at each other: `causal=True` reads forward only (GPT), False both ways (BERT).

        Positions count up by one along each segment, as those of packed rows do.
        """
        return cls(positions, positions, segments, segments, prefix, causal=causal, positions_are_sequential=True)

    @classmethod
    def cached(cls, q_positions: Int[jax.Array, "B T"], size: int, prefix: Int[jax.Array, " B"] | None = None) -> "Mask":
        """New tokens that look at a cache of `size` slots; slot s holds position s.

        Slots behind a row's newest token hold nothing yet, and causality hides them.
        """
        slots = jnp.broadcast_to(jnp.arange(size), (q_positions.shape[0], size))
        return cls(q_positions, slots, prefix=prefix, causal=True)

    @classmethod
    def cross(cls, q_segments: Int[jax.Array, "B T"], k_segments: Int[jax.Array, "B S"]) -> "Mask":
        """A decoder's queries on an encoder's output: every key of the same segment."""
        zeros = jnp.zeros_like
        return cls(zeros(q_segments), zeros(k_segments), q_segments, k_segments)

    def windowed(self, window: int) -> "Mask":
        """The same mask, with keys `window` or more places away hidden. 0 leaves it as it is."""
        return self.replace(window=window)

    def visible_key_range(self, queries: slice) -> slice:
        """Places of all keys that queries at these places may see, of an `positions_are_sequential` mask without a prefix."""
        size, reach = self.k_positions.shape[1], self.window or self.k_positions.shape[1]
        end = queries.stop if self.causal else min(size, queries.stop + reach - 1)
        return slice(max(0, queries.start - reach + 1), end)

    def slice(self, queries: slice, keys: slice) -> "Mask":
        """The mask of some places only. No longer `positions_are_sequential`."""

        def cut(x: jax.Array | None, places: slice) -> jax.Array | None:
            return x if x is None else x[:, places]

        return self.replace(
            q_positions=cut(self.q_positions, queries),
            q_segments=cut(self.q_segments, queries),
            k_positions=cut(self.k_positions, keys),
            k_segments=cut(self.k_segments, keys),
            positions_are_sequential=False,
        )

    def materialize(self) -> Bool[jax.Array, "B T S"]:
        """The mask drawn: True where query t may see key s."""
        q, k = self.q_positions[:, :, None], self.k_positions[:, None, :]
        seen = jnp.ones(jnp.broadcast_shapes(q.shape, k.shape), bool)
        if self.causal:
            forward = k <= q
            seen &= forward if self.prefix is None else forward | (k < self.prefix[:, None, None])
        if self.window:
            seen &= jnp.abs(q - k) < self.window
        if self.k_segments is not None:
            key_segments = self.k_segments[:, None, :]
            same = key_segments > 0 if self.q_segments is None else self.q_segments[:, :, None] == key_segments
            seen &= same & (key_segments > 0)
        return seen
