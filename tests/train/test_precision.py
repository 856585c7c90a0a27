"""A step in bfloat16 is that in float32 but for rounding, and no type is promoted without a word."""

import dataclasses

import jax
import numpy as np
import pytest

from bothways import sharding
from bothways.config import MeshConfig, OptimizerConfig
from bothways.registry import FAMILIES, make_module, tiny_inputs
from bothways.train import step
from tests.train.test_step import BATCHES, config_of, run


@pytest.fixture(scope="module")
def small(tiny):
    return dataclasses.replace(tiny, vocab_size=40, n_layers=1, d_ff=24).resolved()


def flat(tree) -> np.ndarray:
    return np.concatenate([np.asarray(x, np.float32).ravel() for x in jax.tree.leaves(tree)])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_step_in_bfloat16_is_the_step_in_float32_but_for_rounding(family, small, eight_devices):
    cfg = config_of(family, small)
    half = dataclasses.replace(cfg, dtype="bfloat16")
    (a, exact, _), (b, rounded, _) = (
        run(c, MeshConfig(), eight_devices[:1], steps=1, family=family) for c in (cfg, half)
    )
    assert {x.dtype for x in jax.tree.leaves(b.params)} == {np.dtype("float32")}
    assert rounded[0]["loss"] == pytest.approx(exact[0]["loss"], rel=5e-3)
    assert rounded[0]["loss"] != exact[0]["loss"]
    assert rounded[0]["grad_norm"] == pytest.approx(exact[0]["grad_norm"], rel=3e-2)
    mine, theirs = flat(b.opt_state), flat(a.opt_state)  # Adam's moments hold the gradient
    assert mine @ theirs / np.linalg.norm(mine) / np.linalg.norm(theirs) > 0.999


def test_in_bfloat16_the_loss_falls_as_in_float32(small, eight_devices):
    """Over forty steps on two batches in turn, in which it falls by half a nat and more."""
    cfg, two = config_of("gpt", small), [BATCHES["gpt"](small.vocab_size, seed=k) for k in range(2)]
    curves = []
    for dtype in ("float32", "bfloat16"):
        how = {"steps": 40, "batches": two * 20, "optimizer": OptimizerConfig(learning_rate=3e-3, eps=1e-3)}
        _, metrics, _ = run(dataclasses.replace(cfg, dtype=dtype), MeshConfig(), eight_devices[:1], **how)
        curves.append([m["loss"] for m in metrics])
    exact, rounded = np.array(curves)
    assert exact[0] - exact[-1] > 0.5
    np.testing.assert_allclose(rounded, exact, atol=0.02)


@pytest.mark.parametrize(
    ("dtype", "devices", "found"), [("auto", 1, "bfloat16"), ("auto", 8, "auto"), ("float32", 1, "float32")]
)
def test_a_step_is_in_bfloat16_where_one_cpu_multiplies_it(dtype, devices, found, tiny, eight_devices, monkeypatch):
    mesh = sharding.make_mesh(MeshConfig(), eight_devices[:devices])
    module = make_module("gpt", dataclasses.replace(tiny, dtype=dtype))
    monkeypatch.setattr(step, "multiplies_bfloat16", lambda: False)
    assert step.in_training_dtype(module, mesh).cfg.dtype == dtype
    monkeypatch.setattr(step, "multiplies_bfloat16", lambda: True)
    assert step.in_training_dtype(module, mesh).cfg.dtype == found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_no_type_is_promoted_without_a_word(family, dtype, small):
    """In the stack: JAX would take bfloat16 and float32 together for float32, and the matrix product with it."""
    cfg = dataclasses.replace(config_of(family, small), dtype=dtype)
    module, inputs = make_module(family, cfg), tiny_inputs(family)
    params = jax.eval_shape(module.init, jax.random.key(0), **inputs)["params"]
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(lambda params: module.apply({"params": params}, **inputs), params)
