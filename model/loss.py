"""Cross-entropy against a vocabulary, a piece of the sequence at a time."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from bothways.model.axes import constrain_activation, devices_in_use
from bothways.model.heads import logits_of
from bothways.model.products import contract

MAX_LOGITS = 2**27
"""At most so many logits at once on each device (512 MiB in float32)."""


class TokenLoss(NamedTuple):
    """Sums over all tokens: weighted nats, and weighted count of tokens whose most likely prediction is right."""

    nats: Float[jax.Array, ""]
    correct: Float[jax.Array, ""]


def cross_entropy(
    features: Float[jax.Array, "B T D"],
    table: Float[jax.Array, "V D"],
    bias: Float[jax.Array, " V"] | None,
    cap: float,
    targets: Int[jax.Array, "B T"],
    weights: Float[jax.Array, "B T"],
    smoothing: float = 0.0,
    max_logits: int | None = None,
) -> TokenLoss:
    """Sum over tokens of weight * -log softmax(soft_cap(features table^T) + bias)[target]; table, bias and cap are an Unembedding.

    Never holds [B, T, V] at once: the sequence is cut into pieces of at most `max_logits` logits (by default
    MAX_LOGITS for every device that they are spread over), and each piece's gradient is taken while its logits are there, so the backward
    pass computes nothing again.

    Args:
      smoothing: share of the target's probability spread over the vocabulary (arXiv 1512.00567, section 7).
    """
    B, T, _ = features.shape
    limit = max_logits or MAX_LOGITS * devices_in_use()
    pieces = next(n for n in range(1, T + 1) if T % n == 0 and (n == T or B * (T // n) * table.shape[0] <= limit))
    return TokenLoss(*_cross_entropy(features, table, bias, targets, weights, cap, smoothing, pieces))


def token_logprobs(
    features: Float[jax.Array, "B T D"],
    table: Float[jax.Array, "V D"],
    bias: Float[jax.Array, " V"] | None,
    cap: float,
    targets: Int[jax.Array, "B T"],
    max_logits: int | None = None,
) -> Float[jax.Array, "B T"]:
    """log softmax(soft_cap(features table^T) + bias)[target] of every token, in nats; for scoring, without a gradient."""
    B, T, D = features.shape
    limit = max_logits or MAX_LOGITS * devices_in_use()
    pieces = next(
        n for n in range(1, B * T + 1) if B * T % n == 0 and (n == B * T or B * T // n * table.shape[0] <= limit)
    )

    def piece(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits = logits_of(inputs[0], table, bias, cap)
        target = jnp.take_along_axis(logits, inputs[1][:, None], axis=1)[:, 0]
        return target - jax.nn.logsumexp(logits, axis=-1)

    cut = (features.reshape(pieces, -1, D), targets.reshape(pieces, -1))
    return jax.lax.map(piece, cut).reshape(B, T)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _cross_entropy(features, table, bias, targets, weights, cap, smoothing, pieces):
    return _forward(features, table, bias, targets, weights, cap, smoothing, pieces, with_gradient=False)[0]


@jax.named_scope("loss")
def _forward(features, table, bias, targets, weights, cap, smoothing, pieces, with_gradient=True):
    B, T, D = features.shape
    V = table.shape[0]
    narrow = table.astype(features.dtype)

    def piece(carry, inputs):
        sums, d_table, d_bias = carry
        x, y, w = inputs
        capped = constrain_activation(logits_of(x, narrow, None, cap), "batch", "length", "vocab")
        logits = capped if bias is None else capped + bias
        top = jnp.max(logits, axis=-1, keepdims=True)
        exp = jnp.exp(logits - top)
        total = jnp.sum(exp, axis=-1, keepdims=True)
        hit = jnp.arange(V) == y[..., None]
        target = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
        logsumexp = (top + jnp.log(total))[..., 0]
        nats = logsumexp - (1 - smoothing) * target
        if smoothing:
            nats -= smoothing * jnp.mean(logits, axis=-1)
        sums = sums + jnp.stack([jnp.sum(w * nats), jnp.sum(w * (target >= top[..., 0]))])
        if not with_gradient:
            return (sums, d_table, d_bias), None
        # w (exp / total - wanted), with one division a token.
        wanted = jnp.where(hit, (1 - smoothing + smoothing / V) * w[..., None], smoothing / V * w[..., None])
        d_logits = exp * (w[..., None] / total) - wanted
        d_products = d_logits * (1 - jnp.square(capped / cap)) if cap else d_logits
        narrow_d = d_products.astype(x.dtype)
        dx = contract("btv,vd->btd", narrow_d, narrow)
        d_table += contract("btv,btd->vd", narrow_d, x, jnp.float32)
        if bias is not None:
            d_bias += jnp.sum(d_logits, axis=(0, 1))
        return (sums, d_table, d_bias), dx

    zero = jnp.zeros((2,), jnp.float32)
    carry = (zero, jnp.zeros((V, D) if with_gradient else (), jnp.float32), jnp.zeros((V,), jnp.float32))
    inputs = (features, targets, weights.astype(jnp.float32))
    if pieces == 1:
        (sums, d_table, d_bias), dx = piece(carry, inputs)
    else:
        # Piece n takes positions n, n + pieces, ...: where positions are sharded, each device cuts its own.
        cut = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(B, T // pieces, pieces, *a.shape[2:]), 2, 0), inputs)
        (sums, d_table, d_bias), dx = jax.lax.scan(piece, carry, cut)
        if with_gradient:
            dx = jnp.moveaxis(dx, 0, 2).reshape(B, T, D)
    return (sums[0], sums[1]), (dx, d_table, None if bias is None else d_bias)


def _fwd(features, table, bias, targets, weights, cap, smoothing, pieces):
    return _forward(features, table, bias, targets, weights, cap, smoothing, pieces)


def _bwd(cap, smoothing, pieces, gradients, cotangents):
    dx, d_table, d_bias = gradients
    g = cotangents[0]
    return dx * g.astype(dx.dtype), d_table * g, None if d_bias is None else d_bias * g, None, None


_cross_entropy.defvjp(_fwd, _bwd)
