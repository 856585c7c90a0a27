"""The encoder-decoder Transformer: an encoder reads the source both ways, a decoder writes the target after it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from bothways.model.cache import Cache
from bothways.model.config import TransformerConfig
from bothways.model.decoder import Decoder
from bothways.model.embed import Embedding
from bothways.model.encoder import Encoder
from bothways.model.heads import LMHead, OutputTransform, Unembedding, logits_of, mask_padded_vocab


class Seq2Seq(nn.Module):
    """The Transformer of arXiv 1706.03762 and, by its configuration, of its descendants.

    Source and target share one embedding (of shared_embeddings=tokens its token table), and with tie_embeddings the output
    layer too (section 3.4). n_layers counts the encoder's layers, and the decoder has as many.
    """

    cfg: TransformerConfig

    def setup(self):
        self.embed = Embedding(self.cfg)
        self.encoder = Encoder(self.cfg, shared=self.embed)
        if self.cfg.shared_embeddings == "tokens":
            self.target_embed = Embedding(self.cfg, shared=self.embed.token)
        of_target = self.embed if self.cfg.shared_embeddings == "all" else self.target_embed
        self.decoder = Decoder(self.cfg, cross=True, shared=of_target)
        if not self.cfg.tie_embeddings or self.cfg.output_bias:
            self.lm_head = LMHead(self.cfg)
        if self.cfg.output_transform:
            self.mlm = OutputTransform(self.cfg)

    def __call__(
        self,
        tokens: Int[jax.Array, "B T"],
        source: Int[jax.Array, "B S"],
        positions: Int[jax.Array, "B T"] | None = None,
        segments: Int[jax.Array, "B T"] | None = None,
        source_positions: Int[jax.Array, "B S"] | None = None,
        source_segments: Int[jax.Array, "B S"] | None = None,
        deterministic: bool = True,
    ) -> Float[jax.Array, "B T D"]:
        """Features [B, T, D] of the target's tokens; segments pair the texts packed into a row with their sources."""
        source_segments = jnp.ones_like(source) if source_segments is None else source_segments
        memory = self.encoder(source, source_positions, source_segments, deterministic=deterministic)
        seen = {"memory": memory, "cross_segments": source_segments}
        features, _ = self.decoder(tokens, positions, segments, **seen, deterministic=deterministic)
        if self.is_initializing():  # so that init makes every parameter
            self.transform(features), self.unembedding()
        return features

    def init_cache(self, source: Int[jax.Array, "B S"], source_segments: Int[jax.Array, "B S"], size: int) -> Cache:
        """A cache with room for `size` target tokens per row; keys and values of the source are computed here, once."""
        memory = self.encoder(source, segments=source_segments)
        cache = Cache.empty(self.cfg, source.shape[0], size)
        layers = zip(cache.layers, self.decoder.stack.cross_keys_values(memory), strict=True)
        return cache.replace(layers=tuple(a.replace(cross_kv=b) for a, b in layers), cross_segments=source_segments)

    def decode(self, tokens: Int[jax.Array, "B T"], cache: Cache) -> tuple[Float[jax.Array, "B T D"], Cache]:
        """Features [B, T, D] of more target tokens, and the cache with them."""
        return self.decoder(tokens, cache=cache)

    def encode(
        self, source: Int[jax.Array, "B S"], positions: Int[jax.Array, "B S"], segments: Int[jax.Array, "B S"]
    ) -> Float[jax.Array, "B S D"]:
        """The encoder's features alone."""
        return self.encoder(source, positions, segments)

    def transform(self, features: Float[jax.Array, "... D"]) -> Float[jax.Array, "... D"]:
        """As GPT.transform."""
        return self.mlm(features) if self.cfg.output_transform else features

    def unembedding(self) -> Unembedding:
        """The output layer: a vector per token, and a bias where there is one or rows that fill up the table are hidden."""
        table = self.embed.token.embedding if self.cfg.tie_embeddings else self.lm_head.embedding
        bias = mask_padded_vocab(self.cfg, self.lm_head.bias if self.cfg.output_bias else None)
        return Unembedding(table, bias, self.cfg.logit_cap)

    def logits(self, features: Float[jax.Array, "... D"]) -> Float[jax.Array, "... V"]:
        return logits_of(self.transform(features), *self.unembedding())
