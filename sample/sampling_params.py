"""How scores become a token: pure functions of (logits, key)."""

import math

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from bothways.errors import InputError


@flax.struct.dataclass
class SamplingParams:
    """Greedy, or sampling after temperature, top-k, top-p and min-p, in this order.

    The numbers may change without a new compile.
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
    """Logits with the unlikely tokens at minus infinity.

    top-k keeps the k most likely; top-p (arXiv 1904.09751) the fewest of those whose probabilities reach p;
    min-p (arXiv 2407.01082) those with at least min_p times the probability of the most likely.
    """
    order = jnp.argsort(-logits, axis=-1)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    rank = jnp.arange(logits.shape[-1])
    ranked = jnp.where((method.top_k == 0) | (rank < method.top_k), ranked, -jnp.inf)
    p = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(p, axis=-1) - p
    keep = (before < method.top_p) & (p >= method.min_p * p[:, :1])
    ranked = jnp.where(keep | (rank == 0), ranked, -jnp.inf)
    return jnp.put_along_axis(logits, order, ranked, axis=-1, inplace=False)


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
        tokens = jax.vmap(jax.random.categorical)(keys, scaled)
    logprob = jnp.take_along_axis(jax.nn.log_softmax(own, axis=-1), tokens[:, None], axis=-1)[:, 0]
    return tokens.astype(jnp.int32), logprob
