"""A bound on the log-likelihood of texts under a model trained by masked diffusion in blocks, exact at blocks of 1."""

import functools
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Float

from bothways.data.diffusion import hide_in_blocks
from bothways.model.loss import token_logprobs
from bothways.sample.batching import batched, rows_that_fit
from bothways.sample.decode import bucket
from bothways.sample.score import windows

DRAWS = 32


@functools.partial(jax.jit, static_argnums=(0, 3))
def denoised_logprobs(module: nn.Module, params: Any, batch: dict[str, jax.Array], block: int) -> Float[jax.Array, "B T"]:
    """log p(target t), in nats, given the clean blocks before its own and what is not hidden of its own, of a batch
    {tokens (some hidden), targets, positions, segments [B, T]}; blocks of `block`, 0 for the whole row."""

    def run(bound: nn.Module) -> jax.Array:
        only_clean = block == 1 and bound.predicts == "next"
        hidden = None if only_clean else batch["tokens"]
        clean = batch["targets"] if block else None
        features = bound.denoise(hidden, clean, batch["positions"], batch["segments"], block)
        return token_logprobs(bound.transform(features), *bound.unembedding(), batch["targets"])

    return module.apply({"params": params}, method=run)


def _copies(
    sequences: Sequence[list[int]],
    first: Sequence[int],
    context: int,
    block: int,
    predicts: str,
    mask: int,
    draws: int,
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """(sequence, tokens with some hidden, clean tokens, weights) of every draw of every window."""
    for i, (ids, begins) in enumerate(zip(sequences, first, strict=True)):
        rng = np.random.default_rng(zlib.crc32(np.array(ids, np.int32).tobytes()))
        for begin, end, scored in windows(len(ids), context):
            clean, positions = np.array(ids[begin:end], np.int32), np.arange(end - begin)[None]
            scored_here = positions + begin >= max(scored, begins)
            if not scored_here.any():
                continue
            size = block or end - begin
            n = 1 if size == 1 else draws
            rows = lambda x, n=n: np.repeat(x, n, axis=0)  # noqa: E731
            level = (np.arange(n) + rng.random(n)) / n
            noise, sizes = rng.random((n, end - begin)), np.full(n, size)
            hidden, weights = hide_in_blocks(rows(positions), rows(scored_here), sizes, level, noise, predicts)
            for h, w in zip(hidden, weights, strict=True):
                yield i, np.where(h, mask, clean), clean, w / n


def bound_logprobs(
    module: nn.Module,
    params: Any,
    sequences: Sequence[list[int]],
    context: int,
    block: int,
    mask: int,
    draws: int = DRAWS,
    first: Sequence[int] | None = None,
) -> np.ndarray:
    """[sequences] a lower bound, in expectation, on log p(tokens `first` .. | those before them), in nats.

    Of the L tokens of a block that are scored_here for k are hidden and weigh L / k, k stratified over draws and blocks (arXiv
    2503.09573, equation 8); tokens before `first` are context, and never hidden. The draws depend on the tokens alone.
    At blocks of 1 there is nothing to draw, and it is the log-likelihood.

    Args:
      context: longest row of the model; a longer sequence is read in windows that overlap by half.
      block: tokens in a block; 0: the whole row.
      mask: the token that stands for a hidden one.
      draws: of every window.
      first: first token scored of every sequence; None: 1.
    """
    first = [1] * len(sequences) if first is None else first
    copies = _copies(sequences, first, context, block, module.predicts, mask, draws)
    fitting, found = rows_that_fit(module.cfg), np.zeros(len(sequences))
    for some in batched(
        copies, lambda copy: (len(copy[2]),), lambda length: fitting(length if not block else 2 * length)
    ):
        shape = bucket(len(some), 1), min(bucket(max(len(copy[2]) for copy in some)), context)
        batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "segments")}
        batch["positions"] = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
        weights = np.zeros(shape, np.float32)
        for k, (_, tokens, clean, weight) in enumerate(some):
            n = slice(len(clean))
            batch["tokens"][k, n], batch["targets"][k, n], batch["segments"][k, n], weights[k, n] = (
                tokens,
                clean,
                1,
                weight,
            )
        logprobs = np.asarray(denoised_logprobs(module, params, batch, block))
        sums = (np.where(weights > 0, logprobs, 0) * weights).sum(axis=1)
        np.add.at(found, [i for i, *_ in some], sums[: len(some)])
    return found
