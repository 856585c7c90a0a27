"""Language models whose every probability is known, behind the callbacks that sampling uses."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from bothways.model.cache import Cache, LayerCache
from bothways.sample.decode import Decoder


@dataclasses.dataclass(frozen=True)
class Known:
    """A model of V tokens; `logprobs` says without JAX what follows a sequence.

    Its parameters are a table of log-probabilities, so that models of one size share their programs.
    """

    params: np.ndarray
    forward: Callable
    logits: Callable
    logprobs: Callable[[list[int]], np.ndarray]
    eos: int

    def decoder(self, context: int) -> Decoder:
        return Decoder(self.forward, self.logits, empty_cache, context, self.eos)

    def total(self, prompt: list[int], tokens: list[int]) -> float:
        """log p(tokens | prompt)"""
        return float(sum(self.logprobs(prompt + tokens[:i])[t] for i, t in enumerate(tokens)))

    def greedy(self, prompt: list[int], most: int) -> list[int]:
        tokens: list[int] = []
        while len(tokens) < most and self.eos not in tokens:
            tokens.append(int(np.argmax(self.logprobs(prompt + tokens))))
        return tokens


def empty_cache(params, batch: int, size: int, source=None) -> Cache:
    zeros = jnp.zeros((batch, 1, size, 1))
    return Cache((LayerCache(zeros, zeros),), jnp.zeros((batch,), jnp.int32))


def read(params, features):
    return features @ params


def table_of(rows: int, tokens: int, seed: int, sharpness: float = 1.5) -> np.ndarray:
    """[rows, tokens] log-probabilities, drawn at random."""
    logits = np.random.default_rng(seed).normal(0, sharpness, (rows, tokens))
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def markov(transitions: np.ndarray, eos: int) -> Known:
    """The next token depends on the last one: row of `transitions`, log-probabilities [V, V]."""

    def forward(params, tokens, cache):
        return jax.nn.one_hot(tokens, len(transitions)), cache.replace(length=cache.length + tokens.shape[1])

    return Known(np.float32(transitions), forward, read, lambda history: transitions[history[-1]], eos)


def remembering(tokens: int, seed: int, eos: int = 0, eos_bias: float = 0.0, states: int = 251) -> Known:
    """The next token depends on every token before it and on its place, as far as the cache remembers them."""
    log_table = table_of(states, tokens, seed)
    log_table[:, eos] += eos_bias
    log_table -= np.log(np.exp(log_table).sum(axis=1, keepdims=True))
    weights = np.random.default_rng(0).integers(1, states, 512)

    def forward(params, tokens, cache):
        T = tokens.shape[1]
        said = (tokens + 1)[:, :, None, None]
        layer = cache.layers[0].write(said, said, cache.length)
        slots, here = jnp.arange(cache.size), cache.length[:, None] + jnp.arange(T)
        parts = (layer.k[:, 0, :, 0].astype(jnp.int32) * weights[: cache.size])[:, None]
        state = jnp.where(slots <= here[..., None], parts, 0).sum(axis=-1) % states
        return jax.nn.one_hot(state, states), Cache((layer,), cache.length + T)

    def logprobs(history: list[int]) -> np.ndarray:
        return log_table[sum((t + 1) * int(w) for t, w in zip(history, weights, strict=False)) % states]

    return Known(np.float32(log_table), forward, read, logprobs, eos)
