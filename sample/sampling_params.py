"""How scores become a token: pure functions of (logits, key)."""

import math
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from bothways.errors import InputError


@flax.struct.dataclass
class SamplingParams:
    """Greedy, or sampling after temperature, top-k, top-p and min-p, in this order.

    The numbers may change without a new compile, and may be one for each row, [B, 1].
    """

    temperature: Float[jax.Array, ""]
    top_k: Int[jax.Array, ""]
    top_p: Float[jax.Array, ""]
    min_p: Float[jax.Array, ""]
    greedy: bool = flax.struct.field(pytree_node=False, default=False)
    filtered: bool = flax.struct.field(pytree_node=False, default=False)
    """Whether any filter is on; without, no step sorts the vocabulary."""
    never: int = flax.struct.field(pytree_node=False, default=-1)
    """A token that is not drawn, such as [UNK], which stands for no text; -1: none."""

    @classmethod
    def make(
        cls,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        greedy: bool = False,
        never: int = -1,
    ) -> "SamplingParams":
        """0 turns top_k and min_p off, 1 turns top_p off; temperature 0 is greedy.

        Raises:
          InputError: a number outside its range.
        """
        if not 0 <= temperature < math.inf:
            raise InputError(f"temperature is {temperature}; it must be 0 (greedy) or more, and finite")
        if not 0 <= top_k < 2**31:
            raise InputError(f"top-k is {top_k}; it must be 0 (off) or the number of tokens to keep")
        if not 0 < top_p <= 1:
            raise InputError(f"top-p is {top_p}; it must be in (0, 1]")
        if not 0 <= min_p <= 1:
            raise InputError(f"min-p is {min_p}; it must be in [0, 1]")
        return cls(
            jnp.float32(max(temperature, 1e-6)),
            jnp.int32(top_k),
            jnp.float32(top_p),
            jnp.float32(min_p),
            greedy=greedy or temperature == 0,
            filtered=bool(top_k or top_p < 1 or min_p),
            never=never,
        )


def filter_logits(logits: Float[jax.Array, "B V"], method: SamplingParams) -> Float[jax.Array, "B V"]:
    """Logits with the unlikely tokens at minus infinity; of tokens equally likely the first are kept.

    top-k keeps the k most likely; top-p (arXiv 1904.09751) the fewest of those whose probabilities reach p;
    min-p (arXiv 2407.01082) those with at least min_p times the probability of the most likely.
    """
    k = jnp.where(method.top_k == 0, jnp.inf, method.top_k)
    logits = jnp.where(most_likely(logits, jnp.ones_like(logits), k), logits, -jnp.inf)
    p = jax.nn.softmax(logits, axis=-1)
    likely = most_likely(logits, p, jnp.where(method.top_p == 1, jnp.inf, method.top_p))
    return jnp.where(likely & (p >= method.min_p * jnp.max(p, axis=-1, keepdims=True)), logits, -jnp.inf)


def most_likely(
    logits: Float[jax.Array, "B V"],
    weights: Float[jax.Array, "B V"],
    enough: Float[jax.Array, ""] | Float[jax.Array, "B 1"],
) -> Bool[jax.Array, "B V"]:
    """The fewest of each row's tokens, from the most likely down, whose weights sum to `enough`, or all.

    Tokens equally likely have equal weights. Without a sort, which takes ten times as long on a CPU: the score of the last
    token that is kept is found bit by bit, the highest first, each by a sum over the row.
    """
    enough = jnp.broadcast_to(enough, (logits.shape[0], 1))[:, 0]
    raw = jax.lax.bitcast_convert_type(jnp.where(logits == 0, 0.0, logits).astype(jnp.float32), jnp.uint32)
    order = jnp.where(raw >> 31 == 1, ~raw, raw | jnp.uint32(1 << 31))  # of floats, as unsigned numbers
    index = jnp.arange(logits.shape[-1], dtype=jnp.uint32)

    def above(bound: jax.Array, inclusive: bool = False) -> Float[jax.Array, " B"]:
        seen = order >= bound[:, None] if inclusive else order > bound[:, None]
        return jnp.sum(jnp.where(seen, weights, 0), axis=-1)

    rows = jnp.zeros(logits.shape[0], jnp.uint32)
    bits = jnp.where(jnp.any(jnp.sum(weights, axis=-1) >= enough), 32, 0)
    bound = _largest(rows, bits, lambda bound: above(bound, True) >= enough)
    tied = order == bound[:, None]
    each, more = jnp.max(jnp.where(tied, weights, 0), axis=-1), above(bound)

    def few(i: jax.Array) -> jax.Array:
        """Whether the tied tokens before place i are too few."""
        return more + each * jnp.sum(tied & (index < i[:, None]), axis=-1) < enough

    spare = jnp.any(more + each * (jnp.sum(tied, axis=-1) - 1) >= enough)
    last = _largest(rows, jnp.where(spare, len(index).bit_length(), 0), few)
    return (order > bound[:, None]) | (tied & ((index <= last[:, None]) | ~spare))


