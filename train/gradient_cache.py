"""Gradients of a loss over the whole batch, with the activations of a piece of it in memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bothways.train.objectives.core import Batch, Sums

Metrics = dict[str, jax.Array]


def cut(batch: Any, pieces: int) -> Any:
    """[B, ...] -> [pieces, B / pieces, ...]: piece a takes rows a, a + pieces, ...: each device cuts its own rows, and none
    travel."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, pieces, *x.shape[1:]), 1, 0), batch)


def joined(x: jax.Array) -> jax.Array:
    """The batch that `cut` took apart."""
    return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])


def cached_gradients(
    encode: Callable[[Any, Batch, jax.Array], jax.Array],
    compare: Callable[[jax.Array, Batch], Sums],
    measure: Callable[[Sums], tuple[jax.Array, Metrics]],
    params: Any,
    batch: Batch,
    keys: jax.Array,
) -> tuple[Any, Metrics]:
    """Gradients and metrics of measure(compare(encode(params, batch))), which are those of the whole batch (gradient cache,
    arXiv 2101.06983, section 3.2): every piece is encoded, the loss is taken over all vectors together, and then each piece is
    encoded once more, with the gradient of its own vectors.

    Args:
      keys: one for each piece; with dropout both passes drop the same.
    """
    pieces = cut(batch, len(keys))
    _, found = jax.lax.scan(lambda _, x: (None, encode(params, *x)), None, (pieces, keys))

    def loss_of(vectors: jax.Array) -> tuple[jax.Array, Metrics]:
        return measure(compare(vectors, batch))

    (_, metrics), wanted = jax.value_and_grad(loss_of, has_aux=True)(joined(found))

    def add(carry: Any, inputs: Any) -> tuple[Any, None]:
        piece, key, of = inputs
        _, pull = jax.vjp(lambda params: encode(params, piece, key), params)
        return jax.tree.map(jnp.add, carry, pull(of)[0]), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    grads, _ = jax.lax.scan(add, zeros, (pieces, keys, cut(wanted, len(keys))))
    return grads, metrics
