"""What sits on top of the features: output layers, each a few lines."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from model.config import TransformerConfig


class LMHead(nn.Module):
    """An output layer of its own, where it is not tied to the token embeddings."""

    cfg: TransformerConfig

    def setup(self):
        init = nn.initializers.normal(self.cfg.init_std)
        self.embedding = self.param("embedding", init, (self.cfg.vocab_size, self.cfg.d_model), jnp.float32)


def logits_of(
    features: Float[jax.Array, "... D"], table: Float[jax.Array, "V D"], bias: Float[jax.Array, " V"] | None
) -> Float[jax.Array, "... V"]:
    """Scores of every token, float32."""
    logits = jnp.einsum("...d,vd->...v", features, table.astype(features.dtype), preferred_element_type=jnp.float32)
    return logits if bias is None else logits + bias
