"""GPT: a decoder whose features predict the next token."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from bothways.model.cache import Cache
from bothways.model.config import TransformerConfig
from bothways.model.decoder import Decoder
from bothways.model.heads import LMHead, OutputTransform, Unembedding, logits_of, mask_padded_vocab
from bothways.model.mask import Mask


class GPT(nn.Module):
    """The causal language model of GPT-1, GPT-2 and GPT-3, and, by its configuration, of their descendants.

    The call returns features, not logits: training turns them into a loss piece by piece (model/loss.py),
    sampling needs the last place only.
    """

    cfg: TransformerConfig

    def setup(self):
        self.decoder = Decoder(self.cfg)
        if not self.cfg.tie_embeddings or self.cfg.output_bias:
            self.lm_head = LMHead(self.cfg)
        if self.cfg.output_transform:
            self.mlm = OutputTransform(self.cfg)

    def __call__(
        self,
        tokens: Int[jax.Array, "B T"],
        positions: Int[jax.Array, "B T"] | None = None,
        segments: Int[jax.Array, "B T"] | None = None,
        prefix: Int[jax.Array, " B"] | None = None,
        cache: Cache | None = None,
        deterministic: bool = True,
        block: int | Int[jax.Array, " B"] | None = None,
    ) -> tuple[Float[jax.Array, "B T D"], Cache | None]:
        """Features [B, T, D] and the cache; arguments as in model/decoder.py."""
        options = {"deterministic": deterministic, "block": block}
        features, cache = self.decoder(tokens, positions, segments, prefix, cache, **options)
        if self.is_initializing():  # so that init makes every parameter
            self.transform(features), self.unembedding()
        return features, cache

    def unembedding(self) -> Unembedding:
        """The output layer: a vector per token, and a bias where there is one or rows that fill up the table are hidden."""
        table = self.decoder.token_table() if self.cfg.tie_embeddings else self.lm_head.embedding
        bias = mask_padded_vocab(self.cfg, self.lm_head.bias if self.cfg.output_bias else None)
        return Unembedding(table, bias, self.cfg.logit_cap)

    @property
    def predicts(self) -> str:
        """Which token an output predicts: next or own."""
        return self.cfg.predicts or "next"

    def own(self, features: Float[jax.Array, "B T D"]) -> Float[jax.Array, "B T D"]:
        """Features in the order of the tokens that they predict: [:, t] predicts token t. Nothing predicts token 0 of a
        model that predicts the next one."""
        return jnp.roll(features, 1, axis=1) if self.predicts == "next" else features

    def denoise(
        self,
        hidden: Int[jax.Array, "B T"] | None,
        clean: Int[jax.Array, "B T"] | None,
        positions: Int[jax.Array, "B T"],
        segments: Int[jax.Array, "B T"] | None = None,
        block: int | Int[jax.Array, " B"] = 1,
        deterministic: bool = True,
    ) -> Float[jax.Array, "B T D"]:
        """Features [:, t] that predict token t, given clean blocks before its own and what is not hidden of its own.

        A model that predicts the next token knows the first one of a block, at a position that `block` divides, from the
        clean block before: exactly, as a GPT does. It is never hidden from the others.

        Args:
          hidden: tokens, some of them masked; None where the blocks are of 1 and the model predicts the next token.
          clean: the same tokens, none masked; None where every row is one block.
        """
        if hidden is None:
            return self.own(self(clean, positions, segments, deterministic=deterministic)[0])
        if clean is None:
            whole = self.decoder.read(
                hidden,
                Mask.self_attention(positions, causal=False, segments=segments),
                positions,
                deterministic=deterministic,
            )
            return self.own(whole[0])
        masked, before = self.decoder.two_streams(hidden, clean, positions, segments, block, deterministic)
        if self.predicts == "own":
            return masked
        size = jnp.broadcast_to(jnp.asarray(block), positions.shape[:1])[:, None]
        return jnp.where((positions % size == 0)[..., None], self.own(before), self.own(masked))

    def transform(self, features: Float[jax.Array, "... D"]) -> Float[jax.Array, "... D"]:
        """What stands between features and output layer, as a BERT's MLM head does, where there is such."""
        return self.mlm(features) if self.cfg.output_transform else features

    def logits(self, features: Float[jax.Array, "... D"]) -> Float[jax.Array, "... V"]:
        return logits_of(self.transform(features), *self.unembedding())


class MaskedNextToken(GPT):
    """A GPT with the interface of a masked model; the parameters are the GPT's.

    Where a GPT predicts the next token, it does so after the hybrid objective too (arXiv 2410.24159, section 2): its
    features are shifted right by one, and nothing predicts token 0.
    """

    both_ways: bool = True
    """False: as a plain GPT, the prediction of token t sees only those before it."""

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
        return self.own(features)
