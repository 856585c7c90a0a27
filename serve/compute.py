"""What calls compute on the engine's thread: functions of (model, items, between)."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bothways.errors import InputError
from bothways.sample.batching import rows_that_fit
from bothways.sample.decode import padded
from bothways.sample.denoise import hidden_logits
from bothways.sample.directions import BOTH, FORWARD, directions
from bothways.sample.masked import columns
from bothways.sample.search import embed_side

Between = Callable[[], None]
PORTION = 64
"""Texts that are computed before slots go on."""


def in_portions(verb: Callable[[list[Any]], Any], items: list[Any], between: Between) -> list[Any]:
    """What a verb gives for many items: slots go on between two portions, and the rest is left where nobody waits for it."""
    found: list[Any] = []
    for i in range(0, len(items), PORTION):
        if i:
            between()
        found.extend(verb(items[i : i + PORTION]))
    return found


def embed(pool: str, model: Any, texts: list[str], between: Between) -> list[np.ndarray]:
    return in_portions(functools.partial(model.embed, pool=pool), texts, between)


def fill(top: int, steps: int, model: Any, texts: list[str], between: Between) -> list[Any]:
    return in_portions(functools.partial(model.fill, top=top, steps=steps), texts, between)


def score(rule: str | None, model: Any, texts: list[str], between: Between) -> list[Any]:
    return in_portions(functools.partial(model.score, **({} if rule is None else {"rule": rule})), texts, between)


def classify(model: Any, texts: list[str], between: Between) -> list[Any]:
    return in_portions(model.predict, texts, between)


def rank(model: Any, pairs: list[tuple[str, str]], between: Between) -> list[float]:
    """How well each document answers its query: by a head tuned for pairs, or the cosine of two vectors."""
    if getattr(model, "task", None) is not None:
        return in_portions(model.pair_scores, pairs, between)
    vectors = []
    for i, side in enumerate(("query", "document")):
        texts = list(dict.fromkeys(pair[i] for pair in pairs))
        rows = in_portions(functools.partial(embed_side, model, side=side), texts, between)
        vectors.append(dict(zip(texts, rows, strict=True)))
    return [float(vectors[0][query] @ vectors[1][document]) for query, document in pairs]


@functools.partial(jax.jit, static_argnames=("module", "top"))
def _told(
    module: nn.Module,
    params: Any,
    tokens: jax.Array,
    segments: jax.Array,
    positions: jax.Array,
    targets: jax.Array,
    barred: jax.Array,
    top: int,
) -> tuple[jax.Array, ...]:
    """[B, P] log-probabilities of targets, and the most likely tokens with theirs [B, P, top]."""
    every = jax.nn.log_softmax(hidden_logits(module, params, tokens, segments, positions).astype(jnp.float32))
    values, ids = jax.lax.top_k(jnp.where(barred, -jnp.inf, every), top)
    return jnp.take_along_axis(every, targets[..., None], axis=-1)[..., 0], ids, values


def token_probabilities(
    direction: str | None, top: int, most: int, model: Any, texts: list[str], between: Between
) -> list[tuple[str, list[int], np.ndarray, np.ndarray, np.ndarray]]:
    """For every text (direction, ids, log p of each [L], the most likely at each [L, top], their log-probabilities).

    Forward: each token given those before it, in one pass. Both ways: given all others, so L copies with one masked each.

    Raises:
      InputError: a direction that the run was not trained in, or more than `most` tokens.
    """
    known = directions(model)
    names = {"forward": FORWARD, "both": BOTH}
    direction = direction or next(name for name in names if names[name] in known)
    if names[direction] not in known:
        raise InputError(f"{model.run.home} was not trained to read {names[direction]}; it reads {', '.join(known)}")
    reader, results = known[names[direction]], []
    for text in texts:
        ids = model.tokenizer.encode(text)
        row = reader._wrap(ids)
        if len(row) > reader.context_length or len(ids) > most:
            limit = min(most, reader.context_length - len(row) + len(ids))
            raise InputError(f"the text has {len(ids)} tokens; at most {limit} are looked at one by one: shorten it")
        places = list(range(1, len(ids) + 1))
        if direction == "forward":
            batches = [([row], [places], [ids])]
        else:
            copies = [[*row[:p], model.tokenizer.mask, *row[p + 1 :]] for p in places]
            size = rows_that_fit(model.recipe.model)(len(row))
            cuts = [slice(i, i + size) for i in range(0, len(copies), size)]
            batches = [(copies[c], [[p] for p in places[c]], [[t] for t in ids[c]]) for c in cuts]
        parts = []
        for rows, at, targets in batches:
            between()
            tokens, segments = padded(rows, reader.context_length, model.tokenizer.pad)
            asked = columns(at, len(tokens)), columns(targets, len(tokens))
            args = reader.run.module, reader.run.params, tokens, segments, *asked, reader._barred
            found = jax.device_get(_told(*args, min(top, int(np.sum(~reader._barred)))))
            parts.append([x[: len(rows), : len(at[0])].reshape(-1, *x.shape[2:]) for x in found])
        results.append((direction, ids, *(np.concatenate(some) for some in zip(*parts, strict=True))))
    return results
