"""Continuing text: prefill in one pass, then one jitted loop over the batch.

The model is a callback (params, tokens [B, T], cache) -> (features of all T positions, cache); the `Decoder` below
drives it without knowing its family. What an encoder makes of a row's source is in the cache from the start. Each
row has its own length, its own random key and its own stop, so what a row generates does not depend on its neighbours.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from bothways.model.cache import Cache
from bothways.sample.sampling_params import SamplingParams, sample_token

Forward = Callable[[Any, jax.Array, Cache], tuple[jax.Array, Cache]]
Logits = Callable[[Any, jax.Array], jax.Array]
SourceTokens = tuple[Int[jax.Array, "B S"], Int[jax.Array, "B S"]]
"""Tokens and segments of sources; a segment of 0 is padding."""
Begin = Callable[[Any, int, int, SourceTokens | None], Cache]


def bucket(n: int, least: int = 16) -> int:
    """The next power of two from `least` on: the sizes that are compiled."""
    return max(least, 1 << (n - 1).bit_length())


def close_bucket(n: int, least: int = 16) -> int:
    """As `bucket`, with a size more between any two: less of a row is padding, where a row is read many times."""
    size = bucket(n, least)
    return size * 3 // 4 if size > least and n <= size * 3 // 4 else size


def padded(rows: Sequence[Sequence[int]], longest: int, pad: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows as [B, T] tokens and segments, both dimensions in their buckets, T at most `longest`."""
    T, B = min(close_bucket(max(map(len, rows))), longest), bucket(len(rows), 1)
    tokens, segments = np.full((B, T), pad, np.int32), np.zeros((B, T), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], segments[i, : len(row)] = row, 1
    return tokens, segments


@flax.struct.dataclass
class State:
    """A batch in the middle of decoding; N is the most tokens a row can still get."""

    cache: Cache
    logits: Float[jax.Array, "B V"]
    """Scores of each row's next token."""
    tokens: Int[jax.Array, "B N"]
    logprobs: Float[jax.Array, "B N"]
    count: Int[jax.Array, " B"]
    """Tokens each row has got."""
    limit: Int[jax.Array, " B"]
    """Tokens each row may get."""
    ended: Bool[jax.Array, " B"]
    """Rows that generated `eos`."""

    @property
    def passes(self) -> Int[jax.Array, " B"]:
        """Forward passes that each row took after its prompt: one a token."""
        return self.count


@dataclasses.dataclass
class Row:
    """One text being continued."""

    context: list[int]
    key: jax.Array
    source: list[int] = dataclasses.field(default_factory=list)
    """What an encoder reads; empty where there is no encoder."""
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    stop: str = ""
    """Empty while it goes on; then eos, stop (a stop string) or max_tokens."""
    passes: int = 0
    """Forward passes it took, those over its prompt left out."""


