"""The decoder, causal self-attention: a token sees what came before it, in this call or in the cache."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from bothways.model.cache import Cache
from bothways.model.mask import Mask
from bothways.model.transformer import Transformer, position_ids


class Decoder(Transformer):
    """Args of the call:
    tokens: [B, T].
    positions: [B, T]; None: 0, 1, 2 ..., or onwards from the cache's length.
    segments: [B, T], 1, 2 ... for the documents packed into a row, 0 for padding; None: one document.
    block: one block size for all rows, or [B], one for each: a token sees its own block and those before it; None: what
      came before it only.
    prefix: [B], how many first tokens of each row see each other both ways; None: none (arXiv 1910.10683, 3.2.1).
    cache: the past; None in training.
    memory: [B, S, D], an encoder's output, for the cross-attention of training; a cache brings what it was made into.
    cross_segments: [B, S], segments of the memory: a token looks at the source of its own segment; 0 is padding.

    Returns:
      features [B, T, D], and the cache with T more tokens or None.
    """

    both_ways: ClassVar[bool] = False

    def __call__(
        self,
        tokens: Int[jax.Array, "B T"],
        positions: Int[jax.Array, "B T"] | None = None,
        segments: Int[jax.Array, "B T"] | None = None,
        prefix: Int[jax.Array, " B"] | None = None,
        cache: Cache | None = None,
        memory: Float[jax.Array, "B S D"] | None = None,
        cross_segments: Int[jax.Array, "B S"] | None = None,
        deterministic: bool = True,
        block: int | Int[jax.Array, " B"] | None = None,
    ) -> tuple[Float[jax.Array, "B T D"], Cache | None]:
        if cache is None:
            positions = position_ids(tokens) if positions is None else positions
            mask = Mask.self_attention(positions, causal=block is None, segments=segments, prefix=prefix, block=block)
        else:
            positions = cache.length[:, None] + position_ids(tokens) if positions is None else positions
            mask = Mask.cached(positions, cache.size, prefix, block)
        if self.cfg.position_embedding == "learned":
            positions = jnp.minimum(positions, self.cfg.context_length - 1)  # a padded prompt may reach past the table
        memory_mask = None
        if self.cross:
            cross_segments = cross_segments if cache is None else cache.cross_segments
            memory_mask = Mask.cross(jnp.ones_like(tokens) if segments is None else segments, cross_segments)
        seen = {"cache": cache, "memory": memory, "memory_mask": memory_mask}
        return self.read(tokens, mask, positions, **seen, deterministic=deterministic)

    def read(self, *args: Any, **options: Any) -> tuple[Float[jax.Array, "B T D"], Cache | None]:
        features, cache = super().read(*args, **options)
        return (features * self.cfg.d_model**-0.5 if self.cfg.output_scale else features), cache

    def two_streams(
        self,
        hidden: Int[jax.Array, "B T"],
        clean: Int[jax.Array, "B T"],
        positions: Int[jax.Array, "B T"] | None,
        segments: Int[jax.Array, "B T"] | None,
        block: int | Int[jax.Array, " B"],
        deterministic: bool = True,
    ) -> tuple[Float[jax.Array, "B T D"], Float[jax.Array, "B T D"]]:
        """Features of the tokens with some hidden, each block beside clean ones before it, and of the clean tokens."""
        positions = position_ids(hidden) if positions is None else positions
        mask = Mask.two_streams(positions, block=block, segments=segments)
        tokens = jnp.concatenate([hidden, clean], axis=1)
        features, _ = self.read(tokens, mask, mask.q_positions, deterministic=deterministic)
        return features[:, : hidden.shape[1]], features[:, hidden.shape[1] :]
