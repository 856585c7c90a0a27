"""Products as one CPU multiplies them fastest are the products."""

import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bothways.model.axes import traced_for
from bothways.model.products import add_bias, contract, elementwise, gelu
from bothways.platform import multiplies_bfloat16

SIZES = dict(zip("bgnstvdfk", (2, 3, 5, 7, 11, 13, 17, 19, 23), strict=True))
EQUATIONS = (
    "nd,df->nf",  # a projection
    "nf,df->nd",  # its gradients
    "nd,nf->df",
    "btv,vd->btd",  # the loss
    "btv,btd->vd",
    "bgnk,bgsk->bgns",  # attention
    "bgns,bgsk->bgnk",
    "bgns,bgnk->bgsk",
    "nd,nd->n",
    "n,d->nd",
    "dn,fd->fn",
)


@pytest.mark.parametrize("equation", EQUATIONS)
def test_a_product_of_bfloat16_is_summed_in_float32_and_so_are_its_gradients(equation):
    inputs, of_y = equation.split("->")
    rng = np.random.default_rng(0)
    shapes = [[SIZES[i] for i in one] for one in (*inputs.split(","), of_y)]
    a, b, dy = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)
    wide = [np.asarray(x, np.float64) for x in (a, b, dy)]

    def product(a, b):
        return contract(equation, a, b, jnp.float32)

    y, back = jax.jit(lambda a, b: jax.vjp(product, a, b))(a, b)
    np.testing.assert_allclose(y, np.einsum(equation, *wide[:2]), rtol=1e-5, atol=1e-5)
    of_a, of_b = inputs.split(",")
    exact = np.einsum(f"{of_y},{of_b}->{of_a}", wide[2], wide[1]), np.einsum(f"{of_a},{of_y}->{of_b}", wide[0], wide[2])
    for mine, theirs in zip(jax.jit(back)(dy.astype(jnp.float32)), exact, strict=True):
        assert mine.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(mine, np.float64), theirs, rtol=2**-8, atol=1e-5)


def test_a_function_of_bfloat16_is_rounded_once():
    x = jnp.asarray(np.random.default_rng(0).normal(size=500), jnp.bfloat16)

    def gelu(x):
        return elementwise(jax.nn.gelu, x)

    wide = x.astype(jnp.float32)
    assert gelu(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(gelu(x), jax.nn.gelu(wide).astype(jnp.bfloat16))
    mine, exact = jax.vmap(jax.grad(gelu))(x), jax.vmap(jax.grad(jax.nn.gelu))(wide)
    np.testing.assert_allclose(np.asarray(mine, np.float32), exact, rtol=2**-7, atol=1e-6)
    np.testing.assert_array_equal(gelu(wide), jax.nn.gelu(wide))


def test_a_tpu_adds_biases_of_narrow_heads_as_others_do_and_sums_their_gradients_in_float32():
    rng = np.random.default_rng(0)
    y, dy = (jnp.asarray(rng.normal(size=(5, 7, 3, 11)), jnp.bfloat16) for _ in range(2))
    bias = jnp.asarray(rng.normal(size=(3, 11)), jnp.float32)
    with traced_for("tpu"):
        z, back = jax.vjp(add_bias, y, bias)
        d_y, d_bias = back(dy)
    np.testing.assert_array_equal(z, y + bias.astype(jnp.bfloat16))
    np.testing.assert_array_equal(d_y, dy)
    exact = np.asarray(dy, np.float64).sum((0, 1))
    assert d_bias.dtype == jnp.float32
    np.testing.assert_allclose(d_bias, exact, rtol=1e-6, atol=1e-6)


def test_a_tpus_gelu_is_gelu_to_the_last_bit_of_bfloat16():
    x = jnp.arange(2**16, dtype=jnp.uint16).view(jnp.bfloat16)  # every bfloat16 there is
    x = x[jnp.isfinite(x) & (jnp.abs(x) < 100)]
    wide = np.asarray(x, np.float64)
    below = np.array([math.erfc(-one / 2**0.5) / 2 for one in wide])
    slope = below + wide * np.exp(-(wide**2) / 2) / (2 * math.pi) ** 0.5
    with traced_for("tpu"):
        y, tangent = jax.jvp(gelu, (x,), (jnp.ones_like(x),))
    assert y.dtype == tangent.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), wide * below, rtol=2**-8 + 0.002, atol=1e-6)
    np.testing.assert_allclose(np.asarray(tangent, np.float64), slope, rtol=2**-8 + 0.002, atol=1e-6)
    with traced_for("tpu"):
        np.testing.assert_array_equal(
            gelu(wide.astype(np.float32)), jax.nn.gelu(wide.astype(np.float32), approximate=False)
        )


STEP = """
import jax, numpy as np
from benchmarks.training import gpt_batch
from benchmarks.models import gpt
from bothways import sharding
from bothways.data.tokenizer import Vocabulary
from bothways.registry import make_module, tiny_inputs
from bothways.train.objectives import make_objective
from bothways.train.optimizer import make_optimizer
from bothways.train.step import init_state, make_train_step, state_shardings

recipe = gpt(2, 64, 2, 300, 128)
ids = np.arange(300)
objective = make_objective(recipe.objective, Vocabulary(0, 2, 3, 4, ids < 5, ids[5:], ids > 4, ids > 4), False)
module, optimizer = make_module("gpt", recipe.model), make_optimizer(recipe.optimizer, 10)
state = jax.eval_shape(lambda: init_state(module, tiny_inputs("gpt"), optimizer, 0))
mesh = sharding.make_mesh(recipe.mesh, jax.devices()[:1])
step = make_train_step(module, objective, optimizer, mesh, state_shardings(mesh, state))
print(step.lower(state, gpt_batch(recipe, 2, 128, 0), 0).compile().as_text())
"""


def test_no_product_of_a_step_is_computed_in_float32_where_the_cpu_knows_bfloat16():
    """What XLA made of a step whose type was left open, compiled as users compile it."""
    env = {
        name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("XLA_FLAGS", raising=False)
        if not multiplies_bfloat16():
            pytest.skip("this CPU has no instructions for products of bfloat16")
    text = subprocess.run([sys.executable, "-c", STEP], env=env, capture_output=True, check=True, text=True).stdout
    shapes = dict(re.findall(r"%([\w.-]+) = (\w+)\[", text))
    products = re.findall(r"= (\w+)\[[^\n]* dot\(%([\w.-]+), %([\w.-]+)\)", text)
    assert len(products) > 30
    assert {(result, shapes[a], shapes[b]) for result, a, b in products} == {("f32", "bf16", "bf16")}