class Decoder:
    """Compiled prefill and decode loop of one model.

    Args:
      forward: the model with a cache.
      logits: (params, features [B, D]) -> [B, V].
      begin: (params, batch, size, source) -> Cache without tokens; source is None where rows have none.
      context: longest sequence of the model.
      eos: the token that ends a row.
    """

    def __init__(self, forward: Forward, logits: Logits, begin: Begin, context: int, eos: int):
        self.context_length, self.eos = context, eos

        @functools.partial(jax.jit, static_argnames="size")
        def prefill(
            params: Any, tokens: jax.Array, lengths: jax.Array, limit: jax.Array, source: SourceTokens | None, size: int
        ) -> State:
            B = tokens.shape[0]
            features, cache = forward(params, tokens, begin(params, B, size, source))
            last = jnp.take_along_axis(features, (lengths - 1)[:, None, None], axis=1)[:, 0]
            cache = cache.replace(length=lengths)  # what a padded place wrote lies behind, and is overwritten
            zeros = jnp.zeros((B, size), jnp.int32)
            none = jnp.zeros((B,), jnp.int32)
            return State(cache, logits(params, last), zeros, zeros.astype(jnp.float32), none, limit, none.astype(bool))

        @functools.partial(jax.jit, donate_argnums=1)
        def run(
            params: Any, state: State, keys: jax.Array, offset: jax.Array, method: SamplingParams, most: jax.Array
        ) -> State:
            """At most `most` tokens for every row that has not ended. `offset` [B] counts each row's earlier tokens."""

            def going(carry: tuple[State, jax.Array]) -> jax.Array:
                state, n = carry
                return (n < most) & jnp.any(~state.ended & (state.count < state.limit))

            def step(carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
                state, n = carry
                live = ~state.ended & (state.count < state.limit)
                token, logprob = sample_token(
                    state.logits, jax.vmap(jax.random.fold_in)(keys, offset + state.count), method
                )
                at = (jnp.arange(token.shape[0]), state.count)
                features, cache = forward(params, token[:, None], state.cache)
                keep = functools.partial(jnp.where, live)
                state = state.replace(
                    cache=cache.replace(length=keep(cache.length, state.cache.length)),
                    logits=jnp.where(live[:, None], logits(params, features[:, 0]), state.logits),
                    tokens=state.tokens.at[at].set(keep(token, state.tokens[at]), mode="drop"),
                    logprobs=state.logprobs.at[at].set(keep(logprob, state.logprobs[at]), mode="drop"),
                    count=state.count + live,
                    ended=state.ended | (live & (token == eos)),
                )
                return state, n + 1

            return jax.lax.while_loop(going, step, (state, jnp.int32(0)))[0]

        self.prefill, self.run = prefill, run

    def start(self, params: Any, rows: Sequence[Row], limits: Sequence[int]) -> tuple[State, jax.Array, jax.Array]:
        """State, keys and counts of a batch padded to its buckets; padding rows may get no token."""
        lengths = [len(row.context) for row in rows]
        tokens, _ = padded([row.context for row in rows], self.context_length)
        fill = len(tokens) - len(rows)
        size = min(close_bucket(tokens.shape[1] + max(limits)), self.context_length)
        source = padded([row.source for row in rows], self.context_length) if rows[0].source else None
        limit = np.array([*limits] + [0] * fill)
        state = self.prefill(params, tokens, np.array(lengths + [1] * fill), limit, source, size)
        return state, *self.keys_of(rows, fill)

    def keys_of(self, rows: Sequence[Row], fill: int) -> tuple[jax.Array, np.ndarray]:
        """Every row's key, and how many tokens it has got already; `fill` rows of padding behind them."""
        keys = jnp.stack([row.key for row in rows] + [rows[0].key] * fill)
        return keys, np.array([len(row.tokens) for row in rows] + [0] * fill)

    def begin(self, params: Any, rows: Sequence[Row], limits: Sequence[int], method: SamplingParams) -> tuple[Any, ...]:
        """A state to go on from, and what `go_on` takes with it: keys, and counts of earlier tokens."""
        return self.start(params, rows, limits)

    def go_on(self, params: Any, state: Any, keys: jax.Array, offset: Any, method: SamplingParams, most: int) -> Any:
        """The state with about `most` tokens more in every row that has not ended."""
        return self.run(params, state, keys, offset, method, jnp.int32(most))

    def generate(
        self,
        params: Any,
        rows: list[Row],
        method: SamplingParams,
        max_tokens: int | Sequence[int],
        *,
        chunk: int = 0,
        after_chunk: Callable[[list[Row]], None] = lambda rows: None,
    ) -> None:
        """Give every row up to max_tokens tokens, one number for all or one for each.

        A row that fills the context goes on from the last half of it.

        Args:
          chunk: hand back after every so many tokens; 0: only at the end.
          after_chunk: sees the rows then, and may set their `stop`.
        """
        most = {id(row): int(n) for row, n in zip(rows, np.broadcast_to(max_tokens, len(rows)), strict=True)}
        while going := [row for row in rows if not row.stop]:
            for row in going:
                if len(row.context) >= self.context_length:
                    row.context = row.context[-(self.context_length // 2) :]
            limits = [min(most[id(row)] - len(row.tokens), self.context_length - len(row.context)) for row in going]
            state, keys, offset = self.begin(params, going, limits, method)
            had = [len(row.tokens) for row in going]
            while True:
                state = self.go_on(params, state, keys, offset, method, chunk or max(limits))
                count, tokens, logprobs = jax.device_get((state.count, state.tokens, state.logprobs))
                for i, row in enumerate(going):
                    if row.stop:
                        continue
                    new = slice(len(row.tokens) - had[i], count[i])
                    row.tokens += tokens[i, new].tolist()
                    row.logprobs += logprobs[i, new].tolist()
                    if row.tokens and row.tokens[-1] == self.eos:
                        row.stop = "eos"
                    elif len(row.tokens) >= most[id(row)]:
                        row.stop = "max_tokens"
                after_chunk(going)
                stopped = np.array([bool(row.stop) for row in going] + [True] * (len(state.ended) - len(going)))
                state = state.replace(ended=state.ended | stopped)
                if all(s or count[i] >= limits[i] for i, s in enumerate(stopped[: len(going)])):
                    break
            for row, got, passes in zip(going, count, jax.device_get(state.passes), strict=False):
                row.context = row.context + row.tokens[len(row.tokens) - int(got) :]
                row.passes += int(passes)
