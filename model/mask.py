"""Mask: which keys a query may see. This is where GPT and BERT part, and `block` is the way from one to the other.

A mask is a value made of small integer vectors, one per row. `materialize()` draws it as booleans; a kernel that wants
the structure instead (causal, a window, segment ids) reads the fields. Drawn, `x` where a query (row) sees a key:

    causal      bidirectional   prefix of 2     window of 2,    packed: segments 1 1 1 2 2,
                                                causal          causal
    x . . . .   x x x x x       x x . . .       x . . . .       x . . . .
    x x . . .   x x x x x       x x . . .       x x . . .       x x . . .
    x x x . .   x x x x x       x x x . .       . x x . .       x x x . .
    x x x x .   x x x x x       x x x x .       . . x x .       . . . x .
    x x x x x   x x x x x       x x x x x       . . . x x       . . . x x

    blocks of 1     blocks of 2     blocks of 5     blocks of 2, segments 1 1 1 2 2
    x . . . .       x x . . .       x x x x x       x x . . .
    x x . . .       x x . . .       x x x x x       x x . . .
    x x x . .       x x x x .       x x x x x       x x x . .
    x x x x .       x x x x .       x x x x x       . . . x x
    x x x x x       x x x x x       x x x x x       . . . x x

Blocks of 1 are the causal mask, and a block as long as the row the bidirectional one. In training a block is read with
some of its tokens hidden, and must see the blocks before it as they are: the row stands there twice, hidden and clean
(`two_streams`; arXiv 2503.09573, section 3.1). Blocks of 2, hidden h0 h1 h2 h3 before clean c0 c1 c2 c3:

         h0 h1 h2 h3 c0 c1 c2 c3
    h0   x  x  .  .  .  .  .  .
    h1   x  x  .  .  .  .  .  .
    h2   .  .  x  x  x  x  .  .
    h3   .  .  x  x  x  x  .  .
    c0   .  .  .  .  x  x  .  .
    c1   .  .  .  .  x  x  .  .
    c2   .  .  .  .  x  x  x  x
    c3   .  .  .  .  x  x  x  x
"""

