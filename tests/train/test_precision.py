"""A step in bfloat16 is that in float32 but for rounding, and no type is promoted without a word."""

import dataclasses

import jax
import numpy as np
import pytest

from bothways.config import MeshConfig
from bothways.registry import FAMILIES, make_module, tiny_inputs
from tests.train.test_step import config_of, run


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_no_type_is_promoted_without_a_word(family, dtype, small):
    """In the stack: JAX would take bfloat16 and float32 together for float32, and the matrix product with it."""
    cfg = dataclasses.replace(config_of(family, small), dtype=dtype)
    module, inputs = make_module(family, cfg), tiny_inputs(family)
    params = jax.eval_shape(module.init, jax.random.key(0), **inputs)["params"]
    with jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(lambda params: module.apply({"params": params}, **inputs), params)
