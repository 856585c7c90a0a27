"""Models whose every probability is known, behind the calls that the experiments use."""

from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bothways.data import tokenizer as tokenizers
from bothways.data.tokenizer import Tokenizer
from bothways.model.config import TransformerConfig
from bothways.recipes import Recipe
from bothways.rundir import Run
from bothways.sample.masked import MaskedModel


class Bigram(nn.Module):
    """p(token | the one before it) is a row of a table, whatever else is in sight: exact, and read forward."""

    size: int
    both_ways: bool = False

    @nn.compact
    def __call__(self, tokens, positions=None, segments=None, types=None, deterministic=True):
        return jnp.roll(jnp.eye(self.size)[tokens], 1, axis=1)

    def transform(self, features):
        return features

    def unembedding(self):
        return self.variables["params"]["table"].T, None, 0.0

    def logits(self, features):
        return features @ self.variables["params"]["table"]


def characters(texts: list[str]) -> Tokenizer:
    return tokenizers.train(texts, "char", 8192)


def bigram(tokenizer: Tokenizer, logits: np.ndarray | None = None, context_length: int = 64) -> MaskedModel:
    """A model of these logits [V, V], or one to which all tokens are alike."""
    V = len(tokenizer)
    recipe = Recipe(model=TransformerConfig(context_length=context_length, vocab_size=V))
    params = {"table": jnp.zeros((V, V)) if logits is None else jnp.asarray(logits, jnp.float32)}
    return MaskedModel(Run(Path(), recipe, tokenizer, Bigram(V), params, 0))


def told_by(
    tokenizer: Tokenizer, tell: Callable[[list[int], int], dict[int, float]], context_length: int = 64
) -> MaskedModel:
    """A masked model that says, of a row and a place in it, these probabilities of tokens."""

    def logits_of(tokens, segments, positions):
        logits = np.full((*positions.shape, len(tokenizer)), -np.inf, np.float32)
        for i, (row, real, here) in enumerate(zip(tokens.tolist(), segments, positions.tolist(), strict=True)):
            for k, position in enumerate(here):
                for token, p in tell(row[: real.sum()], position).items() if position < real.sum() and position else ():
                    logits[i, k, token] = np.log(p)
        return logits

    def read(params, tokens, segments, positions):
        shape = jax.ShapeDtypeStruct((*positions.shape, len(tokenizer)), jnp.float32)
        return jax.pure_callback(lambda *args: logits_of(*map(np.asarray, args)), shape, tokens, segments, positions)

    model = bigram(tokenizer, context_length=context_length)
    model.reader = read
    return model
