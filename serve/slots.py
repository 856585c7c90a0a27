"""Continuous batching: a fixed number of slots decode together, and each is refilled as soon as its row has ended.

A pool is one KV cache of B slots by S positions and two compiled programs, which never change shape: `prefill` reads a piece
of one slot's prompt, `step` gives every live slot a few tokens. A row's numbers are computed by the same programs whoever
its neighbours are, so what it generates does not depend on them. Pieces begin at multiples of their size, so a prompt
whose first pieces come from the prefix cache gets the numbers that it would get without.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from bothways.model.cache import Cache
from bothways.sample.decode import Begin, Forward, Logits
from bothways.sample.sampling_params import SamplingParams, sample_token
from bothways.serve.prefix import PrefixCache, state_sharding

TOP = 20
"""Alternatives that are kept per token, where a request wants any; the most that OpenAI's interface allows."""
CHUNK = 4
"""Tokens per live slot between two looks at the queue, while nobody waits."""
LEAST = 16
"""The shortest piece that is compiled."""


@flax.struct.dataclass
class State:
    """The slots on the device."""

    cache: Cache
    logits: jax.Array
    """[B, V] scores of each slot's next token."""


@flax.struct.dataclass
class Slots:
    """What each of the B slots wants, as arrays that the host sends with every step."""

    key: Any  # [B, n] uint32, key data
    held: Any  # [B] whether there is a row, whose prompt may be read in part
    live: Any  # [B]
    count: Any  # [B] tokens generated so far
    limit: Any  # [B]
    eos: Any  # [B] -1: goes on past it
    temperature: Any  # [B, 1]
    top_k: Any
    top_p: Any
    min_p: Any
    greedy: Any  # [B]
    filtered: Any  # [B]
    tops: Any  # [B] whether alternatives are wanted


@dataclasses.dataclass(eq=False)
class Generation:
    """One text being generated for a client.

    `emit` is called, on the engine's thread, with (new tokens, their log-probabilities, alternatives, stop) after every
    step; stop is empty while it goes on, then eos or max_tokens. Returning True ends the row: the caller has found a stop
    string, or the client has gone.
    """

    ids: list[int]
    key: np.ndarray
    method: SamplingParams
    max_tokens: int
    emit: Callable[[list[int], list[float], list[list[tuple[int, float]]], str], bool]
    source: list[int] = dataclasses.field(default_factory=list)
    tops: int = 0
    gone: Callable[[], bool] = lambda: False
    """Whether nobody waits for it any more: its slot is freed before the next step."""
    read: int = 0
    """Tokens of `ids` that are in the cache."""
    count: int = 0
    cached: int = 0
    """Tokens of `ids` that came from the prefix cache."""

    @property
    def size(self) -> int:
        """Positions that it needs."""
        return max(len(self.ids) + self.max_tokens, len(self.source))


def choose_tokens(logits: jax.Array, rows: Slots, never: int = -1) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[B] tokens, each by its own row's method, but not `never`; their log-probabilities; [B, V] those of all."""
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    keys = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(rows.key), rows.count)
    plain = SamplingParams(rows.temperature, rows.top_k, rows.top_p, rows.min_p, never=never)
    top = sample_token(logits, keys, plain.replace(greedy=True))[0]

    def draw() -> jax.Array:
        drawn = sample_token(logits, keys, plain)[0]

        def among_filtered() -> jax.Array:
            return jnp.where(rows.filtered, sample_token(logits, keys, plain.replace(filtered=True))[0], drawn)

        return jax.lax.cond(jnp.any(rows.filtered & rows.live), among_filtered, lambda: drawn)

    drawn = jax.lax.cond(jnp.any(~rows.greedy & rows.live), draw, lambda: top)
    token = jnp.where(rows.greedy, top, drawn)
    return token, jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0], logprobs


