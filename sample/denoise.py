"""A denoising step: which of the hidden tokens of a canvas are kept after a forward pass. And the loop that fills masks.

All of it is jitted, and each row goes by itself: what it gets depends on its own tokens and key.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from bothways.errors import InputError
from bothways.sample.sampling_params import SamplingParams, sample_token


@flax.struct.dataclass
class Denoising:
    """How a canvas is filled. The numbers may change without a new compile."""

    steps: Int[jax.Array, ""]
    """Forward passes for a canvas; in each the most confident of the hidden tokens are kept. 0: one token a pass."""
    threshold: Float[jax.Array, ""]
    """Log-probability from which a token is kept whatever the number (arXiv 2505.22618, section 3.3); above 0: off."""
    remask: bool = flax.struct.field(pytree_node=False, default=False)
    """Whether tokens that are kept may be hidden again when others are more confident (arXiv 1904.09324, section 3)."""
    any_order: bool = flax.struct.field(pytree_node=False, default=False)
    """Tokens are kept in a random order instead of the most confident first: one a pass, that draws from the model's own
    distribution (arXiv 2406.07524, section 3.2.3), where the most confident first makes text duller than the model's."""

    @classmethod
    def make(cls, steps: int = 0, threshold: float = 0.0, remask: bool = False, any_order: bool = False) -> "Denoising":
        """Threshold is a probability; 0 turns it off.

        Raises:
          InputError: a number outside its range.
        """
        if steps < 0:
            raise InputError(f"steps is {steps}; it must be 1 or more, or 0 for one token a step")
        if not 0 <= threshold <= 1:
            raise InputError(f"threshold is {threshold}; it is a probability, from 0 (off) to 1")
        if any_order and (threshold or remask):
            raise InputError("a random order knows no confidence: leave out the threshold and remasking, or any-order")
        return cls(jnp.int32(steps), jnp.float32(jnp.log(threshold) if threshold else 1.0), remask, any_order)


@flax.struct.dataclass
class Canvas:
    """Tokens that are written together, P of each row."""

    tokens: Int[jax.Array, "B P"]
    logprobs: Float[jax.Array, "B P"]
    """What each token had when it was kept."""
    open: Bool[jax.Array, "B P"]
    """What is to be written; the rest is context, or behind the end."""
    hidden: Bool[jax.Array, "B P"]
    """What is not written yet."""
    step: Int[jax.Array, " B"]
    """Denoising steps so far."""


