"""GPT: a decoder whose features predict the next token."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from bothways.model.cache import Cache
from bothways.model.config import TransformerConfig
from bothways.model.decoder import Decoder
from bothways.model.heads import LMHead, logits_of, mask_padded_vocab


class GPT(nn.Module):
    """The causal language model of GPT-1, GPT-2 and GPT-3, and, by its configuration, of their descendants.

    The call returns features, not logits: training turns them into a loss piece by piece (model/loss.py),
    sampling needs the last place only.
    """

    cfg: TransformerConfig

    def setup(self):
        self.decoder = Decoder(self.cfg)
        if not self.cfg.tie_embeddings:
            self.lm_head = LMHead(self.cfg)

    def __call__(
        self,
        tokens: Int[jax.Array, "B T"],
        positions: Int[jax.Array, "B T"] | None = None,
        segments: Int[jax.Array, "B T"] | None = None,
        prefix: Int[jax.Array, " B"] | None = None,
        cache: Cache | None = None,
        deterministic: bool = True,
    ) -> tuple[Float[jax.Array, "B T D"], Cache | None]:
        """Features [B, T, D] and the cache; arguments as in model/decoder.py."""
        features, cache = self.decoder(tokens, positions, segments, prefix, cache, deterministic=deterministic)
        self.unembedding()  # so that init makes every parameter
        return features, cache

    def unembedding(self) -> tuple[Float[jax.Array, "V D"], Float[jax.Array, " V"] | None]:
        """The output layer: a vector per token; no bias but the one that hides what fills up the table."""
        table = self.decoder.token_table() if self.cfg.tie_embeddings else self.lm_head.embedding
        return table, mask_padded_vocab(self.cfg, None)

    def logits(self, features: Float[jax.Array, "... D"]) -> Float[jax.Array, "... V"]:
        return logits_of(features, *self.unembedding())


class MaskedNextToken(GPT):
    """A GPT behind BERT's call, so that both can be asked alike; the parameters are the GPT's.

    What a GPT says of token t stands at output t - 1, and so it does where the hybrid objective taught it to read
    both ways (arXiv 2410.24159, section 2): its features are handed on one place later. Nothing is said of token 0.
    """

    both_ways: bool = True
    """False: as a plain GPT, what is said of token t knows only those before it."""

    def __call__(
        self,
        tokens: Int[jax.Array, "B T"],
        positions: Int[jax.Array, "B T"] | None = None,
        segments: Int[jax.Array, "B T"] | None = None,
        types: None = None,
        deterministic: bool = True,
    ) -> Float[jax.Array, "B T D"]:
        whole = jnp.full(tokens.shape[:1], tokens.shape[1], jnp.int32) if self.both_ways else None
        features, _ = super().__call__(tokens, positions, segments, whole, deterministic=deterministic)
        return jnp.roll(features, 1, axis=1)

    def transform(self, features: Float[jax.Array, "... D"]) -> Float[jax.Array, "... D"]:
        """No MLM head stands between features and output layer."""
        return features
