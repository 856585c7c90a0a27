"""The compiled programs of a pool of slots: each takes the state of all slots, and gives it back in the same memory.

empty    the state of slots that hold nothing
enter    an encoder's source, into one slot
begin    the first pieces of several prompts together, each into its own slot
go_on    a later piece of one prompt, behind what is in its slot
step     a few tokens for every live slot
take     keys and values of one piece, out of a slot; put: into one
"""

import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from bothways.model.axes import platform
from bothways.model.cache import Cache
from bothways.sample.decode import Begin, Forward, Logits
from bothways.sample.sampling_params import SamplingParams, sample_token
from bothways.serve.prefix import state_sharding

TOP = 20
"""Alternatives that are kept per token, where a request wants any; the most that OpenAI's interface allows."""
CHUNK = 4
"""Tokens per live slot between two looks at the queue, while nobody waits."""
LEAST = 16
"""The shortest piece that is compiled."""


TOGETHER = 64
"""Tokens of prompts that one pass takes at least, on a CPU: through SmolLM2-135M one of 32 takes 53 ms, of 64 60 and of 128 92. On
other devices a piece of every slot."""


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


def choose_tokens(logits: jax.Array, rows: Slots, never: int = -1) -> tuple[jax.Array, jax.Array, jax.Array]:
    """[B] tokens, each by its own row's method, but not `never`; their log-probabilities; [B, 1] what to take off a row's
    logits for the log-probabilities of all, which are not written down where nobody wants them."""
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
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
    return token, (jnp.take_along_axis(logits, token[:, None], axis=1) - total)[:, 0], total


class Programs:
    """Of `slots` rows of up to `size` positions, which is filled up to whole pieces. Every shape is fixed, so a row is computed
    by the same programs whoever its neighbours are.

    Args:
      piece: tokens of a prompt that are read at once.
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
        vocabulary: int,
        has_source: bool,
        never: int,
    ):
        forward, logits, begin = callbacks
        self.slots, self.size, self.piece, self.has_source = slots, -(-size // piece) * piece, piece, has_source
        self.key_words = jax.random.key_data(jax.random.key(0)).size
        top = min(TOP, vocabulary)

        def empty(params: Any) -> State:
            nothing = jnp.zeros((slots, self.size), jnp.int32)
            cache = begin(params, slots, self.size, (nothing, nothing) if has_source else None)
            features = jax.eval_shape(lambda: forward(params, jnp.zeros((slots, 1), jnp.int32), cache)[0][:, 0])
            shape = jax.eval_shape(logits, params, features)
            return State(cache, jnp.zeros(shape.shape, shape.dtype))

        self.shapes = jax.eval_shape(empty, params)
        at = state_sharding(params, self.shapes)
        self.empty = jax.jit(empty, out_shardings=at)
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
        def begin_rows(params: Any, state: State, slot: jax.Array, tokens: jax.Array, count: jax.Array) -> State:
            """The first `count` [R] of tokens [R, P], each into its slot [R]; of a row that counts 0, nothing."""
            R, P = tokens.shape
            features, new = forward(params, tokens, begin(params, R, P, None))
            last = jnp.take_along_axis(features, jnp.maximum(count - 1, 0)[:, None, None], axis=1)[:, 0]
            scores = logits(params, last)

            def write(old: jax.Array, rows: jax.Array) -> jax.Array:
                for r in range(R):
                    row, at = rows[r : r + 1].astype(old.dtype), (slot[r],) + (0,) * (old.ndim - 1)
                    before = jax.lax.dynamic_slice(old, at, row.shape)
                    old = jax.lax.dynamic_update_slice(old, jnp.where(count[r] > 0, row, before), at)
                return old

            layers = tuple(
                layer.replace(k=write(layer.k, kept.k), v=write(layer.v, kept.v))
                for layer, kept in zip(state.cache.layers, new.layers, strict=True)
            )
            cache = state.cache.replace(layers=layers, length=write(state.cache.length, count))
            return State(cache, write(state.logits, scores))

        @functools.partial(in_place, out_shardings=at)
        def go_on(
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
                token, logprob, total = choose_tokens(state.logits, rows, never)
                some = jax.lax.cond(
                    jnp.any(rows.tops & rows.live),
                    lambda: tuple(jax.lax.top_k(state.logits - total, top)[::-1]),
                    lambda: (alternatives[:, 0], alternatives[:, 0].astype(total.dtype)),
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

        self.enter, self.begin_rows, self.go_on, self.step, self.take, self.put = (
            enter,
            begin_rows,
            go_on,
            step,
            take,
            put,
        )

    @property
    def bytes(self) -> int:
        """Of the cache and the scores."""
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(self.shapes))

    @property
    def lengths(self) -> list[int]:
        """Of pieces that are compiled: from LEAST to a whole piece, each a third or a half longer than the one before."""
        sizes = (n for i in range(12) for n in (LEAST << i, (LEAST << i) * 3 // 2) if n != LEAST * 3 // 2)
        return [n for n in sizes if n < self.piece] + [self.piece]

    def together(self, length: int) -> int:
        """Prompts whose first pieces of this length are read by one program; 0: none, each goes by itself into a slot that
        holds its source."""
        if self.has_source:
            return 0
        return min(self.slots, max(1, (TOGETHER if platform() == "cpu" else self.piece * self.slots) // length))

    def wishes(self) -> Slots:
        """Of slots that hold nothing."""
        B = self.slots
        return Slots(
            key=np.zeros((B, self.key_words), np.uint32),
            held=np.zeros(B, bool),
            live=np.zeros(B, bool),
            count=np.zeros(B, np.int32),
            limit=np.zeros(B, np.int32),
            eos=np.full(B, -1, np.int32),
            temperature=np.ones((B, 1), np.float32),
            top_k=np.zeros((B, 1), np.int32),
            top_p=np.ones((B, 1), np.float32),
            min_p=np.zeros((B, 1), np.float32),
            greedy=np.ones(B, bool),
            filtered=np.zeros(B, bool),
            tops=np.zeros(B, bool),
        )
