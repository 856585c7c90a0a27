"""Attention by tiles computes what the whole of it does, for every mask, and keeps no square of the row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bothways import sharding
from bothways.config import MeshConfig
from bothways.model import attention, blockwise
from bothways.model.attention import attend, attend_whole
from bothways.model.axes import activation_shardings, constrain_activation
from bothways.model.blockwise import CACHE_TILE, attend_blockwise, attend_cached, tile_size, visible_tiles
from bothways.model.dropout import ScoreDropout
from bothways.model.kernels import K_AXES, Q_AXES
from bothways.model.mask import Mask

B, T, H, G, K, W = 2, 53, 6, 2, 5, 7
POSITIONS = jnp.tile(jnp.arange(T), (B, 1))
SEGMENTS = jnp.asarray(np.repeat([[1, 2, 3, 0], [1, 2, 0, 0]], [[11, 23, 12, 7], [40, 5, 4, 4]][0], axis=1), jnp.int32)
CAUSAL, BOTH = (Mask.self_attention(POSITIONS, causal=causal) for causal in (True, False))
MASKS = {
    "causal": CAUSAL,
    "bidirectional": BOTH,
    "causal window": CAUSAL.windowed(9),
    "bidirectional window": BOTH.windowed(9),
    "packed causal window": Mask.self_attention(POSITIONS, causal=True, segments=SEGMENTS).windowed(13),
    "packed bidirectional": Mask.self_attention(POSITIONS, causal=False, segments=SEGMENTS),
    "prefix": Mask.self_attention(POSITIONS, causal=True, prefix=jnp.array([3, 29])),
    "blocks": Mask.self_attention(POSITIONS, causal=False, block=6),
    "blocks by row": Mask.self_attention(POSITIONS, causal=False, segments=SEGMENTS, block=jnp.array([2, 7])),
    "two streams": Mask.two_streams(POSITIONS[:, :26], block=5),
    "cross": Mask.cross(SEGMENTS[:, 12:], SEGMENTS),
    "cached": Mask.cached(jnp.array([[19], [2]]) + jnp.arange(17), T),
}
DROPOUT = ScoreDropout(jnp.array([7, 11], jnp.uint32), 0.3)


def outcome(kernel, mask: Mask, dropout=None, dtype=jnp.float32):
    """Output and gradients, where a query sees something."""
    queries = mask.q_positions.shape[1]
    keys = mask.k_positions.shape[1]
    shapes = (B, queries, H, K), (B, keys, G, K), (B, keys, G, W), (B, queries, H, W)
    q, k, v, w = (
        jax.random.normal(jax.random.key(i), shape, jnp.bfloat16).astype(dtype) for i, shape in enumerate(shapes)
    )
    w = w * mask.materialize().any(-1)[:, :, None, None]

    def loss(q, k, v):
        y = kernel(q, k, v, mask, dropout) * (w != 0)
        return jnp.sum(y * w), y

    (_, y), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    return y, grads


def same(found, wanted, tolerance=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), found, wanted)


@pytest.mark.parametrize("name", MASKS)
def test_tiles_equal_the_whole(name):
    """Output and gradients; rows divide by no tile."""
    kernel = functools.partial(attend_blockwise, tile=(8, 16))
    same(outcome(kernel, MASKS[name]), outcome(attend_whole, MASKS[name]))


@pytest.mark.parametrize("name", ["packed causal window", "cached"])
def test_tiles_drop_what_the_whole_drops(name):
    kernel = functools.partial(attend_blockwise, tile=(8, 16))
    same(outcome(kernel, MASKS[name], DROPOUT), outcome(attend_whole, MASKS[name], DROPOUT))
    assert not np.allclose(outcome(attend_whole, MASKS[name], DROPOUT)[0], outcome(attend_whole, MASKS[name])[0])


@pytest.mark.parametrize("name", ["packed causal window", "prefix", "cached"])
def test_tiles_cap_what_the_whole_caps(name):
    """The whole is held against the formula in test_layers.py."""
    whole, kernel = (
        functools.partial(f, cap=0.5) for f in (attend_whole, functools.partial(attend_blockwise, tile=(8, 16)))
    )
    same(outcome(kernel, MASKS[name]), outcome(whole, MASKS[name]))
    for capped, plain in zip(*(jax.tree.leaves(outcome(f, MASKS[name])) for f in (whole, attend_whole)), strict=True):
        assert np.abs(capped - plain).max() > 0.05


def test_bfloat16_differs_by_its_rounding():
    found = outcome(functools.partial(attend_blockwise, tile=(8, 16)), CAUSAL, DROPOUT, jnp.bfloat16)
    assert found[0].dtype == jnp.bfloat16
    same(
        *(jax.tree.map(lambda x: x.astype(jnp.float32), y) for y in (found, outcome(attend_whole, CAUSAL, DROPOUT))), 0.06
    )


def test_tiles_that_a_mask_hides_are_left_out():
    """By the mask's kind; and those of other documents or of slots still empty when it runs."""
    for mask in (CAUSAL, CAUSAL.windowed(3), BOTH, BOTH.windowed(3), MASKS["blocks"]):
        seen = np.pad(mask.materialize()[0], (0, 11)).reshape(4, 16, 4, 16).any((1, 3))
        assert visible_tiles(mask, 53, 53, 16, 16) == [tuple(pair) for pair in np.argwhere(seen)]
    q, k, v = (jnp.ones((B, n, h, K)) for n, h in ((17, H), (T, G), (T, G)))
    poisoned = v.at[:, 40:].set(jnp.nan)  # the newest query is at 35: nothing of a hidden tile may be touched
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "devices_in_use", lambda: 1)
        assert jnp.isfinite(attend_blockwise(q, k, poisoned, MASKS["cached"], tile=(8, 8))).all()


