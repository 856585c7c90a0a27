"""The small parts: projection, norm, positions."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from bothways.model.adapters import NAME, LowRank
from bothways.model.axes import PARAMETER_AXES, constrain_kernel
from bothways.model.config import RotaryScaling, TransformerConfig
from bothways.model.products import add_bias, project, project_transposed, standardized

UNSCALED = RotaryScaling()


class Projection(nn.Module):
    """A linear map over the last `n_in` axes of its input, to `features`; kernel [*in, *features], float32."""

    cfg: TransformerConfig
    features: Sequence[int]
    n_in: int = 1
    bias: bool | None = None
    """None: as the configuration says."""
    residual: bool = False
    """True for a projection whose output is added to the residual stream: init_residual applies."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg, dtype = self.cfg, x.dtype
        inputs, features = x.shape[x.ndim - self.n_in :], tuple(self.features)
        fan_in, fan_out = float(np.prod(inputs)), float(np.prod(features))
        std = {"normal": cfg.init_std, "fan_in": fan_in**-0.5, "xavier": (2 / (fan_in + fan_out)) ** 0.5}[cfg.init]
        if self.residual and cfg.init_residual == "depth":
            std *= (2 * cfg.n_layers) ** -0.5
        zero = self.residual and cfg.init_residual == "zero"
        init = nn.initializers.zeros if zero else nn.initializers.normal(std)
        if self.has_variable("params", "kernel_t"):  # of parameters that `transpose_kernels` made
            y = project_transposed(x, self.get_variable("params", "kernel_t"), self.n_in, features)
        else:
            kernel = self.param("kernel", init, (*inputs, *features), jnp.float32).astype(dtype)
            if axes := PARAMETER_AXES.get((self.name, "kernel")):
                kernel = constrain_kernel(kernel, *axes)
            y = project(x, kernel, self.n_in)
        if cfg.lora.rank and self.name in cfg.lora.targets:
            y = y + LowRank(cfg, features, self.n_in, name=NAME)(x)
        if cfg.bias if self.bias is None else self.bias:
            y = add_bias(y, self.param("bias", nn.initializers.zeros, features, jnp.float32))
        return y


class Norm(nn.Module):
    """Layer norm (arXiv 1607.06450) or RMS norm (arXiv 1910.07467) over the last axis, computed in float32."""

    cfg: TransformerConfig
    rms: bool | None = None
    """None: as in the configuration."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg, width = self.cfg, x.shape[-1]
        rms = cfg.norm == "rms" if self.rms is None else self.rms
        y = x.astype(jnp.float32)
        y = standardized(y, cfg.norm_eps, centred=not rms)
        y = y * self.param("scale", nn.initializers.ones, (width,), jnp.float32)
        if cfg.bias and not rms:
            y = y + self.param("bias", nn.initializers.zeros, (width,), jnp.float32)
        return y.astype(x.dtype)


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """cap tanh(x / cap), which is within cap of 0 and near x where x is small (arXiv 2408.00118, section 2); 0: x."""
    return cap * jnp.tanh(x / cap) if cap else x


def rotary_frequencies(width: int, base: float, scaling: RotaryScaling) -> tuple[np.ndarray, float]:
    """Angle per place of each of the width/2 pairs, [K/2] float32; and what queries and keys are multiplied by."""
    half = width // 2
    plain = base ** (-np.arange(half) / half)
    stretched, context = plain / scaling.factor, scaling.original_context
    attention_factor = 1.0
    match scaling.kind:
        case "none":
            kept = 1.0
        case "linear":
            kept = 0.0
        case "llama3":  # a ramp over how often a pair turns within the original context
            turns = context * plain / (2 * np.pi)
            kept = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
        case "yarn":  # a ramp over the pairs' numbers, between those that turn `high` and `low` times

            def pair(turns: float) -> float:
                return half * np.log(context / (2 * np.pi * turns)) / np.log(base)

            first, last = max(np.floor(pair(scaling.high)), 0), min(np.ceil(pair(scaling.low)), width - 1)
            kept = 1 - np.clip((np.arange(half) - first) / max(last - first, 1e-3), 0, 1)
            attention_factor = scaling.attention_factor or 0.1 * np.log(scaling.factor) + 1
    return np.float32(kept * plain + (1 - kept) * stretched), float(attention_factor)


def rotate(
    x: Float[jax.Array, "B T H K"],
    positions: Int[jax.Array, "B T"],
    base: float,
    scaling: RotaryScaling = UNSCALED,
    width: int = 0,
) -> Float[jax.Array, "B T H K"]:
    """Rotary positions (arXiv 2104.09864, section 3.2.2), feature k paired with feature k + K/2.

    Turns pair k by the angle position / base^(2k/K), so that the product of a query and a key depends on the
    distance between them only. `scaling` makes some angles smaller. Of a head's features only the first `width` are turned
    (0: all), with K = width above.
    """
    if width and width < x.shape[-1]:
        turned = rotate(x[..., :width], positions, base, scaling)
        return jnp.concatenate([turned, x[..., width:]], axis=-1)
    half = x.shape[-1] // 2
    frequency, attention_factor = rotary_frequencies(x.shape[-1], base, scaling)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency
    cos, sin = attention_factor * jnp.cos(angle), attention_factor * jnp.sin(angle)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def sinusoid(positions: Int[jax.Array, "B T"], width: int, kind: str = "sinusoidal") -> Float[jax.Array, "B T D"]:
    """Sinusoidal positions (arXiv 1706.03762, section 3.5): feature 2i sin, 2i+1 cos of position / 10000^(2i/D); of the other
    kinds (TransformerConfig.position_embedding) the first half of the features are sines and the second cosines."""
    half = width // 2
    steps = max(half - 1, 1) if kind == "sinusoidal_t2t" else half
    frequency = 10_000.0 ** (-np.arange(half) / steps)
    angle = positions[..., None].astype(jnp.float32) * frequency.astype(np.float32)
    waves = jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1 if kind == "sinusoidal" else -2)
    return waves.reshape(*positions.shape, width)
