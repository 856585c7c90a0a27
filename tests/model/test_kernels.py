"""Every kernel computes what the drawn mask says, for every mask that it claims; interpreted where its device is not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bothways import sharding
from bothways.config import MeshConfig
from bothways.model import attention, kernels
from bothways.model.attention import attend, attend_whole
from bothways.model.axes import activation_shardings, constrain_activation, traced_for
from bothways.model.mask import Mask
from bothways.registry import make_module

B, T, H, G, K = 4, 256, 4, 2, 8


def packed(lengths: list[list[int]]) -> tuple[jax.Array, jax.Array]:
    """(positions, segments) of rows of documents; what is left at the end of a row is padding."""
    rows = [[(p, s) for s, n in enumerate(row, 1) for p in range(n)] for row in lengths]
    rows = [row + [(p, 0) for p in range(T - len(row))] for row in rows]
    return tuple(jnp.asarray(np.array(rows)[..., i], jnp.int32) for i in range(2))


PLACES = jnp.tile(jnp.arange(T), (B, 1))
POSITIONS, SEGMENTS = packed([[256], [100, 156], [3, 200, 13], [130, 40]])
CAUSAL, BOTH = (Mask.self_attention(PLACES, causal=causal) for causal in (True, False))
MASKS = {
    "causal": CAUSAL,
    "bidirectional": BOTH,
    "causal window": CAUSAL.windowed(70),
    "bidirectional window": BOTH.windowed(70),
    "packed causal": Mask.self_attention(POSITIONS, causal=True, segments=SEGMENTS),
    "packed bidirectional": Mask.self_attention(POSITIONS, causal=False, segments=SEGMENTS),
    "packed causal window": Mask.self_attention(POSITIONS, causal=True, segments=SEGMENTS).windowed(33),
    "cross": Mask.cross(SEGMENTS[:, 128:], SEGMENTS),
    "blocks of 16": Mask.self_attention(PLACES, causal=False, block=16),
    "two streams": Mask.two_streams(PLACES[:, :128], block=8),
    "hidden keys": Mask(PLACES[:, :128] * 0, PLACES * 0, k_segments=SEGMENTS),
}
BLOCKS_BY_ROW = Mask.self_attention(POSITIONS, causal=False, segments=SEGMENTS, block=jnp.array([3, 16, 256, 1]))
PREFIX = Mask.self_attention(PLACES, causal=True, prefix=jnp.array([3, 0, 256, 9]))


def inputs(mask: Mask, dtype=jnp.float32, width: int = K) -> tuple[jax.Array, ...]:
    """Queries, keys, values of this width, and weights for the output."""
    queries = mask.q_positions.shape[1]
    shapes = (B, queries, H, K), (B, T, G, K), (B, T, G, width), (B, queries, H, width)
    keys = jax.random.split(jax.random.key(0), 4)
    return tuple(jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))


def outcome(kernel, mask: Mask, width: int = K) -> tuple:
    """Output and gradients, where a query sees something."""
    q, k, v, weight = inputs(mask, width=width)
    weight = weight * mask.materialize().any(-1)[:, :, None, None]

    def loss(q, k, v):
        y = kernel(q, k, v, mask) * (weight != 0)
        return jnp.sum(y * weight), y

    (_, y), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return y, grads


def same(found, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), found, wanted)


@pytest.mark.parametrize("name", [*MASKS, "prefix", "blocks by row"])
def test_blocks_of_queries_equal_the_reference(name):
    mask = (MASKS | {"prefix": PREFIX, "blocks by row": BLOCKS_BY_ROW})[name]
    same(outcome(attend, mask, 24), outcome(attend_whole, mask, 24))


@pytest.mark.parametrize("scores", [2**24, 0])
def test_a_cap_reaches_blocks_of_queries_and_tiles(scores, monkeypatch):
    monkeypatch.setattr(attention, "SCORES", scores)
    capped = functools.partial(attend_whole, cap=0.5)
    same(outcome(functools.partial(attend, cap=0.5), CAUSAL, 24), outcome(capped, CAUSAL, 24))


@pytest.mark.parametrize("at_positions", [128, 131, 250, 255])
@pytest.mark.parametrize(("causal", "window"), [(True, 0), (True, 50), (True, 1), (False, 50), (False, 200)])
def test_blocks_leave_out_what_is_hidden_and_nothing_else(causal, window, at_positions):
    """Also where the last block is shorter. Scores of all queries and all keys stand nowhere."""
    mask = Mask.self_attention(PLACES[:, :at_positions], causal=causal).windowed(window)
    q, k, v, _ = (x[:, :at_positions] for x in inputs(CAUSAL))
    same(attend(q, k, v, mask), attend_whole(q, k, v, mask))
    seen = mask.materialize()[0]
    for begin in range(0, at_positions, 17):
        queries = slice(begin, min(begin + 17, at_positions))
        keys = mask.visible_key_range(queries)
        assert np.flatnonzero(seen[queries].any(0)).tolist() == list(range(keys.start, keys.stop))
    program = str(jax.make_jaxpr(lambda q, k, v: attend(q, k, v, mask))(q, k, v))
    assert f"{at_positions},{at_positions}]" not in program


@pytest.mark.parametrize("name", MASKS)
def test_splash_equals_the_reference(name):
    mask = MASKS[name]
    q, k, v, _ = inputs(mask)
    assert kernels.choose("splash", q, k, v, mask) == "splash"
    same(outcome(kernels.splash, mask, 24), outcome(attend_whole, mask, 24))


@pytest.mark.parametrize("name", ["packed causal window", "bidirectional"])
def test_splash_caps_scores_and_no_other_kernel_is_chosen_for_that(name, monkeypatch):
    mask, capped = MASKS[name], functools.partial(attend_whole, cap=0.5)
    same(outcome(functools.partial(kernels.splash, cap=0.5), mask, 24), outcome(capped, mask, 24))
    assert np.abs(outcome(capped, mask, 24)[0] - outcome(attend_whole, mask, 24)[0]).max() > 0.05
    q, k, v, _ = inputs(mask, jnp.bfloat16)
    for device, kernel in (("tpu", "splash"), ("gpu", "xla")):
        monkeypatch.setattr(kernels, "platform", lambda device=device: device)
        assert kernels.choose("auto", q, k, v, mask, cap=0.5) == kernel
    k = v = q  # heads that the kernel of short rows knows
    monkeypatch.setattr(kernels, "platform", lambda: "tpu")
    assert [kernels.choose("auto", q, k, v, BOTH, cap=cap) for cap in (0.0, 0.5)] == ["short", "splash"]


@pytest.mark.parametrize("name", ["packed causal window", "bidirectional"])
def test_splash_on_a_mesh_equals_the_reference(name, eight_devices):
    """Rows, heads and positions are all sharded."""
    mesh = sharding.make_mesh(MeshConfig(2, 1, 2, 2), eight_devices)
    wanted = outcome(attend_whole, MASKS[name])
    with activation_shardings(sharding.activation_sharding_fn(mesh)):
        same(outcome(kernels.splash, MASKS[name]), wanted)


@pytest.mark.parametrize("name", [*MASKS, "prefix", "blocks by row"])
def test_cudnn_is_told_the_same_mask(name):
    """Without a GPU, XLA computes from the arguments that cuDNN would get."""
    mask = (MASKS | {"prefix": PREFIX, "blocks by row": BLOCKS_BY_ROW})[name]
    q, k, v, _ = inputs(mask, jnp.bfloat16)
    with traced_for("gpu"):
        assert kernels.choose("cudnn", q, k, v, mask) == "cudnn"
    same(outcome(lambda *args: kernels.cudnn(*args, implementation="xla"), mask), outcome(attend_whole, mask))


def test_what_a_kernel_does_not_know_is_left_to_xla(eight_devices, monkeypatch):
    q, k, v, _ = inputs(CAUSAL)
    assert kernels.choose("auto", q, k, v, CAUSAL) == "xla"  # this is a CPU
    assert kernels.choose("splash", q, k, v, PREFIX) == "xla"
    assert kernels.choose("splash", q, k, v, BLOCKS_BY_ROW) == "xla"
    assert kernels.choose("splash", q[:, :100], k, v, BOTH) == "xla"
    assert kernels.choose("splash", q[:, :1], k, v, Mask.cached(PLACES[:, :1] + 9, T)) == "xla"
    with traced_for("gpu"):
        assert kernels.choose("cudnn", q, k, v, CAUSAL) == "xla"  # float32
    unordered = dataclasses.replace(CAUSAL, positions_are_sequential=False)
    assert kernels.choose("splash", q, k, v, unordered) == "xla"
    q, k, v, _ = inputs(CAUSAL, jnp.bfloat16)
    assert kernels.choose("cudnn", q, k, v, CAUSAL) == "xla"  # where no GPU is, what was trained on one is still read
    monkeypatch.setattr(kernels, "platform", lambda: "gpu")
    for mesh, kernel in ((MeshConfig(2, 2, 2, 1), "cudnn"), (MeshConfig(2, 1, 1, 4), "xla")):  # queries that are spread
        with activation_shardings(sharding.activation_sharding_fn(sharding.make_mesh(mesh, eight_devices))):
            assert kernels.choose("cudnn", q, k, v, CAUSAL) == kernel


@pytest.mark.parametrize(("device", "kernel"), [("tpu", "splash"), ("gpu", "cudnn"), ("cpu", "xla")])
def test_the_device_chooses(device, kernel, monkeypatch):
    monkeypatch.setattr(kernels, "platform", lambda: device)
    q, k, v, _ = inputs(CAUSAL, jnp.bfloat16)
    assert kernels.choose("auto", q, k, v, CAUSAL) == kernel
    assert kernels.choose("xla", q, k, v, CAUSAL) == "xla"


def test_a_model_for_cudnn_is_read_where_no_gpu_is(tiny_with):
    cfg = tiny_with(context_length=16, d_head=8, d_value=8, n_layers=1, dtype="bfloat16", attention="cudnn")
    tokens = jnp.arange(16)[None]
    params = make_module("gpt", cfg).init(jax.random.key(0), tokens)["params"]
    found, wanted = (
        make_module("gpt", dataclasses.replace(cfg, attention=kernel)).apply({"params": params}, tokens)[0]
        for kernel in ("cudnn", "xla")
    )
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(("field", "calls"), [("auto", False), ("xla", False), ("splash", True)])
@pytest.mark.parametrize("family", ["gpt", "bert"])
def test_the_configuration_chooses(field, calls, family, tiny_with):
    """Dropout of probabilities, in training, is left to XLA."""
    module = make_module(family, tiny_with(context_length=128, attention=field, dropout_attention=0.1))
    tokens = jnp.ones((1, 128), jnp.int32)
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), tokens)["params"])

    def program(deterministic: bool) -> str:
        def run(params):
            return module.apply(
                {"params": params}, tokens, deterministic=deterministic, rngs={"dropout": jax.random.key(0)}
            )

        return str(jax.make_jaxpr(run)(params))

    assert ("pallas_call" in program(True)) == calls
    assert "pallas_call" not in program(False)


@pytest.mark.parametrize("name", ["packed causal window", "bidirectional"])
def test_xla_on_a_mesh_with_spread_places_equals_the_reference(name, eight_devices):
    """And no device holds all of a row's scores, though heads share keys and values."""
    mask = MASKS[name]
    wanted = outcome(attend_whole, mask)
    mesh = sharding.make_mesh(MeshConfig(2, 1, 1, 4), eight_devices)
    with activation_shardings(sharding.activation_sharding_fn(mesh)):

        def spread(q, k, v, mask):
            q = constrain_activation(q, *kernels.Q_AXES)
            k, v = (constrain_activation(x, *kernels.K_AXES) for x in (k, v))
            return attend(q, k, v, mask)

        same(outcome(spread, mask), wanted)
        program = jax.jit(lambda *inputs: spread(*inputs, mask)).lower(*inputs(mask)[:3]).compile().as_text()
    assert f"{T // 4},{T}]" in program
    assert f"{T},{T}]" not in program
