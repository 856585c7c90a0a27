"""Schedules and optimizers against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bothways.config import OptimizerConfig
from bothways.registry import make_module, tiny_inputs
from bothways.train.optimizer import decayed, make_optimizer, matrices, schedule


def rates(steps=100, **fields):
    cfg = OptimizerConfig(learning_rate=2.0, warmup_steps=10, **fields)
    rate = schedule(cfg, steps, cfg.learning_rate)
    return np.array([float(rate(i)) for i in range(steps)])


def test_warm_up_moves_from_the_first_update():
    np.testing.assert_allclose(rates(schedule="constant")[:12], [0.2 * i for i in range(1, 11)] + [2.0, 2.0], rtol=1e-6)


def test_cosine():
    t = np.arange(90) / 90
    np.testing.assert_allclose(
        rates(schedule="cosine", final_lr_ratio=0.1)[10:], 0.2 + 1.8 * (1 + np.cos(np.pi * t)) / 2, rtol=1e-5
    )


def test_cosine_that_ends_early_stays_flat():
    np.testing.assert_allclose(rates(schedule="cosine", final_lr_ratio=0.1, decay_steps=60)[60:], 0.2, rtol=1e-5)


def test_linear():
    np.testing.assert_allclose(rates(schedule="linear")[10:], 2 * (1 - np.arange(90) / 90), atol=1e-6)


def test_inverse_square_root_is_the_papers():
    """lr = d^-0.5 min(step^-0.5, step warmup^-1.5), up to the factor that makes the peak 2."""
    step = np.arange(1, 101)
    paper = np.minimum(step**-0.5, step * 10**-1.5)
    got = rates(schedule="rsqrt")
    np.testing.assert_allclose(got[:10], (paper / paper.max() * 2)[:10], rtol=1e-5)
    np.testing.assert_allclose(got[10:], 2 * np.sqrt(10 / (10 + np.arange(90))), rtol=1e-5)


def test_warm_up_stable_decay():
    got = rates(schedule="wsd", decay_fraction=0.2, final_lr_ratio=0.5)
    np.testing.assert_allclose(got[10:80], 2.0, rtol=1e-6)
    np.testing.assert_allclose(got[80:], 2 - np.arange(20) / 20, rtol=1e-5)


@pytest.fixture(scope="module")
def params(tiny):
    module = make_module("gpt", tiny)
    return jax.jit(module.init)(jax.random.key(0), **tiny_inputs("gpt"))["params"]


def test_weight_decay_spares_biases_and_norms(params):
    flags = {jax.tree_util.keystr(path): flag for path, flag in jax.tree_util.tree_leaves_with_path(decayed(params))}
    assert any(flags.values())
    for name, flag in flags.items():
        assert flag == ("kernel" in name or "embedding" in name), name


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor", "lion"])
def test_without_a_gradient_only_matrices_and_tables_shrink(params, name):
    cfg = OptimizerConfig(name=name, learning_rate=0.5, weight_decay=0.1, schedule="constant", warmup_steps=0)
    optimizer, ones = make_optimizer(cfg, 10), jax.tree.map(jnp.ones_like, params)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zero, jax.jit(optimizer.init)(ones), ones)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        at = jax.tree_util.keystr(path)
        shrinks = "kernel" in at or "embedding" in at
        np.testing.assert_allclose(update, np.full_like(update, -0.05 * shrinks), rtol=1e-6, err_msg=at)


def test_weight_decay_is_scaled_by_the_rate(params):
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.5, weight_decay=0.1, schedule="constant"), 10)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(lambda zero, p: optimizer.update(zero, optimizer.init(p), p))(zero, params)
    table = params["decoder"]["embed"]["token"]["embedding"]
    np.testing.assert_allclose(updates["decoder"]["embed"]["token"]["embedding"], -0.05 * table, rtol=1e-5)
    assert not np.any(updates["decoder"]["final_norm"]["scale"])


def test_clipping_bounds_the_whole_gradient(params):
    big = jax.tree.map(lambda p: 100 * jnp.ones_like(p), params)
    for clip, expected in ((1.0, 1.0), (0.0, None)):
        cfg = OptimizerConfig(
            name="lion", learning_rate=1.0, b1=0.0, weight_decay=0.0, clip_norm=clip, schedule="constant"
        )
        optimizer = make_optimizer(cfg, 10)
        _, state = jax.jit(lambda big, p, of=optimizer: of.update(big, of.init(p), p))(big, params)
        moment = next(x for x in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(x, "mu")).mu
        norm = float(jnp.sqrt(sum(jnp.sum(m**2) for m in jax.tree.leaves(moment)))) / (1 - cfg.b2)
        if expected:
            assert norm == pytest.approx(expected, rel=1e-4)
        else:
            assert norm > 100


def test_muon_makes_block_matrices_nearly_orthogonal_and_leaves_the_rest_to_adam(params):
    cfg = OptimizerConfig(name="muon", learning_rate=1.0, adam_learning_rate=0.125, weight_decay=0.0, schedule="constant")
    optimizer = make_optimizer(cfg, 10)
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape), params)
    updates, _ = jax.jit(lambda grads, p: optimizer.update(grads, optimizer.init(p), p))(grads, params)
    blocks = updates["decoder"]["stack"]["blocks"]
    for name, module, rows in (
        ("attention", "query", 22),
        ("attention", "out", 12),
        ("mlp", "up", 22),
        ("mlp", "down", 26),
    ):
        for layer in np.asarray(blocks[name][module]["kernel"]):
            matrix = layer.reshape(rows, -1)
            scale = np.sqrt(max(1, matrix.shape[1] / matrix.shape[0]))
            singular = np.linalg.svd(matrix, compute_uv=False) / scale
            assert singular.min() > 0.5
            assert singular.max() < 1.4
    # Adam's first update with Nesterov momentum: the gradient's sign times the rate, over the bias correction of two
    # steps in place of one: b1 / (1 - b1^2) (1 - b1) + (1 - b1) / (1 - b1) = b1 / (1 + b1) + 1.
    table, grad = (tree["decoder"]["embed"]["token"]["embedding"] for tree in (updates, grads))
    np.testing.assert_allclose(table, -np.sign(grad) * 0.125 * (0.9 / 1.9 + 1), rtol=1e-3)


def test_muon_reads_every_block_kernel(params):
    views = matrices(params)
    blocks = views["decoder"]["stack"]["blocks"]
    assert blocks["attention"]["query"]["kernel"] == ((1,), (2, 3))
    assert blocks["attention"]["out"]["kernel"] == ((1, 2), (3,))
    assert blocks["mlp"]["down"]["kernel"] == ((1,), (2,))
    assert blocks["attention"]["query"]["bias"] is None
    assert views["decoder"]["embed"]["token"]["embedding"] is None


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor", "lion"])
def test_every_optimizer_finds_the_minimum(name, params):
    # Muon's update has a spectral norm of about 1: it takes a larger rate to move every entry of a matrix by 0.3.
    rate = 0.2 if name == "muon" else 0.02
    cfg = OptimizerConfig(
        name=name, learning_rate=rate, adam_learning_rate=0.02, weight_decay=0.0, schedule="linear", clip_norm=0.0
    )
    optimizer = make_optimizer(cfg, 150)
    goal = jax.tree.map(lambda p: p + 0.3, params)

    def loss(p):
        return sum(jnp.sum((a - b) ** 2) for a, b in zip(jax.tree.leaves(p), jax.tree.leaves(goal), strict=True))

    def step(carry, _):
        p, state = carry
        updates, state = optimizer.update(jax.grad(loss)(p), state, p)
        return (jax.tree.map(jnp.add, p, updates), state), None

    (found, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=150))((params, optimizer.init(params)))
    assert loss(found) < 0.05 * loss(params)
