"""Attention in plain XLA that never holds all scores: tiles of queries and keys with a running softmax.

The softmax of a row is put together from its tiles (arXiv 1805.02867; arXiv 2112.05682), and the backward pass computes
each tile's probabilities again from the row's log-sum-exp (arXiv 2205.14135, algorithm 4): what is kept is linear in
the row. One loop over the tiles that the mask lets through, with any mask, dropout, groups and cached steps.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from bothways.model.axes import devices_in_use, platform
from bothways.model.dropout import ScoreDropout
from bothways.model.kernels import is_sequence_sharded, positions_match_order
from bothways.model.layers import soft_cap
from bothways.model.mask import Mask
from bothways.model.products import contract

HIDDEN = -1e30
TILE, TILE_ON_CPU = 2**24, 2**20
"""Scores of a tile, on one device, over all rows and heads. A CPU's tile, 4 MiB, stays in its cache."""
CACHE_TILE = 128
"""Keys of a tile of a cache. Batched products of few queries are slow on a CPU, and most of a cache may be empty."""
LEAST, MOST = 128, 512
"""Queries of a tile; keys are twice as many."""


def scores_of(
    q: Float[jax.Array, "B G ... K"], k: Float[jax.Array, "B G S K"], cap: float = 0.0
) -> Float[jax.Array, "B G ... S"]:
    """Scores in float32 of queries that are scaled already, softly capped. What else is done to a score alone belongs here:
    all of XLA's attention calls it, and the backward pass of tiles differentiates it.
    """
    equation = "bgnk,bgsk->bgns" if q.ndim == 4 else "bgrtk,bgsk->bgrts"
    return soft_cap(contract(equation, q, k, jnp.float32), cap)


