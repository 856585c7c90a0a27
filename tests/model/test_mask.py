"""Masks, drawn. `x` where a query (row) sees a key (column)."""

import itertools
import re

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bothways.model import mask as mask_module
from bothways.model.mask import Mask

fixed = settings(deadline=None, max_examples=40, derandomize=True, database=None)


def drawn(mask: Mask, row: int = 0) -> list[str]:
    return [" ".join("x" if seen else "." for seen in query) for query in np.asarray(mask.materialize())[row]]


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]


def row(*numbers: int):
    return jnp.array([numbers], jnp.int32)


PLACES = row(0, 1, 2, 3, 4)
CAUSAL = Mask.self_attention(PLACES, causal=True)
SEGMENTS = row(1, 1, 1, 2, 2)

IN_DOCSTRING = {  # in the order of the drawing
    "causal": CAUSAL,
    "bidirectional": Mask.self_attention(PLACES, causal=False),
    "prefix of 2": Mask.self_attention(PLACES, causal=True, prefix=jnp.array([2])),
    "window of 2": CAUSAL.windowed(2),
    "packed": Mask.self_attention(PLACES, causal=True, segments=SEGMENTS),
    "blocks of 1": Mask.self_attention(PLACES, causal=False, block=1),
    "blocks of 2": Mask.self_attention(PLACES, causal=False, block=2),
    "blocks of 5": Mask.self_attention(PLACES, causal=False, block=5),
    "packed blocks of 2": Mask.self_attention(row(0, 1, 2, 0, 1), causal=False, segments=SEGMENTS, block=2),
}


def test_the_module_docstring_draws_what_dense_gives():
    drawing = [line.strip() for line in mask_module.__doc__.splitlines() if set(line) == set("x. ")]
    columns = [[*zip(*[re.split(" {2,}", line) for line in part], strict=True)] for part in (drawing[:5], drawing[5:])]
    assert [list(column) for column in itertools.chain(*columns)] == [drawn(mask) for mask in IN_DOCSTRING.values()]


def test_the_module_docstring_draws_two_streams():
    drawing = [
        re.split(" {2,}", line.strip())[1:] for line in mask_module.__doc__.splitlines() if re.match(" +[hc][0-3] ", line)
    ]
    mask = Mask.two_streams(row(0, 1, 2, 3), block=2)
    assert [" ".join(line) for line in drawing if line] == drawn(mask)


def test_causal():
    assert drawn(CAUSAL) == lines("""
        x . . . .
        x x . . .
        x x x . .
        x x x x .
        x x x x x""")


def test_bidirectional():
    assert drawn(Mask.self_attention(PLACES, causal=False)) == ["x x x x x"] * 5


def test_prefix_is_read_both_ways_and_differs_by_row():
    mask = Mask.self_attention(jnp.tile(PLACES, (2, 1)), causal=True, prefix=jnp.array([3, 0]))
    assert drawn(mask, 0) == lines("""
        x x x . .
        x x x . .
        x x x . .
        x x x x .
        x x x x x""")
    assert drawn(mask, 1) == drawn(CAUSAL)


def test_causal_window():
    assert drawn(CAUSAL.windowed(3)) == lines("""
        x . . . .
        x x . . .
        x x x . .
        . x x x .
        . . x x x""")
    assert drawn(CAUSAL.windowed(0)) == drawn(CAUSAL)


def test_bidirectional_window_reaches_both_ways():
    assert drawn(Mask.self_attention(PLACES, causal=False).windowed(2)) == lines("""
        x x . . .
        x x x . .
        . x x x .
        . . x x x
        . . . x x""")


def test_packed_segments_see_only_themselves_also_where_positions_restart():
    restarting = row(0, 1, 2, 0, 1)
    assert drawn(Mask.self_attention(restarting, causal=True, segments=SEGMENTS)) == lines("""
        x . . . .
        x x . . .
        x x x . .
        . . . x .
        . . . x x""")
    assert drawn(Mask.self_attention(restarting, causal=False, segments=SEGMENTS)) == lines("""
        x x x . .
        x x x . .
        x x x . .
        . . . x x
        . . . x x""")


def test_padding_neither_sees_nor_is_seen():
    assert drawn(Mask.self_attention(PLACES, causal=False, segments=row(0, 1, 1, 0, 0))) == lines("""
        . . . . .
        . x x . .
        . x x . .
        . . . . .
        . . . . .""")


def test_cross_sees_all_of_its_own_segment():
    assert drawn(Mask.cross(row(1, 1, 2, 0), row(1, 1, 1, 2, 2, 0))) == lines("""
        x x x . . .
        x x x . . .
        . . . x x .
        . . . . . .""")


