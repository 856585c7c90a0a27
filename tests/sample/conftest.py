"""A real model, small, with random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bothways.model.cache import Cache
from bothways.model.gpt import GPT
from bothways.sample.decode import Decoder


@dataclasses.dataclass(frozen=True)
class TinyGPT:
    module: GPT
    params: dict
    decoder: Decoder

    def __post_init__(self):
        forward = jax.jit(lambda params, tokens: self.module.apply({"params": params}, tokens, method=self._logprobs))
        object.__setattr__(self, "_forward", forward)

    @staticmethod
    def _logprobs(bound: GPT, tokens):
        return jax.nn.log_softmax(bound.logits(bound(tokens)[0]))

    def logprobs(self, tokens: list[int]) -> np.ndarray:
        """[T, V]: what follows each token, from one pass without a cache over a row of the full context."""
        context = self.module.cfg.context_length
        assert len(tokens) <= context
        padded = np.zeros((1, context), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(self._forward(self.params, padded))[0, : len(tokens)]


@pytest.fixture(scope="session")
def gpt(tiny) -> TinyGPT:
    """One layer with weights drawn at random, and no token that ends a text."""
    cfg = dataclasses.replace(tiny, n_layers=1)
    module = GPT(cfg)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    rng = np.random.default_rng(7)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.3, s.shape), s.dtype), shapes)

    def forward(params, tokens, cache):
        return module.apply({"params": params}, tokens, cache=cache)

    def logits(params, features):
        return module.apply({"params": params}, features, method="logits")

    decoder = Decoder(
        forward, logits, lambda params, batch, size, source: Cache.empty(cfg, batch, size), cfg.context_length, eos=-1
    )
    return TinyGPT(module, params, decoder)