class Pool:
    """`slots` rows of up to `size` positions of one model.

    Args:
      piece: tokens of a prompt that are read at once.
      prefixes: where pieces are kept; None where rows have sources, whose targets begin with nothing in common.
      never: a token that is not drawn; -1: none.
    """

    def __init__(
        self,
        callbacks: tuple[Forward, Logits, Begin],
        params: Any,
        *,
        slots: int,
        size: int,
        piece: int,
        eos: int,
        vocabulary: int,
        has_source: bool = False,
        prefixes: PrefixCache | None = None,
        never: int = -1,
    ):
        forward, logits, begin = callbacks
        self.never = never
        self.params, self.slots, self.size, self.piece, self.eos = params, slots, -(-size // piece) * piece, piece, eos
        self.has_source, self.prefixes = has_source, prefixes
        self.rows: list[Generation | None] = [None] * slots
        self._key_words = jax.random.key_data(jax.random.key(0)).size
        top = min(TOP, vocabulary)

        def empty(params: Any) -> State:
            nothing = jnp.zeros((slots, self.size), jnp.int32)
            cache = begin(params, slots, self.size, (nothing, nothing) if has_source else None)
            features = jax.eval_shape(lambda: forward(params, jnp.zeros((slots, 1), jnp.int32), cache)[0][:, 0])
            shape = jax.eval_shape(logits, params, features)
            return State(cache, jnp.zeros(shape.shape, shape.dtype))

        self.shapes = jax.eval_shape(empty, params)
        at = state_sharding(params, self.shapes)
        self._empty = jax.jit(empty, out_shardings=at)
        in_place = functools.partial(jax.jit, donate_argnums=1)

        def row_of(tree: Any, slot: jax.Array) -> Any:
            return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, slot, 1), tree)

        def with_row(tree: Any, row: Any, slot: jax.Array) -> Any:
            put = jax.lax.dynamic_update_slice_in_dim
            return jax.tree.map(lambda x, new: put(x, new.astype(x.dtype), slot, 0), tree, row)

        @functools.partial(in_place, out_shardings=at)
        def enter(params: Any, state: State, slot: jax.Array, source: jax.Array, segments: jax.Array) -> State:
            """What an encoder makes of a source [1, S], into a slot."""
            row = begin(params, 1, self.size, (source, segments))
            return state.replace(cache=with_row(state.cache, row, slot))

        @functools.partial(in_place, out_shardings=at)
        def prefill(
            params: Any, state: State, slot: jax.Array, start: jax.Array, tokens: jax.Array, count: jax.Array
        ) -> State:
            """The first `count` of tokens [1, P], at positions from `start` on of a slot."""
            row = row_of(state.cache, slot).replace(length=start[None])
            features, row = forward(params, tokens, row)
            cache = with_row(state.cache, row.replace(length=(start + count)[None]), slot)
            last = jax.lax.dynamic_slice_in_dim(features[0], count - 1, 1)
            return State(cache, with_row(state.logits, logits(params, last), slot))

        @functools.partial(in_place, out_shardings=None if at is None else (at, None))
        def step(params: Any, state: State, rows: Slots, n: jax.Array) -> tuple[State, tuple[jax.Array, ...]]:
            """At most n <= CHUNK tokens for every live slot: tokens, log-probabilities [B, n], the most likely tokens and
            theirs [B, n, TOP]; how many tokens each slot has now [B]."""
            # How much of the cache is read goes by the longest row; one that has ended counts no more.
            length = jnp.where(rows.held, state.cache.length, 0)
            state = state.replace(cache=state.cache.replace(length=length))
            zeros = jnp.zeros((slots, CHUNK), jnp.int32)
            alternatives = jnp.zeros((slots, CHUNK, top), jnp.int32)
            out = (zeros, zeros.astype(jnp.float32), alternatives, alternatives.astype(jnp.float32))

            def going(carry: tuple) -> jax.Array:
                _, rows, _, i = carry
                return (i < n) & jnp.any(rows.live)

            def turn(carry: tuple) -> tuple:
                state, rows, (tokens, logprobs, ids, values), i = carry
                token, logprob, every = choose_tokens(state.logits, rows, self.never)
                some = jax.lax.cond(
                    jnp.any(rows.tops & rows.live),
                    lambda: tuple(jax.lax.top_k(every, top)[::-1]),
                    lambda: (alternatives[:, 0], alternatives[:, 0].astype(every.dtype)),
                )
                features, cache = forward(params, token[:, None], state.cache)
                # A row that is not live computes too; its length stays, so what it wrote is overwritten.
                cache = cache.replace(length=jnp.where(rows.live, cache.length, state.cache.length))
                scores = jnp.where(rows.live[:, None], logits(params, features[:, 0]), state.logits)
                tokens, logprobs = tokens.at[:, i].set(token), logprobs.at[:, i].set(logprob)
                ids, values = ids.at[:, i].set(some[0]), values.at[:, i].set(some[1].astype(values.dtype))
                count = rows.count + rows.live
                live = rows.live & (token != rows.eos) & (count < rows.limit)
                rows = rows.replace(count=count, live=live)
                return State(cache, scores), rows, (tokens, logprobs, ids, values), i + 1

            state, rows, out, _ = jax.lax.while_loop(going, turn, (state, rows, out, jnp.int32(0)))
            return state, (*out, rows.count)

        @jax.jit
        def take(state: State, slot: jax.Array, start: jax.Array) -> Any:
            """Keys and values of one piece of a slot."""
            row = row_of([(layer.k, layer.v) for layer in state.cache.layers], slot)
            return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, piece, 2), row)

        @functools.partial(jax.jit, donate_argnums=0, out_shardings=at)
        def put(state: State, slot: jax.Array, start: jax.Array, kept: Any) -> State:
            """`kept`, what `take` gave, into a slot."""
            layers = tuple(
                layer.replace(
                    k=jax.lax.dynamic_update_slice(layer.k, k, (slot, 0, start, 0)),
                    v=jax.lax.dynamic_update_slice(layer.v, v, (slot, 0, start, 0)),
                )
                for layer, (k, v) in zip(state.cache.layers, kept, strict=True)
            )
            # Until the rest is read, steps of other slots write behind it, as the length says, and not over it.
            length = state.cache.length.at[slot].set(start + piece)
            return state.replace(cache=state.cache.replace(layers=layers, length=length))

        self._enter, self._prefill, self._step, self._take, self._put = enter, prefill, step, take, put
        self.state: State | None = None

    # ---- memory and compilation -------------------------------------------------------------------------------------

    @property
    def bytes(self) -> int:
        """Of the cache and the scores."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self.shapes))

    @property
    def pieces(self) -> list[int]:
        """Lengths that are compiled: powers of two up to a whole piece."""
        return [n for n in (LEAST << i for i in range(12)) if n < self.piece] + [self.piece]

    def lowered(self) -> list[Any]:
        """Every program, lowered from shapes alone: what `--warm` compiles, and whose memory it counts."""
        one, state = jnp.int32(0), self.shapes
        found = [self._step.lower(self.params, state, self._wishes(), one)]
        for n in self.pieces:
            found.append(self._prefill.lower(self.params, state, one, one, np.zeros((1, n), np.int32), one))
        if self.has_source:
            source = np.zeros((1, self.size), np.int32)
            found.append(self._enter.lower(self.params, state, one, source, source))
        return found

    def warm(self) -> None:
        """Run every program once, so that none is compiled while a client waits."""
        emit = lambda *_: False  # noqa: E731
        for n in self.pieces:
            length = min(n, self.size - 2)
            generation = Generation([0] * length, np.zeros(self._key_words, np.uint32), SamplingParams.make(), 1, emit)
            generation.source = [0] if self.has_source else []
            self.add(generation)
            while self.busy:
                self.prefill(1)
                self.step(1)
        if self.prefixes is not None:
            kept = self._take(self.state, 0, 0)
            self.state = self._put(self.state, 0, 0, kept)

    # ---- rows -------------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> int:
        return sum(row is not None for row in self.rows)

    @property
    def free(self) -> int:
        return self.slots - self.busy

    def add(self, generation: Generation) -> None:
        """Give a free slot to a row; nothing is computed yet but what comes from the prefix cache."""
        slot = self.rows.index(None)
        if self.state is None:
            self.state = self._empty(self.params)
        if generation.source:
            tokens, segments = np.zeros((1, self.size), np.int32), np.zeros((1, self.size), np.int32)
            tokens[0, : len(generation.source)], segments[0, : len(generation.source)] = generation.source, 1
            self.state = self._enter(self.params, self.state, slot, tokens, segments)
        ids, piece = generation.ids, self.piece
        # The last token is always read, since what follows it is wanted.
        while self.prefixes is not None and generation.read + piece < len(ids):
            kept = self.prefixes.get(ids[: generation.read + piece])
            if kept is None:
                break
            self.state = self._put(self.state, slot, generation.read, kept)
            generation.read += piece
        generation.cached = generation.read
        self.rows[slot] = generation

    def reset(self) -> list[Generation]:
        """After an error: the rows that are lost with the state, and every slot free."""
        lost = [row for row in self.rows if row is not None]
        self.rows, self.state = [None] * self.slots, None
        return lost

    def prefill(self, budget: int) -> int:
        """Read pieces of prompts, the row with the least to read first, until about `budget` tokens are read. Rows that
        nobody waits for leave their slots before.

        Returns:
          how many were read.
        """
        self.rows = [None if row is not None and row.gone() else row for row in self.rows]
        done = 0
        while done < budget:
            waiting = [(len(r.ids) - r.read, i) for i, r in enumerate(self.rows) if r is not None and r.read < len(r.ids)]
            if not waiting:
                break
            left, slot = min(waiting)
            row = self.rows[slot]
            count = min(left, self.piece)
            length = next(n for n in self.pieces if n >= count)
            tokens = np.zeros((1, length), np.int32)
            tokens[0, :count] = row.ids[row.read : row.read + count]
            self.state = self._prefill(self.params, self.state, slot, np.int32(row.read), tokens, np.int32(count))
            if self.prefixes is not None and count == self.piece:
                end = row.read + count
                self.prefixes.put(row.ids[:end], self._take(self.state, slot, row.read))
            row.read += count
            done += length
        return done

    def _wishes(self) -> Slots:
        B, rows = self.slots, self.rows
        live = [r is not None and r.read == len(r.ids) for r in rows]
        wishes = Slots(
            key=np.zeros((B, self._key_words), np.uint32),
            held=np.array([r is not None for r in rows]),
            live=np.array(live),
            count=np.zeros(B, np.int32),
            limit=np.zeros(B, np.int32),
            eos=np.full(B, self.eos, np.int32),
            temperature=np.ones((B, 1), np.float32),
            top_k=np.zeros((B, 1), np.int32),
            top_p=np.ones((B, 1), np.float32),
            min_p=np.zeros((B, 1), np.float32),
            greedy=np.ones(B, bool),
            filtered=np.zeros(B, bool),
            tops=np.zeros(B, bool),
        )
        for i, row in enumerate(rows):
            if not live[i]:
                continue
            wishes.key[i], wishes.count[i], wishes.limit[i] = row.key, row.count, row.max_tokens
            for name in ("temperature", "top_k", "top_p", "min_p", "greedy", "filtered"):
                getattr(wishes, name)[i] = getattr(row.method, name)
            wishes.tops[i] = row.tops > 0
        return wishes

    def step(self, n: int = CHUNK) -> int:
        """At most n tokens for every row whose prompt is read; rows that end leave their slots.

        Returns:
          tokens generated.
        """
        wishes = self._wishes()
        if not wishes.live.any():
            return 0
        self.state, out = self._step(self.params, self.state, wishes, np.int32(min(n, CHUNK)))
        tokens, logprobs, ids, values, counts = jax.device_get(out)
        total = 0
        for i in np.flatnonzero(wishes.live):
            row = self.rows[i]
            new = int(counts[i]) - row.count
            row.count += new
            total += new
            said = tokens[i, :new].tolist()
            stop = "eos" if said and said[-1] == wishes.eos[i] else "max_tokens" if row.count >= row.max_tokens else ""
            tops = [
                list(zip(ids[i, j, : row.tops].tolist(), values[i, j, : row.tops].tolist(), strict=True))
                for j in range(new if row.tops else 0)
            ]
            if row.emit(said, logprobs[i, :new].tolist(), tops, stop) or stop:
                self.rows[i] = None
        return total