def test_key_segments_alone_hide_padding_only():
    at_positions = jnp.zeros((1, 2), jnp.int32)
    assert drawn(Mask(at_positions, row(0, 0, 0, 0), k_segments=row(1, 2, 0, 1))) == ["x x . x"] * 2


def test_cached_is_the_rows_of_the_full_mask():
    """Each row of the batch goes on from its own length, in a cache with room to spare."""
    mask = Mask.cached(jnp.array([[2, 3], [0, 1]]), size=6)
    assert drawn(mask, 0) == lines("""
        x x x . . .
        x x x x . .""")
    assert drawn(mask, 1) == lines("""
        x . . . . .
        x x . . . .""")


@fixed
@given(
    start=st.integers(0, 4),
    window=st.sampled_from([0, 1, 2, 5]),
    prefix=st.none() | st.integers(0, 7),
)
def test_cached_equals_the_rows_of_the_full_causal_mask(start, window, prefix):
    prefix = None if prefix is None else jnp.array([prefix])
    full = Mask.self_attention(jnp.arange(7)[None], causal=True, prefix=prefix).windowed(window)
    cached = Mask.cached(start + jnp.arange(3)[None], size=7, prefix=prefix).windowed(window)
    assert drawn(cached) == drawn(full)[start : start + 3]


@fixed
@given(data=st.data(), causal=st.booleans(), window=st.sampled_from([0, 1, 3]), with_prefix=st.booleans())
def test_conditions_hold_together(data, causal, window, with_prefix):
    """Any mix of conditions: a pair is visible exactly if each condition, read on its own, lets it through."""

    def draw(n: int, top: int) -> list[int]:
        return data.draw(st.lists(st.integers(0, top), min_size=n, max_size=n))

    q, k, q_segment, k_segment = draw(4, 6), draw(5, 6), draw(4, 2), draw(5, 2)
    prefix = data.draw(st.integers(0, 6)) if with_prefix else None

    def visible(t: int, s: int) -> bool:
        if q_segment[t] != k_segment[s] or k_segment[s] == 0:
            return False
        if window and not -window < q[t] - k[s] < window:
            return False
        return not causal or k[s] <= q[t] or (prefix is not None and k[s] < prefix)

    value = Mask(row(*q), row(*k), row(*q_segment), row(*k_segment), None if prefix is None else jnp.array([prefix]))
    dense = np.asarray(value.replace(causal=causal, window=window).materialize())[0]
    assert dense.tolist() == [[visible(t, s) for s in range(5)] for t in range(4)]


@fixed
@given(data=st.data(), streams=st.sampled_from([1, 2]), window=st.sampled_from([0, 2]))
def test_blocks_differ_by_row_and_restart_with_documents(data, streams, window):
    """Against the rule for one pair at a time, of packed rows with a block size each; and of parts of them."""
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    position = [p for n in lengths for p in range(n)]
    segment = [i for i, n in enumerate(lengths, 1) for _ in range(n)]
    blocks, n = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 7))), len(position)

    def visible(b: int, t: int, s: int) -> bool:
        (q_clean, q), (k_clean, k) = divmod(t, n), divmod(s, n)
        q_clean, k_clean = (x == streams - 1 for x in (q_clean, k_clean))
        mine, theirs = position[q] // blocks[b], position[k] // blocks[b]
        near = not window or abs(position[q] - position[k]) < window
        if segment[q] != segment[k] or not near or (q_clean and not k_clean):
            return False
        return theirs == mine if not k_clean else theirs < mine or (q_clean and theirs == mine)

    positions, segments = (jnp.tile(row(*x), (2, 1)) for x in (position, segment))
    mask = (
        Mask.self_attention(positions, causal=False, segments=segments, block=jnp.array(blocks))
        if streams == 1
        else Mask.two_streams(positions, segments=segments, block=jnp.array(blocks))
    ).windowed(window)
    dense = np.asarray(mask.materialize())
    wanted = [[[visible(b, t, s) for s in range(streams * n)] for t in range(streams * n)] for b in range(2)]
    assert dense.tolist() == wanted
    queries, keys = slice(n // 2, n), slice(0, n)
    assert (np.asarray(mask.slice(queries, keys).materialize()) == dense[:, queries, keys]).all()


def test_a_cache_in_blocks_is_the_rows_of_the_full_mask():
    full = np.asarray(Mask.self_attention(jnp.arange(9)[None], causal=False, block=3).materialize())[0]
    for start in (0, 3, 4):
        cached = Mask.cached(start + jnp.arange(4)[None], size=9, block=3)
        assert (np.asarray(cached.materialize())[0] == full[start : start + 4]).all()
