"""Vectors of texts, from any body; and runs that make vectors alone."""

import collections
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bothways.data.contrasts import framed
from bothways.embedding import EmbeddingInfo, read_embedding
from bothways.errors import InputError
from bothways.model.seq2seq import Seq2Seq
from bothways.model.task import text_vectors
from bothways.rundir import Run
from bothways.sample.batching import batched, laid_out, rows_that_fit, sharing_rows

AHEAD = 2
"""Batches that are on their way to the device while one is computed."""
SHARED = 64
"""Short texts share rows of so many tokens: few shapes are compiled for them, and little of a row is padding."""
SHARING = 16
"""Most texts in such a row."""


@functools.partial(jax.jit, static_argnums=(0, 5))
def pooled(
    module: nn.Module, params: Any, tokens: jax.Array, positions: jax.Array, segments: jax.Array, pool: str
) -> jax.Array:
    """[B, N, D] a vector for each segment of a row, in rows of at most SHARED tokens N = SHARING, else 1: features of its first
    token or its last, or the mean over it; the encoder's, where there is one."""
    method = "encode" if isinstance(module, Seq2Seq) else None
    features = module.apply({"params": params}, tokens, positions=positions, segments=segments, method=method)
    features = (features[0] if isinstance(features, tuple) else features).astype(jnp.float32)
    return text_vectors(features, segments, pool, SHARING if tokens.shape[1] <= SHARED else 1)


def prompted(info: EmbeddingInfo, texts: Sequence[str], prompt: str) -> list[str]:
    """Texts behind the prompt of this name, or behind the run's default one.

    Raises:
      InputError: the run has no prompt of this name.
    """
    name = prompt or info.default_prompt
    if name and name not in info.prompts:
        raise InputError(f"no prompt {name!r}; this run has {', '.join(info.prompts) or 'none'}")
    return [info.prompts.get(name, "") + text for text in texts]


def published_rows(run: Run, info: EmbeddingInfo, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of texts wrapped as a published vocabulary wraps them, of long ones the first."""
    tokenizer = run.tokenizer.framing_as_published()
    before, _, behind = tokenizer.frame(False)
    return [framed((before, behind), ids, info.length or 1 << 30) for ids in tokenizer.encode_many(texts)]


def shaped(info: EmbeddingInfo, found: np.ndarray) -> np.ndarray:
    """Vectors [texts, D] as the run wants them: of length 1, or as they are."""
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12) if info.normalize else found


def vectors(run: Run, texts: Sequence[str], rows: Sequence[list[int]], pool: str) -> np.ndarray:
    """[texts, D] float32 of texts whose tokens are `rows`.

    Raises:
      InputError: a text longer than the context.
    """
    context = run.recipe.model.context_length
    for text, row in zip(texts, rows, strict=True):
        if len(row) > context:
            raise InputError(f"{len(row)} tokens, and the context is {context}: {text[:60]!r}...; shorten it")
    found = np.zeros((len(rows), run.recipe.model.d_model), np.float32)
    computed: collections.deque[tuple[list[list[int]], jax.Array]] = collections.deque()

    def fetch() -> None:
        batch, of = computed.popleft()
        for texts, vectors in zip(batch, np.asarray(of), strict=False):  # behind them rows that fill the batch
            found[texts] = vectors[: len(texts)]

    lengths = [len(row) for row in rows]
    groups = sharing_rows(lengths, min(SHARED, context), SHARING)
    size = lambda texts: sum(lengths[i] for i in texts)  # noqa: E731
    # Apart, since rows longer than SHARED give one vector each.
    for alike in ([g for g in groups if size(g) <= SHARED], [g for g in groups if size(g) > SHARED]):
        for batch in batched(alike, lambda texts: (size(texts),), rows_that_fit(run.recipe.model)):
            laid = laid_out([[rows[i] for i in texts] for texts in batch], context, run.tokenizer.pad)
            computed.append((batch, pooled(run.module, run.params, *laid, pool)))
            if len(computed) > AHEAD:  # the next batches are made ready while these are computed
                fetch()
    while computed:
        fetch()
    return found


class Embedder:
    """A run that makes vectors alone, ready for inference: `embed`. Made by `bothways.load`, of a body without a masked-token
    head and of what contrastive training left."""

    def __init__(self, run: Run):
        self.run, self.recipe, self.tokenizer = run, run.recipe, run.tokenizer
        self.context_length = run.recipe.model.context_length
        self.embedding = read_embedding(run.home)
        self.closing = [] if run.recipe.objective.kind == "diffusion" else [self.tokenizer.eos]
        """What stands behind a text: [SEP], but not where rows of running text were trained on."""

    def _wrap(self, ids: Sequence[int]) -> list[int]:
        return [self.tokenizer.bos, *ids, *self.closing]

    def embed(self, texts: Sequence[str], pool: str = "", prompt: str = "") -> np.ndarray:
        """[texts, D] float32: the features of [CLS] (cls) or of the last token (last), or the mean over [CLS], text and [SEP].

        Args:
          pool: empty: as the run says, else mean.
          prompt: the name of what the run puts before such a text.

        Raises:
          InputError: a text longer than the context, another pool, or a prompt that the run does not have.
        """
        info = self.embedding or EmbeddingInfo()
        pool, texts = pool or info.pool, prompted(info, texts, prompt)
        if pool not in ("cls", "mean", "last"):
            raise InputError(f"pool {pool!r} is unknown; there are cls, mean and last")
        rows = (
            published_rows(self.run, info, texts)
            if self.embedding
            else [self._wrap(self.tokenizer.encode(text)) for text in texts]
        )
        return shaped(info, vectors(self.run, texts, rows, pool))
