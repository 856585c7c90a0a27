"""BERT: an encoder that predicts masked tokens, and whether one text follows another."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from bothways.model.config import TransformerConfig
from bothways.model.encoder import Encoder
from bothways.model.heads import LMHead, MLMTransform, NextSentence, Unembedding, logits_of, mask_padded_vocab


class BERT(nn.Module):
    """The masked language model of BERT (arXiv 1810.04805) and, by its configuration, of RoBERTa and ModernBERT.

    The call returns features, as a GPT's does. `transform` and `unembedding` turn those at masked
    positions into logits; logits are computed only there.
    """

    cfg: TransformerConfig

    def setup(self):
        self.encoder = Encoder(self.cfg)
        if self.cfg.masked_head and self.cfg.masked_transform:
            self.mlm = MLMTransform(self.cfg)
        if self.cfg.pooled:
            self.nsp = NextSentence(self.cfg)
        if self.cfg.masked_head and not self.cfg.tie_embeddings:
            self.lm_head = LMHead(self.cfg)

    def __call__(
        self,
        tokens: Int[jax.Array, "B T"],
        positions: Int[jax.Array, "B T"] | None = None,
        segments: Int[jax.Array, "B T"] | None = None,
        types: Int[jax.Array, "B T"] | None = None,
        deterministic: bool = True,
    ) -> Float[jax.Array, "B T D"]:
        """Features [B, T, D]; arguments as in model/encoder.py."""
        features = self.encoder(tokens, positions, segments, types, deterministic)
        if self.is_initializing():  # so that init makes every parameter
            if self.cfg.masked_head:
                self.transform(features), self.unembedding()
            if self.cfg.pooled:
                self.nsp(features)
        return features

    def denoise(
        self,
        hidden: Int[jax.Array, "B T"],
        clean: None,
        positions: Int[jax.Array, "B T"],
        segments: Int[jax.Array, "B T"] | None = None,
        block: int | Int[jax.Array, " B"] = 0,
        deterministic: bool = True,
    ) -> Float[jax.Array, "B T D"]:
        """Features [:, t] that predict token t, as GPT.denoise; an encoder reads every row as one block."""
        return self(hidden, positions, segments, None, deterministic)

    def transform(self, features: Float[jax.Array, "... D"]) -> Float[jax.Array, "... D"]:
        """The MLM head before its output layer: dense, activation, norm, where it has them."""
        return self.mlm(features) if self.cfg.masked_transform else features

    def unembedding(self) -> Unembedding:
        """The output layer: a vector per token, and a bias where there is one or rows that fill up the table are hidden."""
        table = self.encoder.token_table() if self.cfg.tie_embeddings else self.lm_head.embedding
        bias = mask_padded_vocab(self.cfg, self.mlm.bias if self.cfg.masked_transform else None)
        return Unembedding(table, bias, self.cfg.logit_cap)

    def logits(self, features: Float[jax.Array, "... D"]) -> Float[jax.Array, "... V"]:
        return logits_of(self.transform(features), *self.unembedding())

    def pooled(self, features: Float[jax.Array, "B T D"]) -> Float[jax.Array, "B D"]:
        """The pooler's output at the first token, as [CLS] is used in BERT."""
        return self.nsp.pool(features)

    def next_sentence(self, features: Float[jax.Array, "B T D"]) -> Float[jax.Array, "B 2"]:
        """Scores: 0 the second text follows the first, 1 it does not."""
        return self.nsp(features).astype(jnp.float32)
