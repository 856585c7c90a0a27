"""Beam search, over the same model callback as sampling."""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from bothways.model.cache import Cache
from bothways.sample.decode import Forward, Logits

NEG_INF = -1e30


def length_penalty(length: jax.Array, alpha: float) -> jax.Array:
    """((5 + length) / 6)^alpha; a hypothesis' log-probability is divided by it (arXiv 1609.08144, equation 14)."""
    return ((5.0 + length) / 6.0) ** alpha


@flax.struct.dataclass
class Beams:
    """Alive hypotheses and finished ones of every row, K in all, each best first; empty slots score NEG_INF."""

    cache: Cache
    logits: Float[jax.Array, "B K V"]
    alive: Int[jax.Array, "B K N"]
    alive_logprob: Float[jax.Array, "B K"]
    finished: Int[jax.Array, "B K N"]
    finished_score: Float[jax.Array, "B K"]
    finished_logprob: Float[jax.Array, "B K"]
    finished_length: Int[jax.Array, "B K"]
    count: Int[jax.Array, ""]


def make_beam_search(forward: Forward, logits: Logits, eos: int) -> Callable[..., Beams]:
    """A jitted (params, cache, logits [B, V], limit [B], beams, alpha) -> Beams, from prefilled rows.

    A row has K slots. In each step the most likely extensions take those that are left; one that ends, with `eos`
    or at the row's limit, keeps its place. So a beam of 1 is greedy decoding, and one that holds everything is
    exhaustive search. The result's `finished` holds the finished, sorted by score: log-probability over length penalty.
    """

    @functools.partial(jax.jit, static_argnames=("beams", "alpha", "size"))
    def search(
        params: Any, cache: Cache, first: jax.Array, limit: jax.Array, beams: int, alpha: float, size: int
    ) -> Beams:
        B, V = first.shape
        K = beams
        rows = jnp.repeat(jnp.arange(B), K)
        pick = jnp.arange(B)[:, None]
        zeros = jnp.zeros((B, K, size), jnp.int32)
        never = jnp.full((B, K), NEG_INF)
        begin = Beams(
            cache=cache.gather_rows(rows) if K > 1 else cache,
            logits=jnp.repeat(first[:, None], K, axis=1),
            alive=zeros,
            alive_logprob=never.at[:, 0].set(0.0),  # all beams are the same at first: one of them counts
            finished=zeros,
            finished_score=never,
            finished_logprob=never,
            finished_length=jnp.zeros((B, K), jnp.int32),
            count=jnp.int32(0),
        )

        def going(s: Beams) -> jax.Array:
            return jnp.any((s.count < limit) & (s.alive_logprob[:, 0] > NEG_INF / 2))

        def step(s: Beams) -> Beams:
            logprob = s.alive_logprob[..., None] + jax.nn.log_softmax(s.logits, axis=-1)
            top, index = jax.lax.top_k(logprob.reshape(B, K * V), K)
            slots = K - jnp.sum(s.finished_score > NEG_INF / 2, axis=1)
            top = jnp.where(jnp.arange(K) < slots[:, None], top, NEG_INF)
            beam, token = index // V, index % V
            texts = s.alive[pick, beam].at[:, :, s.count].set(token)
            length = s.count + 1
            ends = ((token == eos) | (length >= limit[:, None])) & (s.count < limit)[:, None] & (top > NEG_INF / 2)

            score = jnp.where(ends, top / length_penalty(length.astype(jnp.float32), alpha), NEG_INF)
            all_score = jnp.concatenate([s.finished_score, score], axis=1)
            finished_score, best = jax.lax.top_k(all_score, K)

            def merge(old: jax.Array, new: jax.Array) -> jax.Array:
                return jnp.concatenate([old, new], axis=1)[pick, best]

            alive_logprob, kept = jax.lax.top_k(jnp.where(ends, NEG_INF, top), K)
            source, next_token = beam[pick, kept], token[pick, kept]
            cache = s.cache.gather_rows((pick * K + source).reshape(-1), cross=False)
            features, cache = forward(params, next_token.reshape(-1, 1), cache)
            return Beams(
                cache=cache,
                logits=logits(params, features[:, 0]).reshape(B, K, V),
                alive=texts[pick, kept],
                alive_logprob=alive_logprob,
                finished=merge(s.finished, texts),
                finished_score=finished_score,
                finished_logprob=merge(s.finished_logprob, top),
                finished_length=merge(s.finished_length, jnp.full_like(token, length)),
                count=length,
            )

        return jax.lax.while_loop(going, step, begin)

    return search
