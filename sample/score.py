"""How likely a text is."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bothways.data.pairs import packed
from bothways.errors import InputError
from bothways.model.loss import token_logprobs
from bothways.sample.batching import BATCH_BYTES, batched, rows_that_fit
from bothways.sample.decode import bucket


def windows(length: int, context: int) -> list[tuple[int, int, int]]:
    """How a sequence of `length` tokens is read: (begin, end, first token scored), every token scored once.

    Windows overlap by half, so that each token but those of the first window has half a context before it.

    >>> windows(10, 4)
    [(0, 4, 1), (2, 6, 4), (4, 8, 6), (6, 10, 8)]
    """
    found, scored, begin = [], 1, 0
    while scored < length:
        end = min(begin + context, length)
        found.append((begin, end, scored))
        scored, begin = end, begin + max(1, context // 2)
    return found


@functools.partial(jax.jit, static_argnums=0)
def next_token_logprobs(module: nn.Module, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """[B] log-probability of each row's weighted targets, in nats, of a batch {tokens, targets, weights [B, T],
    positions?, segments?}: what stands in one segment does not see another."""

    def run(bound: nn.Module) -> jax.Array:
        features, _ = bound(batch["tokens"], batch.get("positions"), batch.get("segments"))
        logprobs = token_logprobs(bound.transform(features), *bound.unembedding(), batch["targets"])
        return jnp.sum(logprobs * batch["weights"], axis=1)

    return module.apply({"params": params}, method=run)


def causal_logprobs(
    module: nn.Module,
    params: Any,
    sequences: Sequence[list[int]],
    context: int,
    memory: int = BATCH_BYTES,
    first: Sequence[int] | None = None,
) -> list[float]:
    """log p(tokens `first`.. | those before) of every sequence, in nats, each token given all before it in its window.

    Args:
      first: first token scored of every sequence; None: 1.
      memory: bytes that a batch may take; see batching.rows_that_fit.
    """
    pieces = ((i, *w) for i, s in enumerate(sequences) for w in windows(len(s), context))
    totals = np.zeros(len(sequences))
    longest = max(context - 1, module.cfg.context_length)  # a row's last token is predicted, and not read
    for batch in batched(pieces, lambda piece: (piece[2] - piece[1] - 1,), rows_that_fit(module.cfg, memory)):
        shape = bucket(len(batch), 1), min(bucket(max(end - start - 1 for _, start, end, _ in batch)), longest)
        arrays = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets")}
        arrays["weights"] = np.zeros(shape, np.float32)
        for row, (i, start, end, scored) in enumerate(batch):
            ids = sequences[i][start:end]
            arrays["tokens"][row, : len(ids) - 1] = ids[:-1]
            arrays["targets"][row, : len(ids) - 1] = ids[1:]
            begin = max(scored, first[i] if first else 1) - start - 1
            arrays["weights"][row, begin : len(ids) - 1] = 1
        logprobs = np.asarray(next_token_logprobs(module, params, arrays))
        for row, (i, *_) in enumerate(batch):
            totals[i] += logprobs[row]
    return totals.tolist()


@functools.partial(jax.jit, static_argnums=0)
def pair_logprobs(module: nn.Module, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """[B] log-probability of each row's targets, in nats."""

    def run(bound: nn.Module) -> jax.Array:
        names = ("tokens", "source", "positions", "segments", "source_positions", "source_segments")
        features = bound(*(batch[name] for name in names))
        logprobs = token_logprobs(bound.transform(features), *bound.unembedding(), batch["targets"])
        return jnp.sum(logprobs * batch["weights"], axis=1)

    return module.apply({"params": params}, method=run)


def target_logprobs(
    module: nn.Module,
    params: Any,
    sources: list[list[int]],
    targets: list[list[int]],
    context: int,
    memory: int = BATCH_BYTES,
    given: int = 1,
) -> list[float]:
    """log p(the rest of the target | its first tokens, the source) of every pair, in nats.

    Args:
      given: how many those are.

    Raises:
      InputError: a side of more than `context` tokens.
    """
    for i, (source, target) in enumerate(zip(sources, targets, strict=True)):
        if max(len(source), len(target) - 1) > context:
            raise InputError(
                f"pair {i + 1} has {len(source)} and {len(target) - 1} tokens, and the model's context is {context}"
            )
    found = np.zeros(len(sources))
    key = lambda i: (max(len(sources[i]), len(targets[i])), len(sources[i]))  # noqa: E731
    for chosen in batched(range(len(sources)), key, rows_that_fit(module.cfg, memory // 2)):  # two stacks
        S, T = (bucket(max(len(side[i]) for i in chosen)) for side in (sources, targets))
        rows = [packed([np.array(sources[i])], [np.array(targets[i])], S, T, 0) for i in chosen]
        for row in rows:
            row["weights"][: given - 1] = 0
        rows += [rows[0]] * (bucket(len(rows), 1) - len(rows))
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        found[chosen] = np.asarray(pair_logprobs(module, params, batch))[: len(chosen)]
    return found.tolist()
