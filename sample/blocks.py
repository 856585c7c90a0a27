"""Continuing text a block at a time: what lies between a GPT's next token and a BERT's whole row, with a KV cache.

One jitted loop, and one forward pass of the open block in every turn of it. A row whose block is not written yet takes a
denoising step (sample/denoise.py); one whose block is written puts its keys and values, of clean tokens now, into the
cache, and opens the next block. Exact, since a block never sees a later one (arXiv 2503.09573, section 3.2). Rows are in
the same loop at different points; what a row gets depends on its own tokens and key only.

A model that predicts the next token draws the first one of a block from the clean block before it, as a GPT does: blocks
of 1 are a GPT's decoding, a pass a token.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from bothways.model.cache import Cache
from bothways.sample.decode import Begin, Decoder, Logits, Row, close_bucket, padded
from bothways.sample.denoise import Canvas, Denoising, fold, keep_confident, propose
from bothways.sample.sampling_params import SamplingParams, sample_token

USUAL_BLOCK = 16
"""Tokens that are written together by default."""
BlockForward = Callable[[Any, jax.Array, Cache, int], tuple[jax.Array, Cache]]
"""(params, tokens [B, T], cache, block size) -> (features [B, T, D], cache)."""


@flax.struct.dataclass
class BlockState:
    """A batch in the middle of writing; N is the most tokens a row can still get, b the block size."""

    cache: Cache
    """Of finished blocks; its length is where a row's open block begins."""
    canvas: Canvas
    """The open block of every row, [B, b]."""
    origin: Int[jax.Array, " B"]
    """Tokens of each row's prompt."""
    tokens: Int[jax.Array, "B N"]
    logprobs: Float[jax.Array, "B N"]
    count: Int[jax.Array, " B"]
    """Tokens each row has got, of blocks that are written."""
    limit: Int[jax.Array, " B"]
    ended: Bool[jax.Array, " B"]
    passes: Int[jax.Array, " B"]
    """Forward passes that each row took after its prompt."""

    @property
    def live(self) -> Bool[jax.Array, " B"]:
        return ~self.ended & (self.count < self.limit)

    def keep(self, rows: Bool[jax.Array, " B"], other: "BlockState") -> "BlockState":
        """This state in these rows, the other in the rest; the cache's contents are this one's."""

        def pick(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(rows.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        bare = self.replace(cache=self.cache.length), other.replace(cache=other.cache.length)
        found = jax.tree.map(pick, *bare)
        return found.replace(cache=self.cache.replace(length=found.cache))


class BlockDecoder(Decoder):
    """Compiled prefill and denoising loop of one model, for one block size; `generate` is Decoder's.

    Args:
      forward: the model with a cache and blocks.
      logits: (params, features [B, T, D]) -> [B, T, V], minus infinity for what is never written.
      begin: (params, batch, size, None) -> Cache without tokens.
      context: longest sequence of the model.
      eos: the token that ends a row.
      mask: the token that stands for a hidden one.
      predicts: which token an output predicts, `next` or `own` (model/config.py).
      block: tokens of a block.
    """

    def __init__(
        self,
        forward: BlockForward,
        logits: Logits,
        begin: Begin,
        context: int,
        eos: int,
        mask: int,
        predicts: str,
        block: int,
    ):
        self.context_length, self.eos, self.block, self.how = context // block * block, eos, block, Denoising.make()
        b, ahead = block, predicts == "next"

        def keys_at(keys: jax.Array, state: BlockState, offset: jax.Array) -> jax.Array:
            """[B, b] a key for every token of the open block, which its index in the text decides."""
            first = state.cache.length - state.origin + offset
            return fold(keys, jnp.maximum(first[:, None] + jnp.arange(b), 0))

        def opened(
            state: BlockState, scores: jax.Array, keys: jax.Array, offset: jax.Array, how: SamplingParams
        ) -> Canvas:
            """The block at the cache's length, all of it hidden; or its first token drawn from `scores` [B, V]."""
            hidden = jnp.ones(state.canvas.hidden.shape, bool)
            zeros = jnp.zeros_like(state.canvas.logprobs)
            canvas = Canvas(jnp.full_like(state.canvas.tokens, mask), zeros, hidden, hidden, jnp.zeros_like(state.count))
            if not ahead:
                return canvas
            token, logprob = sample_token(scores, keys_at(keys, state, offset)[:, 0], how)
            first = jnp.arange(b) == 0
            return canvas.replace(
                tokens=jnp.where(first, token[:, None], canvas.tokens),
                logprobs=jnp.where(first, logprob[:, None], zeros),
                open=hidden & ~first,
                hidden=hidden & ~first,
            )

        def settled(state: BlockState) -> BlockState:
            """Blocks that are written join their row's tokens, up to its limit or the end of the text."""
            canvas, rows = state.canvas, jnp.arange(len(state.count))[:, None]
            index = (state.cache.length - state.origin)[:, None] + jnp.arange(b)
            written = state.live & ~jnp.any(canvas.hidden, axis=1)
            new = written[:, None] & (index >= 0) & (index < state.limit[:, None])
            end = new & (canvas.tokens == eos)
            first_end = jnp.min(jnp.where(end, index, state.tokens.shape[1]), axis=1)
            count = jnp.minimum(jnp.minimum(state.limit, index[:, -1] + 1), first_end + 1)
            at = rows, jnp.where(new, index, state.tokens.shape[1])  # behind the row, where it is dropped
            return state.replace(
                tokens=state.tokens.at[at].set(canvas.tokens, mode="drop"),
                logprobs=state.logprobs.at[at].set(canvas.logprobs, mode="drop"),
                count=jnp.where(written, count, state.count),
                ended=state.ended | jnp.any(end, axis=1),
            )

        @functools.partial(jax.jit, static_argnames="size")
        def prefill(
            params: Any,
            tokens: jax.Array,
            lengths: jax.Array,
            limit: jax.Array,
            keys: jax.Array,
            offset: jax.Array,
            method: SamplingParams,
            size: int,
        ) -> BlockState:
            """Whole blocks of the prompts into the cache, the rest of each prompt into its first open block."""
            B, T = tokens.shape
            features, cache = forward(params, tokens, begin(params, B, size, None), b)
            begins = lengths // b * b
            cache = cache.replace(length=begins)  # what lies behind is overwritten
            at = begins[:, None] + jnp.arange(b)
            known = at < lengths[:, None]
            part = jnp.take_along_axis(tokens, jnp.minimum(at, T - 1), axis=1)
            none, floats = jnp.zeros((B,), jnp.int32), jnp.zeros((B, size), jnp.float32)
            canvas = Canvas(jnp.where(known, part, mask), jnp.zeros((B, b)), ~known, ~known, none)
            state = BlockState(
                cache, canvas, lengths, floats.astype(jnp.int32), floats, none, limit, none.astype(bool), none
            )
            if ahead:  # a prompt that ends with its block
                last = jnp.maximum(begins - 1, 0)[:, None, None]
                scores = logits(params, jnp.take_along_axis(features, last, axis=1))[:, 0]
                new = state.replace(canvas=opened(state, scores, keys, offset, method))
                state = new.keep(begins == lengths, state)
            return settled(state)

        @functools.partial(jax.jit, donate_argnums=1)
        def run(
            params: Any,
            state: BlockState,
            keys: jax.Array,
            offset: jax.Array,
            method: SamplingParams,
            most: jax.Array,
            how: Denoising,
        ) -> BlockState:
            """Forward passes until a row has got `most` tokens more, or all have ended."""
            had = state.count

            def going(state: BlockState) -> jax.Array:
                return jnp.any(state.live) & ~jnp.any(state.count - had >= most)

            def turn(state: BlockState) -> BlockState:
                canvas, live = state.canvas, state.live
                seen = jnp.where(canvas.hidden, mask, canvas.tokens)
                features, cache = forward(params, seen, state.cache, b)
                scores = logits(params, features)
                # Rows whose block is written: it is in the cache now, and the next one opens.
                after = state.replace(cache=cache.replace(length=state.cache.length + b), passes=state.passes + 1)
                after = after.replace(canvas=opened(after, scores[:, -1], keys, offset, method))
                stopped = state.replace(cache=cache.replace(length=state.cache.length))
                if ahead and b == 1:
                    return settled(after.keep(live, stopped))
                # The others take a denoising step.
                own = jnp.roll(scores, 1, axis=1) if ahead else scores
                numbers = fold(keys_at(keys, state, offset), jnp.broadcast_to(canvas.step[:, None], canvas.tokens.shape))
                step = keep_confident(canvas, *propose(own, numbers, method), how, numbers)
                same = stopped.replace(canvas=step, passes=state.passes + 1)
                return settled(after.keep(~jnp.any(canvas.hidden, axis=1), same).keep(live, stopped))

            return jax.lax.while_loop(going, turn, state)

        self.block_prefill, self.block_run = prefill, run

    def filling(self, how: Denoising) -> "BlockDecoder":
        """The same programs with another way of filling a block."""
        other = copy.copy(self)
        other.how = how
        return other

    def begin(
        self, params: Any, rows: Sequence[Row], limits: Sequence[int], method: SamplingParams
    ) -> tuple[BlockState, jax.Array, jax.Array]:
        """As Decoder.begin."""
        lengths = [len(row.context) for row in rows]
        tokens, _ = padded([row.context for row in rows], self.context_length)
        fill = len(tokens) - len(rows)
        size = max(tokens.shape[1], min(close_bucket(tokens.shape[1] + max(limits)), self.context_length))
        size = -(-size // self.block) * self.block
        keys, offset = self.keys_of(rows, fill)
        limit = np.array([*limits] + [0] * fill)
        args = tokens, np.array(lengths + [1] * fill), limit, keys, offset, method
        return self.block_prefill(params, *args, size=size), keys, offset

    def go_on(
        self, params: Any, state: BlockState, keys: jax.Array, offset: jax.Array, method: SamplingParams, most: int
    ) -> BlockState:
        return self.block_run(params, state, keys, offset, method, jnp.int32(most), self.how)


def usual_block(sizes: Sequence[int], context: int) -> int:
    """The largest block among those trained on, up to USUAL_BLOCK; of whole rows (0) alone, or none, USUAL_BLOCK or half the row."""
    known = sorted(set(sizes) - {0})
    if not known:
        return min(USUAL_BLOCK, context // 2)
    return max((size for size in known if size <= USUAL_BLOCK), default=known[0])


def block_decoder(module: nn.Module, never: np.ndarray, eos: int, mask: int, block: int) -> BlockDecoder:
    """The decoder of a GPT for one block size.

    Args:
      never: [V] bool, tokens that are never written.
    """
    cfg = module.cfg

    def forward(params: Any, tokens: jax.Array, cache: Cache, block: int) -> tuple[jax.Array, Cache]:
        return module.apply({"params": params}, tokens, cache=cache, block=block)

    def logits(params: Any, features: jax.Array) -> jax.Array:
        return jnp.where(never, -jnp.inf, module.apply({"params": params}, features, method="logits"))

    def begin(params: Any, batch: int, size: int, source: None) -> Cache:
        return Cache.empty(cfg, batch, size)

    return BlockDecoder(forward, logits, begin, cfg.context_length, eos, mask, module.predicts, block)