def test_memory_is_linear_in_the_row():
    """Forward and backward of a row four times as long take about four times as much."""

    def temporaries(T: int) -> int:
        x = jax.ShapeDtypeStruct((1, T, 2, 8), jnp.float32)
        mask = Mask.self_attention(jnp.arange(T)[None], causal=True)
        loss = jax.grad(lambda q, k, v: attend(q, k, v, mask).sum(), (0, 1, 2))
        return jax.jit(loss).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "SCORES", 2**16)
        patch.setattr(attention, "devices_in_use", lambda: 1)
        patch.setattr(blockwise, "TILE_ON_CPU", 2**14)
        patch.setattr(blockwise, "devices_in_use", lambda: 1)
        few, many = temporaries(2048), temporaries(8192)
    assert many < 5 * few
    assert many < 8192**2  # a quarter of the scores of one head


def test_size_chooses(monkeypatch):
    """A decoding step never goes by tiles, however long its cache; rows that many devices share do later."""
    calls = []
    monkeypatch.setattr(attention, "attend_blockwise", lambda *args: calls.append(args) or args[0])
    monkeypatch.setattr(attention, "SCORES", 2**18)
    for devices, T, S in ((1, 1, 2**17), (1, 257, 257), (8, 257, 257), (8, 1024, 1024)):
        monkeypatch.setattr(attention, "devices_in_use", lambda devices=devices: devices)
        q, k = (jax.ShapeDtypeStruct((1, n, 8, 2), jnp.float32) for n in (T, S))
        mask = Mask(jnp.zeros((1, T), jnp.int32), jnp.zeros((1, S), jnp.int32))
        jax.eval_shape(lambda q, k, mask=mask: attend(q, k, k, mask), q, k)
    assert [args[0].shape[1] for args in calls] == [257, 1024]
    queries, keys = tile_size(8, 10_000, 10_000)
    assert 2 * queries == keys
    assert tile_size(8, 31, 37) == (31, 37)


@pytest.mark.parametrize("name", ["packed causal window", "prefix"])
@pytest.mark.parametrize("mesh", [MeshConfig(2, 1, 2, 2), MeshConfig(2, 2, 2, 1)])
def test_tiles_on_a_mesh_equal_the_whole(mesh, name, eight_devices):
    """Rows, heads and queries are spread, with dropout."""
    row = jnp.tile(jnp.arange(52), (4, 1))
    segments = jnp.asarray(np.repeat([[1, 2]] * 4, [20, 32], axis=1), jnp.int32)
    mask = {
        "packed causal window": Mask.self_attention(row, causal=True, segments=segments).windowed(13),
        "prefix": Mask.self_attention(row, causal=True, prefix=jnp.array([3, 0, 52, 9])),
    }[name]
    q, k, v = (jax.random.normal(jax.random.key(i), (4, 52, h, K)) for i, h in enumerate((H, G, G)))

    def run(kernel):
        def loss(q, k, v):
            q = constrain_activation(q, *Q_AXES)
            k, v = (constrain_activation(x, *K_AXES) for x in (k, v))
            y = kernel(q, k, v, mask, DROPOUT)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    wanted = run(attend_whole)
    with activation_shardings(sharding.activation_sharding_fn(sharding.make_mesh(mesh, eight_devices))):
        same(run(functools.partial(attend_blockwise, tile=(8, 16))), wanted)


@pytest.mark.parametrize("window", [0, 9, 200])
def test_a_long_cache_is_read_as_far_as_it_is_filled_and_a_row_does_not_see_how_far_others_are(window):
    q, k, v = (
        jax.random.normal(jax.random.key(i), (3, size, heads, 8))
        for i, (size, heads) in enumerate(((2, H), (3 * CACHE_TILE, G), (3 * CACHE_TILE, G)))
    )
    kernel = jax.jit(
        lambda at, k, v, cap=0.0: attend_cached(
            q, k, v, Mask.cached(at[:, None] + jnp.arange(2), k.shape[1]).windowed(window), cap
        ),
        static_argnums=3,
    )
    at = jnp.array([3, CACHE_TILE - 1, CACHE_TILE + 70])
    mask = Mask.cached(at[:, None] + jnp.arange(2), k.shape[1]).windowed(window)
    same(kernel(at, k, v), attend_whole(q, k, v, mask))
    same(kernel(at, k, v, 0.5), attend_whole(q, k, v, mask, cap=0.5))
    assert blockwise.reads_cache_in_tiles(k, mask)
    np.testing.assert_array_equal(jax.jit(functools.partial(attend, cap=0.5))(q, k, v, mask), kernel(at, k, v, 0.5))
    assert np.abs(kernel(at, k, v, 0.5) - kernel(at, k, v)).max() > 0.05
    np.testing.assert_array_equal(kernel(at.at[2].set(5), k, v)[:2], kernel(at, k, v)[:2])
    # A tile that nobody has reached is not read: 0 times NaN would be NaN.
    assert jnp.isfinite(kernel(at, k, v.at[:, 2 * CACHE_TILE :].set(jnp.nan))).all()
