"""Attention of short rows as one Pallas kernel for TPUs: whole rows of keys, with dropout of probabilities inside.

Heads narrower than a matrix unit's 128 lanes would leave it half empty, and to put heads first they are copied. Here q, k and v are
read as projections write them, [B, T, H K]: a program takes 128 lanes, which are 128 / K heads, and sets the lanes of
the other heads to 0 in each product. A row of keys is short enough to be held whole, so the softmax is a plain one, and
nothing is kept for the backward pass but q, k and v: it computes the probabilities again, and draws the same dropout, which is a
hash of (seed, row, head, query, key) (model/dropout.py). Two products forward, five backward (arXiv 2205.14135, algorithm 4).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from bothways.model.dropout import column_hash, keep_factor, row_hash

LANES = 128
LONGEST = 1024
"""Queries or keys of a row: the scores of a block of queries must fit into VMEM."""
HIDDEN = -1e30

# Of [n, K] arrays: a b^T, a b, a^T b.
NT, NN, TN = ((((a,), (b,)), ((), ())) for a, b in ((1, 1), (1, 0), (0, 0)))


class Rows(NamedTuple):
    """What is known of the arrays when tracing."""

    width: int
    """Of a head."""
    heads: int
    """Of a row, on all devices."""
    causal: bool
    rate: float
    """Of dropout."""
    interpret: bool


def dot(a: jax.Array, b: jax.Array, dimensions: Any) -> jax.Array:
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _program() -> tuple[jax.Array, jax.Array, jax.Array]:
    """Numbers of the row, of the block of lanes and of the block of queries; they can be asked for only outside `pl.when`."""
    return pl.program_id(0), pl.program_id(1), pl.program_id(2)


def _heads_of(rows: Rows, lanes: int) -> int:
    return lanes // rows.width


def _each_block(rows: Rows, block: jax.Array, t: int, S: int, blocks: int, run: Callable[[int], None]) -> None:
    """run(n), n the number of keys that some query of this block of t may see. Each block has its own program, since n is a size."""
    if not rows.causal:
        run(S)
    for i in range(blocks if rows.causal else 0):
        pl.when(block == i)(functools.partial(run, min((i + 1) * t, S)))


def _loaded(ref: Any, at: tuple, columns: int, n: int) -> jax.Array:
    """The first n rows of a block [., lanes] of an array with that many columns; what lies behind the last one is 0."""
    x = ref[0, :n]
    lanes = x.shape[1]
    if columns % lanes == 0:
        return x
    column = at[1] * lanes + jax.lax.broadcasted_iota(jnp.int32, (1, lanes), 1)
    return jnp.where(column < columns, x, jnp.zeros_like(x))


def _head(x: jax.Array, j: int, width: int) -> jax.Array:
    """x with the lanes of all heads but the block's j-th set to 0."""
    if x.shape[1] == width:
        return x
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, x.shape[1]), 1)
    return jnp.where(lane // width == j, x, jnp.zeros_like(x))


def _probabilities(
    rows: Rows, at: tuple, q: jax.Array, k: jax.Array, q_segments: jax.Array, k_segments: jax.Array
) -> jax.Array:
    """[t, S] in float32. A query that may see nothing gets the same for every key, as in `attend_whole`."""
    t, S = q.shape[0], k.shape[0]
    seen = q_segments == k_segments
    if rows.causal:
        query = at[2] * t + jax.lax.broadcasted_iota(jnp.int32, (t, S), 0)
        seen &= query >= jax.lax.broadcasted_iota(jnp.int32, (t, S), 1)
    scores = jnp.where(seen, dot(q, k, NT), HIDDEN)
    p = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
    return p * (1.0 / jnp.sum(p, axis=1, keepdims=True))


def _kept(rows: Rows, at: tuple, numbers: Any, T: int, t: int, S: int, j: int, lanes: int) -> jax.Array:
    """[t, S]: `ScoreDropout.factor` of the block's j-th head."""
    head = at[1] * _heads_of(rows, lanes) + j
    first = (numbers[2] + at[0] * rows.heads + head) * T + at[2] * t
    seed = [jnp.full((1, 1), numbers[i], jnp.int32).astype(jnp.uint32) for i in range(2)]
    row = (first + jax.lax.broadcasted_iota(jnp.int32, (t, 1), 0)).astype(jnp.uint32)
    column = jax.lax.broadcasted_iota(jnp.int32, (1, S), 1).astype(jnp.uint32)
    return keep_factor(rows.rate, row_hash(seed, row), column_hash(seed, column))


def _forward(rows: Rows, T: int, columns: int, numbers, q_ref, k_ref, v_ref, q_segments, k_segments, y_ref):
    at, (t, lanes) = _program(), q_ref.shape[1:]

    def run(n: int) -> None:
        q, k, v = _loaded(q_ref, at, columns, t), _loaded(k_ref, at, columns, n), _loaded(v_ref, at, columns, n)
        y = jnp.zeros((t, lanes), jnp.float32)
        for j in range(_heads_of(rows, lanes)):
            p = _probabilities(rows, at, q, _head(k, j, rows.width), q_segments[0], k_segments[0, :, :n])
            if rows.rate:
                p = p * _kept(rows, at, numbers, T, t, n, j, lanes)
            y += dot(p.astype(v.dtype), _head(v, j, rows.width), NN)
        y_ref[0] = y.astype(y_ref.dtype)

    _each_block(rows, at[2], t, k_ref.shape[1], T // t, run)


def _backward(
    rows: Rows, T: int, columns: int, numbers, q_ref, k_ref, v_ref, q_segments, k_segments, dy_ref,
    dq_ref, dk_ref, dv_ref, dk_sum, dv_sum,
):  # fmt: skip
    at, (t, lanes) = _program(), q_ref.shape[1:]

    @pl.when(at[2] == 0)
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    def run(n: int) -> None:
        q, dy = (_loaded(ref, at, columns, t) for ref in (q_ref, dy_ref))
        k, v = (_loaded(ref, at, columns, n) for ref in (k_ref, v_ref))
        dq = jnp.zeros((t, lanes), jnp.float32)
        for j in range(_heads_of(rows, lanes)):
            qj, kj, vj, dyj = (_head(x, j, rows.width) for x in (q, k, v, dy))
            p = _probabilities(rows, at, q, kj, q_segments[0], k_segments[0, :, :n])
            dp, kept = dot(dy, vj, NT), p
            if rows.rate:
                factor = _kept(rows, at, numbers, T, t, n, j, lanes)
                dp, kept = dp * factor, p * factor
            ds = (p * (dp - jnp.sum(p * dp, axis=1, keepdims=True))).astype(q.dtype)
            dq += dot(ds, kj, NN)
            dk_sum[:n] += dot(ds, qj, TN)
            dv_sum[:n] += dot(kept.astype(v.dtype), dyj, TN)
        dq_ref[0] = dq.astype(dq_ref.dtype)

    _each_block(rows, at[2], t, k_ref.shape[1], T // t, run)

    @pl.when(at[2] == T // t - 1)
    def _():
        dk_ref[0] = dk_sum[...].astype(dk_ref.dtype)
        dv_ref[0] = dv_sum[...].astype(dv_ref.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_short(
    rows: Rows,
    q: Float[jax.Array, "B T D"],
    k: Float[jax.Array, "B S D"],
    v: Float[jax.Array, "B S D"],
    q_segments: Int[jax.Array, "B T"],
    k_segments: Int[jax.Array, "B S"],
    numbers: Int[jax.Array, " 3"],
) -> Float[jax.Array, "B T D"]:
    """Attention of one device's rows and heads, D = heads x width; queries are scaled already.

    Args:
      q_segments, k_segments: a query sees keys of its own segment; with `rows.causal` those up to its own index.
      numbers: the two words of the dropout seed, and the number (row x heads + head) of the first head among all devices'.
    """
    return _call_forward(rows, q, k, v, q_segments, k_segments, numbers)[0]


def _grid(q: jax.Array, k: jax.Array, most: int) -> tuple[tuple[int, int, int], int, int, dict[str, pl.BlockSpec]]:
    """(rows, blocks of lanes, blocks of queries); queries and lanes of a block; how arrays are cut."""
    (B, T, D), S = q.shape, k.shape[1]
    t, lanes = next(n for n in (512, 256, LANES) if n <= most and T % n == 0), min(LANES, D)
    specs = {
        "queries": pl.BlockSpec((1, t, lanes), lambda b, h, i: (b, i, h)),
        "keys": pl.BlockSpec((1, S, lanes), lambda b, h, i: (b, 0, h)),
        "q_segments": pl.BlockSpec((1, t, 1), lambda b, h, i: (b, i, 0)),
        "k_segments": pl.BlockSpec((1, 1, S), lambda b, h, i: (b, 0, 0)),
        "numbers": pl.BlockSpec(memory_space=pltpu.SMEM),
    }
    return (B, -(-D // lanes), T // t), t, lanes, specs


def _cost(rows: Rows, q: jax.Array, k: jax.Array, t: int, lanes: int, products: int) -> pl.CostEstimate:
    """Products over all lanes of a block, for each of its heads: with narrow heads most of it multiplies zeros."""
    (B, T, D), S = q.shape, k.shape[1]
    heads = -(-D // lanes) * _heads_of(rows, lanes)
    pairs = sum(t * min(end, S) for end in range(t, T + 1, t)) if rows.causal else T * S
    return pl.CostEstimate(
        flops=products * 2 * B * heads * pairs * lanes,
        transcendentals=B * heads * pairs,
        bytes_accessed=(products + 2) * B * (T + S) * D * q.dtype.itemsize // 2,
    )


def _call_forward(rows, q, k, v, q_segments, k_segments, numbers):
    grid, t, lanes, at = _grid(q, k, 256 if rows.causal else 512)  # of causal rows, fewer see less that is hidden
    y = pl.pallas_call(
        functools.partial(_forward, rows, q.shape[1], q.shape[2]),
        grid=grid,
        in_specs=[at[n] for n in ("numbers", "queries", "keys", "keys", "q_segments", "k_segments")],
        out_specs=at["queries"],
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        interpret=rows.interpret,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=_cost(rows, q, k, t, lanes, 2),
        name="short_rows_forward",
    )(numbers, q, k, v, q_segments[:, :, None], k_segments[:, None])
    return y, (q, k, v, q_segments, k_segments, numbers)


def _call_backward(rows, kept, dy):
    q, k, v, q_segments, k_segments, numbers = kept
    # Five arrays of scores are alive at once: fewer queries a block than forward where rows are long.
    grid, t, lanes, at = _grid(q, k, 256 if rows.causal or k.shape[1] > 512 else 512)
    dq, dk, dv = pl.pallas_call(
        functools.partial(_backward, rows, q.shape[1], q.shape[2]),
        grid=grid,
        in_specs=[at[n] for n in ("numbers", "queries", "keys", "keys", "q_segments", "k_segments", "queries")],
        out_specs=[at["queries"], at["keys"], at["keys"]],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)],
        scratch_shapes=[pltpu.VMEM((k.shape[1], lanes), jnp.float32)] * 2,
        interpret=rows.interpret,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=_cost(rows, q, k, t, lanes, 5),
        name="short_rows_backward",
    )(numbers, q, k, v, q_segments[:, :, None], k_segments[:, None], dy)
    return dq, dk, dv, None, None, None


attend_short.defvjp(_call_forward, _call_backward)