def _largest(zeros: jax.Array, bits: int | jax.Array, holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """For every row the largest number of so many bits for which `holds`, which is so of 0 and of all below one that does."""

    def tried(i: jax.Array, found: jax.Array) -> jax.Array:
        next_ = found | (jnp.uint32(1) << jnp.uint32(bits - 1 - i))
        return jnp.where(holds(next_), next_, found)

    return jax.lax.fori_loop(0, bits, tried, zeros)


GROUP = 128
"""Tokens whose probabilities are summed before one of them is drawn: as many as a TPU has lanes."""


def draw(logits: Float[jax.Array, "B V"], keys: jax.Array) -> Int[jax.Array, " B"]:
    """A token per row with the probabilities softmax(logits): where a uniform number falls among the running sums.

    First a group of GROUP neighbours by its sum, then a token of the group: two random numbers a row, where adding Gumbel
    noise (jax.random.categorical) takes V of them, ten times as long on a CPU.
    """
    B, V = logits.shape
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.pad(weights, ((0, 0), (0, -V % GROUP))).reshape(B, -1, GROUP)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)

    def chosen(weights: Float[jax.Array, "B N"], uniform: Float[jax.Array, " B"]) -> Int[jax.Array, " B"]:
        sums, index = jnp.cumsum(weights, axis=-1), jnp.arange(weights.shape[-1])
        # Sums are rounded, and may grow where a weight is zero: such a one is never chosen.
        passed = (sums > (uniform * sums[:, -1])[:, None]) & (weights > 0)
        # Where none has passed, as with scores that are not finite, the index stays within the row.
        last = jnp.max(jnp.where(weights > 0, index, 0), axis=-1)
        return jnp.minimum(jnp.min(jnp.where(passed, index, len(index)), axis=-1), last)

    group = chosen(jnp.sum(weights, axis=-1), uniform[:, 0])
    within = jnp.take_along_axis(weights, group[:, None, None], axis=1)[:, 0]
    return (group * GROUP + chosen(within, uniform[:, 1])).astype(jnp.int32)


def sample_token(
    logits: Float[jax.Array, "B V"], keys: jax.Array, method: SamplingParams
) -> tuple[Int[jax.Array, " B"], Float[jax.Array, " B"]]:
    """A token per row and its log-probability, in nats, under the model's own distribution (temperature 1, no filter).

    Args:
      keys: [B], one random key per row.
    """
    own = logits
    if method.never >= 0:
        logits = logits.at[..., method.never].set(-jnp.inf)
    if method.greedy:  # the first of the most likely; jnp.argmax takes three times as long on a CPU
        ids, top = jnp.arange(logits.shape[-1]), logits >= jnp.max(logits, axis=-1, keepdims=True)
        tokens = jnp.min(jnp.where(top, ids, ids[-1]), axis=-1)
    else:
        scaled = logits / method.temperature
        if method.filtered:
            scaled = filter_logits(scaled, method)
        tokens = draw(scaled, keys)
    logprob = jnp.take_along_axis(own, tokens[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(own, axis=-1)
    return tokens.astype(jnp.int32), logprob
