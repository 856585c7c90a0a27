"""Vectors of texts, from a body that reads both ways; with or without a head that predicts tokens."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from common.errors import InputError
from common.rundir import Run
from sample.decode import bucket, close_bucket

BATCH = 64


@functools.partial(jax.jit, static_argnums=(0, 4))
def pooled(module: nn.Module, params: Any, tokens: jax.Array, segments: jax.Array, pool: str) -> jax.Array:
    """[B, D] one vector per row: the first token's features, or the mean over the row."""
    features = module.apply({"params": params}, tokens, segments=segments).astype(jnp.float32)
    if pool == "cls":
        return features[:, 0]
    real = (segments > 0)[..., None]
    return jnp.sum(features * real, axis=1) / jnp.sum(real, axis=1)


def padded(rows: Sequence[Sequence[int]], context: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows as [B, T] tokens and segments, both dimensions in their buckets."""
    T, B = min(close_bucket(max(map(len, rows))), context), bucket(len(rows), 1)
    tokens, segments = np.full((B, T), pad, np.int32), np.zeros((B, T), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], segments[i, : len(row)] = row, 1
    return tokens, segments


class Embedder:
    """A bidirectional run that can be asked: `embed`. Made by `bothways.load`, of a body without a masked-token head."""

    def __init__(self, run: Run):
        self.run, self.recipe, self.tokenizer = run, run.recipe, run.tokenizer
        self.context = run.recipe.model.context

    def _wrap(self, ids: Sequence[int]) -> list[int]:
        return [self.tokenizer.bos, *ids, self.tokenizer.eos]

    def embed(self, texts: Sequence[str], pool: str = "mean") -> np.ndarray:
        """[texts, D] float32: the features of [CLS], or the mean over [CLS], text and [SEP].

        Raises:
          InputError: a text longer than the context, or another pool.
        """
        if pool not in ("cls", "mean"):
            raise InputError(f"pool {pool!r} is unknown; there are cls and mean")
        rows = [self._wrap(self.tokenizer.encode(text)) for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if len(row) > self.context:
                raise InputError(f"{len(row)} tokens, and the context is {self.context}: {text[:60]!r}...; shorten it")
        found = []
        for begin in range(0, len(rows), BATCH):
            tokens, segments = padded(rows[begin : begin + BATCH], self.context, self.tokenizer.pad)
            vectors = pooled(self.run.module, self.run.params, tokens, segments, pool)
            found.append(np.asarray(vectors)[: len(rows[begin : begin + BATCH])])
        return np.concatenate(found)