from collections.abc import Callable

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
    block: Int[jax.Array, " B"] | None = None
    """Block size of each row: a query sees the keys of its own block and of those before it, `k // block <= q // block`
    on positions, which restart with every document."""
    q_hidden: Bool[jax.Array, "B T"] | None = None
    """With blocks: tokens of the hidden stream, which see their own block there and clean blocks before it only."""
    k_hidden: Bool[jax.Array, "B S"] | None = None
    """Keys of the hidden stream, which clean queries do not see."""
    causal: bool = flax.struct.field(pytree_node=False, default=False)
    window: int = flax.struct.field(pytree_node=False, default=0)
    positions_are_sequential: bool = flax.struct.field(pytree_node=False, default=False)
    """Queries and keys are the same tokens, and positions count up by one along each segment: a kernel may compare
    indices in the row instead."""
    block_by_index: int = flax.struct.field(pytree_node=False, default=0)
    """The block size, where it is the same number for all rows and every segment begins at a multiple of it: a kernel
    may cut blocks by index in the row. 0: not known when tracing."""
    streams: int = flax.struct.field(pytree_node=False, default=1)
    """2: the first half of the row is the hidden stream, the second the clean one."""

    @classmethod
    def self_attention(
        cls,
        positions: Int[jax.Array, "B T"],
        *,
        causal: bool,
        segments: Int[jax.Array, "B T"] | None = None,
        prefix: Int[jax.Array, " B"] | None = None,
        block: int | Int[jax.Array, " B"] | None = None,
    ) -> "Mask":
        """Tokens that look at each other: `causal=True` reads forward only (GPT), False both ways (BERT).

        Positions count up by one along each segment, as those of packed rows do.

        Args:
          block: block size, one for all rows or one for each; None: no blocks.
        """
        mask = cls(positions, positions, segments, segments, prefix, causal=causal, positions_are_sequential=True)
        return mask if block is None else mask._in_blocks(block)

    @classmethod
    def two_streams(
        cls,
        positions: Int[jax.Array, "B T"],
        *,
        block: int | Int[jax.Array, " B"],
        segments: Int[jax.Array, "B T"] | None = None,
    ) -> "Mask":
        """Rows of 2 T tokens, hidden beside clean; positions and segments are those of one half."""
        twice = jnp.concatenate([positions, positions], axis=1)
        both = None if segments is None else jnp.concatenate([segments, segments], axis=1)
        hidden = jnp.broadcast_to(jnp.arange(twice.shape[1]) < positions.shape[1], twice.shape)
        mask = cls(twice, twice, both, both, q_hidden=hidden, k_hidden=hidden, positions_are_sequential=True, streams=2)
        return mask._in_blocks(block)

    @classmethod
    def cached(
        cls,
        q_positions: Int[jax.Array, "B T"],
        size: int,
        prefix: Int[jax.Array, " B"] | None = None,
        block: int | Int[jax.Array, " B"] | None = None,
    ) -> "Mask":
        """New tokens that look at a cache of `size` slots; slot s holds position s.

        Slots behind a row's newest token hold nothing yet, and causality hides them; with blocks, those behind its block.
        """
        slots = jnp.broadcast_to(jnp.arange(size), (q_positions.shape[0], size))
        mask = cls(q_positions, slots, prefix=prefix, causal=block is None)
        return mask if block is None else mask._in_blocks(block)

    @classmethod
    def cross(cls, q_segments: Int[jax.Array, "B T"], k_segments: Int[jax.Array, "B S"]) -> "Mask":
        """A decoder's queries on an encoder's output: every key of the same segment."""
        zeros = jnp.zeros_like
        return cls(zeros(q_segments), zeros(k_segments), q_segments, k_segments)

    def _in_blocks(self, block: int | Int[jax.Array, " B"]) -> "Mask":
        known = isinstance(block, int) and self.q_segments is None and self.positions_are_sequential
        sizes = jnp.broadcast_to(jnp.asarray(block, jnp.int32), self.q_positions.shape[:1])
        return self.replace(block=sizes, block_by_index=block if known else 0)

    def windowed(self, window: int) -> "Mask":
        """The same mask, with keys `window` or more positions away masked. 0 leaves it as it is."""
        return self.replace(window=window)

    def visible_key_range(self, queries: slice) -> slice:
        """Indices of all keys that queries at these indices may see, of a `positions_are_sequential` mask without a prefix or
        blocks."""
        size, reach = self.k_positions.shape[1], self.window or self.k_positions.shape[1]
        end = queries.stop if self.causal else min(size, queries.stop + reach - 1)
        return slice(max(0, queries.start - reach + 1), end)

    def map_tokens(self, queries: Callable[[jax.Array], jax.Array], keys: Callable[[jax.Array], jax.Array]) -> "Mask":
        """The mask with a function put on every vector [B, T] of the queries, and one on every [B, S] of the keys. No
        longer `positions_are_sequential`."""

        def put(fn: Callable[[jax.Array], jax.Array], x: jax.Array | None) -> jax.Array | None:
            return x if x is None else fn(x)

        of_queries = {name: put(queries, getattr(self, name)) for name in ("q_positions", "q_segments", "q_hidden")}
        of_keys = {name: put(keys, getattr(self, name)) for name in ("k_positions", "k_segments", "k_hidden")}
        return self.replace(**of_queries, **of_keys, positions_are_sequential=False, block_by_index=0)

    def slice(self, queries: slice, keys: slice) -> "Mask":
        """The mask of some queries and keys only. No longer `positions_are_sequential`."""
        return self.map_tokens(lambda x: x[:, queries], lambda x: x[:, keys])

    def materialize(self) -> Bool[jax.Array, "B T S"]:
        """The dense boolean mask: True where query t may see key s."""
        q, k = self.q_positions[:, :, None], self.k_positions[:, None, :]
        seen = jnp.ones(jnp.broadcast_shapes(q.shape, k.shape), bool)
        if self.causal:
            forward = k <= q
            seen &= forward if self.prefix is None else forward | (k < self.prefix[:, None, None])
        if self.block is not None:
            size = self.block[:, None, None]
            q_block, k_block = q // size, k // size
            if self.k_hidden is None:
                seen &= k_block <= q_block
            else:
                q_hidden, k_hidden = self.q_hidden[:, :, None], self.k_hidden[:, None, :]
                clean = jnp.where(q_hidden, k_block < q_block, k_block <= q_block)
                seen &= jnp.where(k_hidden, q_hidden & (k_block == q_block), clean)
        if self.window:
            seen &= jnp.abs(q - k) < self.window
        if self.k_segments is not None:
            key_segments = self.k_segments[:, None, :]
            same = key_segments > 0 if self.q_segments is None else self.q_segments[:, :, None] == key_segments
            seen &= same & (key_segments > 0)
        return seen
