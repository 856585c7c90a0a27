"""The encoder, bidirectional self-attention: every token sees every token of its segment."""

import jax
from jaxtyping import Float, Int

from bothways.model.mask import Mask
from bothways.model.transformer import Transformer, position_ids


class Encoder(Transformer):
    """Args of the call:
    tokens: [B, T].
    positions: [B, T]; None: 0, 1, 2 ...
    segments: [B, T], 1, 2 ... for the documents packed into a row, 0 for padding; None: one document, no padding.
    types: [B, T], segment types (BERT's sentence A and B).

    Returns:
      features [B, T, D].
    """

    def __call__(
        self,
        tokens: Int[jax.Array, "B T"],
        positions: Int[jax.Array, "B T"] | None = None,
        segments: Int[jax.Array, "B T"] | None = None,
        types: Int[jax.Array, "B T"] | None = None,
        deterministic: bool = True,
    ) -> Float[jax.Array, "B T D"]:
        positions = position_ids(tokens) if positions is None else positions
        mask = Mask.self_attention(positions, causal=False, segments=segments)
        return self.read(tokens, mask, positions, types=types, deterministic=deterministic)[0]