def keep_confident(
    canvas: Canvas, tokens: Int[jax.Array, "B P"], logprobs: Float[jax.Array, "B P"], how: Denoising, keys: jax.Array
) -> Canvas:
    """The canvas after a step that proposed these tokens for what is hidden: the most confident of them are kept, or some
    at random, as many as make the steps come out even, and all that reach the threshold; at least one.

    Args:
      keys: [B, P], those that the tokens were drawn with.
    """
    left = jnp.sum(canvas.hidden, axis=1)
    steps = jnp.where(how.steps > 0, how.steps, jnp.sum(canvas.open, axis=1))
    share = -(-left // jnp.maximum(steps - canvas.step, 1))
    sure = jnp.sum(canvas.hidden & (logprobs >= how.threshold), axis=1)
    already = jnp.sum(canvas.open & ~canvas.hidden, axis=1)
    wanted = already + jnp.where(how.threshold > 0, share, jnp.maximum(share, sure))
    now = jnp.where(canvas.hidden, logprobs, canvas.logprobs)
    confidence = now if how.remask else jnp.where(canvas.hidden, logprobs, jnp.inf)
    if how.any_order:
        confidence = jnp.where(
            canvas.hidden, jax.vmap(jax.vmap(jax.random.uniform))(fold(keys, jnp.zeros_like(canvas.tokens))), jnp.inf
        )
    # Weights that are not finite give NaN: the least confident of what is open, so that the canvas fills and the loop ends.
    least = jnp.finfo(jnp.float32).max
    cost = jnp.nan_to_num(-confidence, nan=least, posinf=least, neginf=-jnp.inf)
    order = jnp.argsort(jnp.where(canvas.open, cost, jnp.inf), axis=1)
    rank = jnp.argsort(order, axis=1)
    keep = canvas.open & (rank < wanted[:, None])
    return canvas.replace(
        tokens=jnp.where(canvas.hidden, tokens, canvas.tokens),
        logprobs=now,
        hidden=canvas.open & ~keep,
        step=canvas.step + 1,
    )


def fold(keys: jax.Array, numbers: Int[jax.Array, "B P"]) -> jax.Array:
    """[B, P] keys: each row's key, or each position's, with a number folded in."""
    keys = jnp.broadcast_to(keys[:, None], numbers.shape) if keys.ndim == 1 else keys
    return jax.vmap(jax.vmap(jax.random.fold_in))(keys, numbers)


def propose(logits: Float[jax.Array, "B P V"], keys: jax.Array, method: SamplingParams) -> tuple[jax.Array, jax.Array]:
    """A token for every position of the canvas, [B, P], and its log-probability."""
    B, P, V = logits.shape
    tokens, logprobs = sample_token(logits.reshape(B * P, V), keys.reshape(-1), method)
    return tokens.reshape(B, P), logprobs.reshape(B, P)


@dataclasses.dataclass(frozen=True)
class HiddenLogits:
    """(params, tokens [B, T], segments [B, T], positions [B, P]) -> [B, P, V] of a model that reads both ways."""

    module: nn.Module

    def __call__(self, params: Any, tokens: jax.Array, segments: jax.Array, positions: jax.Array) -> jax.Array:
        def run(bound: nn.Module) -> jax.Array:
            features = bound(tokens, segments=segments)
            return bound.logits(jnp.take_along_axis(features, positions[..., None], axis=1))

        return self.module.apply({"params": params}, method=run)


@functools.partial(jax.jit, static_argnums=0)
def hidden_logits(
    module: nn.Module, params: Any, tokens: jax.Array, segments: jax.Array, positions: jax.Array
) -> Float[jax.Array, "B P V"]:
    """Scores of every token at `positions`."""
    return HiddenLogits(module)(params, tokens, segments, positions)


@flax.struct.dataclass
class FilledRows:
    tokens: Int[jax.Array, "B P"]
    logprobs: Float[jax.Array, "B P"]
    candidates: Int[jax.Array, "B P K"]
    """The most likely tokens when a mask was filled, best first."""
    candidate_logprobs: Float[jax.Array, "B P K"]


@functools.partial(jax.jit, static_argnames=("reader", "top"))
def fill(
    reader: Callable[..., jax.Array],
    params: Any,
    tokens: Int[jax.Array, "B T"],
    segments: Int[jax.Array, "B T"],
    positions: Int[jax.Array, "B P"],
    open_: Bool[jax.Array, "B P"],
    barred: Bool[jax.Array, " V"],
    keys: jax.Array,
    method: SamplingParams,
    how: Denoising,
    sweeps: Int[jax.Array, ""],
    top: int = 0,
) -> FilledRows:
    """Fill the masks at `positions` of every row, as far as they are `open_`.

    Args:
      reader: as HiddenLogits.
      barred: tokens that are never written.
      keys: [B], one per row.
      sweeps: times that each token is masked and drawn again afterwards, one after the other (Gibbs sampling,
        arXiv 1902.04094).
      top: K, candidates that are returned.
    """
    B, P = positions.shape
    index = jnp.arange(P)[None]
    rows = jnp.arange(B)[:, None]

    def read(canvas_tokens: jax.Array, hidden: jax.Array, at: jax.Array) -> jax.Array:
        """[B, N, V] at positions [B, N], the hidden tokens of the canvas masked."""
        written = jnp.where(hidden | ~open_, jnp.take_along_axis(tokens, positions, axis=1), canvas_tokens)
        # what is not open has its index behind the row, and is dropped
        seen = tokens.at[rows, jnp.where(open_, positions, tokens.shape[1])].set(written, mode="drop")
        return jnp.where(barred, -jnp.inf, reader(params, seen, segments, at))

    def step(carry: tuple[Canvas, FilledRows]) -> tuple[Canvas, FilledRows]:
        canvas, best = carry
        logits = read(canvas.tokens, canvas.hidden, positions)
        numbers = jnp.broadcast_to(index, (B, P))
        own = fold(fold(keys, numbers), jnp.broadcast_to(canvas.step[:, None], (B, P)))
        after = keep_confident(canvas, *propose(logits, own, method), how, own)
        going = jnp.any(canvas.hidden, axis=1, keepdims=True)
        if top:
            values, ids = jax.lax.top_k(jax.nn.log_softmax(logits), top)
            just = (canvas.hidden & ~after.hidden)[..., None]
            best = best.replace(
                candidates=jnp.where(just, ids, best.candidates),
                candidate_logprobs=jnp.where(just, values, best.candidate_logprobs),
            )
        after = after.replace(step=canvas.step + going[:, 0])
        return jax.tree.map(
            lambda new, old: jnp.where(going if new.ndim == 2 else going[:, 0], new, old), after, canvas
        ), best

    zeros = jnp.zeros((B, P), jnp.int32)
    canvas = Canvas(zeros, zeros.astype(jnp.float32), open_, open_, jnp.zeros((B,), jnp.int32))
    none = jnp.zeros((B, P, top), jnp.int32)
    best = FilledRows(zeros, zeros.astype(jnp.float32), none, none.astype(jnp.float32))
    canvas, best = jax.lax.while_loop(lambda carry: jnp.any(carry[0].hidden), step, (canvas, best))

    def draw_again(i: jax.Array, canvas: Canvas) -> Canvas:
        k = i % P
        this = open_ & (index == k)
        at = jax.lax.dynamic_slice_in_dim(positions, k, 1, axis=1)
        numbers = jnp.full((B, 1), k)
        redrawn = fold(fold(keys, numbers), jnp.full((B, 1), jnp.iinfo(jnp.int32).max - i // P))
        found, logprobs = propose(read(canvas.tokens, this, at), redrawn, method)
        return canvas.replace(
            tokens=jnp.where(this, found, canvas.tokens), logprobs=jnp.where(this, logprobs, canvas.logprobs)
        )

    canvas = jax.lax.fori_loop(0, sweeps * P, draw_again, canvas)
    return best.replace(tokens=canvas.tokens, logprobs=canvas.logprobs)