def attend_blockwise(
    q: Float[jax.Array, "B T H K"],
    k: Float[jax.Array, "B S G K"],
    v: Float[jax.Array, "B S G W"],
    mask: Mask,
    dropout: ScoreDropout | None = None,
    cap: float = 0.0,
    *,
    tile: tuple[int, int] | None = None,
) -> Float[jax.Array, "B T H W"]:
    """The same as `attend_whole`, in memory linear in T and S.

    Args:
      tile: queries and keys of a tile; None: by size. All queries are one tile where devices share those of a row.
    """
    B, T, H, K = q.shape
    S, G, W = k.shape[1], k.shape[2], v.shape[3]
    n_q, n_k = tile or tile_size(B * H, T, S)
    n_q, n_k = (T if is_sequence_sharded(q) else min(n_q, T)), min(n_k, S)
    pairs = tuple(visible_tiles(mask, T, S, n_q, n_k))
    known = mask.k_segments is None and (positions_match_order(mask) or _by_blocks(mask))
    more_q, more_k = -T % n_q, -S % n_k
    tiling = Tiling(pairs, n_q, n_k, S, (B, H, T), skip=not known and devices_in_use() == 1, cap=cap)

    def tiles(x: jax.Array, more: int, size: int, heads: tuple[int, ...]) -> jax.Array:
        """[B, N, H, K] as [N / size, B, *heads, size, K]."""
        x = jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) if more else x
        x = x.reshape(B, -1, size, *heads, x.shape[-1])
        return jnp.moveaxis(jnp.moveaxis(x, 1, 0), 2, -2)

    args = tiles(q * K**-0.5, more_q, n_q, (G, H // G)), tiles(k, more_k, n_k, (G,)), tiles(v, more_k, n_k, (G,))
    out = _attend(*args, mask.map_tokens(_longer(more_q), _longer(more_k)), dropout, tiling)  # [N, B, G, R, n_q, W]
    out = jnp.moveaxis(jnp.moveaxis(out, -2, 2), 0, 1).reshape(B, T + more_q, H, W)
    return out[:, :T].astype(v.dtype)


def reads_cache_in_tiles(k: jax.Array, mask: Mask) -> bool:
    """Whether `attend_cached` is for these keys [B, S, G, K]: a long cache, of which each row has filled its first part."""
    plain = mask.q_segments is None and mask.prefix is None and mask.block is None and not mask.positions_are_sequential
    long = k.shape[1] >= 2 * CACHE_TILE and k.shape[1] % CACHE_TILE == 0
    return mask.causal and plain and long and platform() == "cpu" and devices_in_use() == 1


def attend_cached(
    q: Float[jax.Array, "B T H K"],
    k: Float[jax.Array, "B S G K"],
    v: Float[jax.Array, "B S G W"],
    mask: Mask,
    cap: float = 0.0,
) -> Float[jax.Array, "B T H W"]:
    """New tokens on a causal cache, of which only the tiles up to the longest row's last token are read.

    A tile beyond a row's own last token changes no bit of its result: its probabilities are exactly 0, and what was summed
    before is multiplied by exactly 1. So a row does not depend on how long its neighbours are.
    """
    B, T, H, K = q.shape
    G, W = k.shape[2], v.shape[3]
    q = (q * K**-0.5).transpose(0, 2, 1, 3).reshape(B, G, H // G * T, K)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # as a cache keeps them
    rows = (B, G, H // G, T)

    def turn(j: jax.Array, carry: tuple) -> tuple:
        out, top, total = carry
        keys, values = (jax.lax.dynamic_slice_in_dim(x, j * CACHE_TILE, CACHE_TILE, axis=2) for x in (k, v))
        seen = mask.map_tokens(lambda x: x, _cut(j, CACHE_TILE)).materialize()
        scores = jnp.where(seen[:, None, None], scores_of(q, keys, cap).reshape(*rows, CACHE_TILE), HIDDEN)
        new_top = jnp.maximum(top, scores.max(-1))
        p, shrink = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)
        p_folded = p.astype(v.dtype).reshape(B, G, -1, CACHE_TILE)
        more = jnp.einsum("bgns,bgsw->bgnw", p_folded, values, preferred_element_type=jnp.float32).reshape(*rows, W)
        return out * shrink[..., None] + more, new_top, total * shrink + p.sum(-1)

    first = jnp.maximum(jnp.min(mask.q_positions) - mask.window + 1, 0) // CACHE_TILE if mask.window else 0
    last = jnp.max(mask.q_positions) // CACHE_TILE + 1
    empty = jnp.zeros((*rows, W)), jnp.full(rows, HIDDEN), jnp.zeros(rows)
    out, _, total = jax.lax.fori_loop(first, jnp.minimum(last, k.shape[2] // CACHE_TILE), turn, empty)
    return (out / total[..., None]).astype(v.dtype).reshape(B, H, T, W).transpose(0, 2, 1, 3)


def tile_size(rows: int, T: int, S: int) -> tuple[int, int]:
    """Queries and keys of a tile so that `rows` of them, on all devices, hold about TILE scores on each."""
    scores = (TILE_ON_CPU if platform() == "cpu" else TILE) * devices_in_use() / rows
    queries = 1 << max(0, round(math.log2(max(1.0, scores / 2)) / 2))
    queries = max(LEAST, min(MOST, queries))
    return min(queries, T), min(2 * queries, S)


def visible_tiles(mask: Mask, T: int, S: int, n_q: int, n_k: int) -> list[tuple[int, int]]:
    """Indices (query tile, key tile) of all tiles in which something may be seen, as far as the kind of mask shows it."""
    found = []
    ranged = positions_match_order(mask) and (mask.causal or mask.window)
    for i in range(-(-T // n_q)):
        end = min((i + 1) * n_q, T)
        keys = mask.visible_key_range(slice(i * n_q, end)) if ranged else slice(0, S)
        if _by_blocks(mask):
            keys = slice(0, min(S, -(-end // mask.block_by_index) * mask.block_by_index))
        found += [(i, j) for j in range(keys.start // n_k, -(-keys.stop // n_k))]
    return found


def _by_blocks(mask: Mask) -> bool:
    return mask.block_by_index > 0 and mask.streams == 1 and not (mask.causal or mask.window)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """What is known of the tiles when tracing."""

    pairs: tuple[tuple[int, int], ...]
    n_q: int
    n_k: int
    S: int
    sizes: tuple[int, int, int]
    """B, H, T."""
    skip: bool
    """Whether a tile is looked at, when it runs, for whether anything of it is visible."""
    cap: float
    """Of scores; 0: none."""


def _tile(q, k, mask: Mask, i: jax.Array, j: jax.Array, t: Tiling) -> Float[jax.Array, "B G R t s"]:
    """Scores of a tile."""
    return jnp.where(_visible(mask, i, j, t)[:, None, None], scores_of(q, k, t.cap), HIDDEN)


def _longer(more: int) -> Callable[[jax.Array], jax.Array]:
    return lambda x: jnp.pad(x, ((0, 0), (0, more))) if more else x


def _cut(i: jax.Array, size: int) -> Callable[[jax.Array], jax.Array]:
    return lambda x: jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=1)


def _visible(mask: Mask, i: jax.Array, j: jax.Array, t: Tiling) -> Bool[jax.Array, "B T S"]:
    seen = mask.map_tokens(_cut(i, t.n_q), _cut(j, t.n_k)).materialize()
    return seen & (j * t.n_k + jnp.arange(t.n_k) < t.S) if t.S % t.n_k else seen


def _dropped(p: jax.Array, dropout: ScoreDropout | None, i: jax.Array, j: jax.Array, t: Tiling) -> jax.Array:
    """p [B, G, R, t, s] of a tile, what is dropped set to 0."""
    if dropout is None:
        return p
    queries, keys = i * t.n_q + jnp.arange(t.n_q), j * t.n_k + jnp.arange(t.n_k)
    return p * dropout.factor(*t.sizes, queries, keys).reshape(p.shape)


def _each(t: Tiling, mask: Mask, step: Callable, carry: Any) -> Any:
    """`step(parts, i, j)` for every tile that may hold something visible; it changes `parts`, those of `carry` that
    belong to query tile i and key tile j: carry is (by query tile, by key tile)."""

    def turn(carry: Any, pair: jax.Array) -> tuple[Any, None]:
        i, j = pair
        parts = [jax.tree.map(lambda x: x[at], tree) for tree, at in zip(carry, (i, j), strict=True)]  # noqa: B023
        looked_at = functools.partial(jax.lax.cond, _visible(mask, i, j, t).any()) if t.skip else lambda do, _: do()
        new = looked_at(lambda: step(parts, i, j), lambda: parts)
        put = [
            jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, at, 0), tree, part)  # noqa: B023
            for tree, part, at in zip(carry, new, (i, j), strict=True)
        ]
        return put, None

    return jax.lax.scan(turn, carry, jnp.asarray(np.array(t.pairs, np.int32)))[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q, k, v, mask: Mask, dropout: ScoreDropout | None, t: Tiling) -> jax.Array:
    return _forward(q, k, v, mask, dropout, t)[0]


def _forward(q, k, v, mask: Mask, dropout: ScoreDropout | None, t: Tiling) -> tuple[jax.Array, tuple]:
    def step(parts: list, i: jax.Array, j: jax.Array) -> list:
        (out, top, total), _ = parts
        scores = _tile(q[i], k[j], mask, i, j, t)
        new_top = jnp.maximum(top, scores.max(-1))
        p, shrink = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)
        total = total * shrink + p.sum(-1)
        p = _dropped(p, dropout, i, j, t).astype(v.dtype)
        out = out * shrink[..., None] + jnp.einsum("bgrts,bgsw->bgrtw", p, v[j], preferred_element_type=jnp.float32)
        return [(out, new_top, total), ()]

    rows = q.shape[:-1]
    empty = jnp.zeros((*rows, v.shape[-1])), jnp.full(rows, HIDDEN), jnp.zeros(rows)
    (out, top, total), _ = _each(t, mask, step, [empty, ()])
    # Where no tile was looked at nothing is visible, and what comes out is never used; it is not NaN.
    total = jnp.maximum(total, 1e-30)
    out = (out / total[..., None]).astype(v.dtype)
    return out, (q, k, v, mask, dropout, out, top + jnp.log(total))


def _backward(t: Tiling, kept: tuple, d_out: jax.Array) -> tuple:
    q, k, v, mask, dropout, out, log_total = kept
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), -1)

    def step(parts: list, i: jax.Array, j: jax.Array) -> list:
        dq, (dk, dv) = parts
        scores, pull = jax.vjp(lambda q, k: _tile(q, k, mask, i, j, t), q[i], k[j])
        p = jnp.exp(scores - log_total[i][..., None])
        dropped = _dropped(p, dropout, i, j, t)
        dp = jnp.einsum("bgrtw,bgsw->bgrts", d_out[i], v[j], preferred_element_type=jnp.float32)
        more_q, more_k = pull(p * (_dropped(dp, dropout, i, j, t) - delta[i][..., None]))
        dv = dv + jnp.einsum("bgrts,bgrtw->bgsw", dropped.astype(v.dtype), d_out[i], preferred_element_type=jnp.float32)
        return [dq + more_q.astype(jnp.float32), (dk + more_k.astype(jnp.float32), dv)]

    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (q, k, v)]
    dq, (dk, dv) = _each(t, mask, step, [zeros[0], (zeros[1], zeros[2])])
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_attend.defvjp(_forward, _backward)
