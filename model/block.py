"""One block for every family: self-attention, optional cross-attention, MLP; norm before or after."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from bothways.model.attention import Attention
from bothways.model.axes import constrain_activation
from bothways.model.cache import LayerCache
from bothways.model.config import TransformerConfig
from bothways.model.dropout import Dropout
from bothways.model.layers import Norm, Projection
from bothways.model.mask import Mask
from bothways.model.products import elementwise, gelu
from bothways.model.score_bias import ScoreBias

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # arXiv 2109.08668, section 4.1
    "silu": jax.nn.silu,
    "swiglu": jax.nn.silu,  # arXiv 2002.05202
    "geglu": gelu,
    "geglu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


class MLP(nn.Module):
    """Position-wise feed-forward, [B, T, D] -> [B, T, D]; gated where the activation is (arXiv 2002.05202)."""

    cfg: TransformerConfig

    @nn.compact
    def __call__(self, x: Float[jax.Array, "B T D"]) -> Float[jax.Array, "B T D"]:
        cfg, activation, bias = self.cfg, ACTIVATIONS[self.cfg.activation], self.cfg.bias and self.cfg.mlp_bias
        y = Projection(cfg, (cfg.d_ff,), bias=bias, name="up")(x)
        if cfg.gated:
            gate = Projection(cfg, (cfg.d_ff,), bias=bias, name="gate")(x)
            y = elementwise(lambda y, gate: y * activation(gate), y, gate)
        else:
            y = elementwise(activation, y)
        y = constrain_activation(y, "batch", "length", "ff")
        return Projection(cfg, (cfg.d_model,), bias=bias, residual=True, name="down")(y)


class Block(nn.Module):
    """Sub-layers around a residual stream.

    pre-norm:  x + dropout(f(norm(x)))      GPT-2 and after
    post-norm: norm(x + dropout(f(x)))      arXiv 1706.03762, GPT-1, BERT
    out:       x + dropout(norm(f(x)))      OLMo 2
    both:      x + dropout(norm(f(norm(x))))    Gemma 2
    parallel:  x + dropout(f(norm(x))) + dropout(g(norm(x)))    GPT-J, GPT-NeoX
    """

    cfg: TransformerConfig
    cross: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[jax.Array, "B T D"],
        mask: Mask,
        positions: Int[jax.Array, "B T"],
        cache: LayerCache | None = None,
        length: Int[jax.Array, " B"] | None = None,
        memory: Float[jax.Array, "B S D"] | None = None,
        memory_mask: Mask | None = None,
        deterministic: bool = True,
        rotary_base: float | None = None,
        skip_norm: jax.Array | bool = False,
        bias: ScoreBias | None = None,
    ) -> tuple[Float[jax.Array, "B T D"], LayerCache | None]:
        """`skip_norm`: attention reads x as it is, without the norm before it; may be traced."""
        cfg = self.cfg
        dropout = Dropout(cfg.dropout_residual, deterministic=deterministic)

        def residual(x: jax.Array, name: str, sublayer: Callable[[jax.Array], jax.Array]) -> jax.Array:
            y = x
            if cfg.norm_before:
                y = Norm(cfg, name=f"{name}_norm")(x)
                if name == "attention" and not cfg.first_norm:
                    y = jnp.where(skip_norm, x, y)
            y = sublayer(y)
            if cfg.norm_out:
                y = Norm(cfg, name=f"{name}_out_norm")(y)
            y = x + dropout(y)
            y = Norm(cfg, name=f"{name}_norm")(y) if cfg.norm_position == "post" else y
            return constrain_activation(y, "batch", "stream", "embed")

        def self_attention(y: jax.Array) -> jax.Array:
            nonlocal cache
            attention = Attention(cfg, name="attention")
            y, cache = attention(y, mask, positions, cache, length, None, deterministic, rotary_base, bias)
            return y

        def cross_attention(y: jax.Array) -> jax.Array:
            attention = Attention(cfg, name="cross")
            seen = memory if cache is None else cache.cross_kv
            return attention(y, memory_mask, positions, memory=seen, deterministic=deterministic)[0]

        mlp = MLP(cfg, name="mlp")
        if cfg.parallel:
            y = Norm(cfg, name="attention_norm")(x)
            other = Norm(cfg, name="mlp_norm")(x) if cfg.parallel == "two_norms" else y
            x = constrain_activation(x + dropout(self_attention(y)), "batch", "stream", "embed")
        else:
            x = residual(x, "attention", self_attention)
        if self.cross:
            x = residual(x, "cross", cross_attention)
        if cfg.parallel:
            return constrain_activation(x + dropout(mlp(other)), "batch", "stream", "embed"), cache
        return residual(x, "mlp", mlp), cache
