"""The train step computes the same update however it is cut up or spread."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.config import MeshConfig, ObjectiveConfig, OptimizerConfig
from common.families import make_module, tiny_inputs
from data import examples
from train import sharding
from train.objectives import make_objective
from train.optimizer import make_optimizer
from train.step import init_state, make_eval_step, make_train_step, state_shardings

ROWS, LENGTH = 16, 13


def causal_batch(vocab: int, seed: int = 0, rows: int = ROWS) -> dict[str, np.ndarray]:
    """Packed rows, some ending in padding: every row has another number of tokens that count."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(rows):
        segments = np.repeat([1, 2, 0], [5, LENGTH + 1 - 5 - i % 4, i % 4]).astype(np.int32)
        tokens = rng.integers(5, vocab, LENGTH + 1).astype(np.int32)
        made.append(examples.causal({"tokens": tokens, "segments": segments}, rng))
    return {k: np.stack([m[k] for m in made]) for k in made[0]}


def run(cfg, mesh_cfg, devices, steps=2, accumulate=1, optimizer=None, batches=None, kind="causal"):
    """State and metrics after some steps on a mesh of these devices."""
    mesh = sharding.make_mesh(mesh_cfg, devices)
    module = make_module("gpt", cfg)
    objective = make_objective(ObjectiveConfig(kind=kind))
    optimizer = make_optimizer(optimizer or OptimizerConfig(learning_rate=1e-2, eps=1e-3), 10)

    def fresh():
        return init_state(module, tiny_inputs("gpt"), optimizer, 3)

    shardings = state_shardings(mesh, jax.eval_shape(fresh))
    state = jax.jit(fresh, out_shardings=shardings)()
    step = make_train_step(module, objective, optimizer, mesh, shardings, accumulate=accumulate, seed=3)
    metrics = []
    for k in range(steps):
        batch = batches[k] if batches else causal_batch(cfg.vocab_size, seed=k)
        state, m = step(state, sharding.to_global(mesh, batch))
        metrics.append({name: float(v) for name, v in m.items()})
    evaluated = make_eval_step(module, objective, mesh, shardings.params)(
        state.params, sharding.to_global(mesh, batches[0] if batches else causal_batch(cfg.vocab_size))
    )
    return jax.device_get(state), metrics, jax.device_get(evaluated)


@pytest.fixture(scope="module")
def shardable(tiny):
    """Widths that 8 devices divide; still no two axes of one size."""
    return dataclasses.replace(tiny, vocab_size=40, d_model=32, n_heads=8, d_head=6, d_ff=48, norm="rms").resolved()


@pytest.fixture(scope="module")
def alone(shardable, eight_devices):
    return run(shardable, MeshConfig(), eight_devices[:1])


def close(a, b, tolerance=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


@pytest.mark.parametrize(
    "mesh", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)], ids=lambda m: "data{}-fsdp{}-tensor{}".format(*m)
)
def test_sharded_equals_unsharded(mesh, shardable, alone, eight_devices):
    state, metrics, evaluated = run(shardable, MeshConfig(*mesh), eight_devices)
    close(state.params, alone[0].params)
    close(state.opt_state, alone[0].opt_state)
    close(metrics, alone[1])
    close(evaluated, alone[2])


def test_sharded_muon_equals_unsharded(shardable, eight_devices):
    muon = OptimizerConfig(name="muon", learning_rate=1e-2, adam_learning_rate=1e-3, eps=1e-3)
    one = run(shardable, MeshConfig(), eight_devices[:1], optimizer=muon)
    many = run(shardable, MeshConfig(2, 2, 2), eight_devices, optimizer=muon)
    close(many[0].params, one[0].params, 2e-4)


def test_parameters_are_really_spread(shardable, eight_devices):
    mesh = sharding.make_mesh(MeshConfig(1, 4, 2), eight_devices)
    module = make_module("gpt", shardable)
    optimizer = make_optimizer(OptimizerConfig(), 10)

    def fresh():
        return init_state(module, tiny_inputs("gpt"), optimizer, 0)

    state = jax.jit(fresh, out_shardings=state_shardings(mesh, jax.eval_shape(fresh)))()
    kernel = state.params["decoder"]["stack"]["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (3, 32 // 4, 48 // 2)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == kernel.shape]
    assert len(moments) >= 2
    assert all(m.sharding == kernel.sharding for m in moments)


@pytest.mark.parametrize("accumulate", [2, 8])
def test_accumulation_is_the_big_batch(accumulate, shardable, alone, eight_devices):
    cut = run(shardable, MeshConfig(), eight_devices[:1], accumulate=accumulate)
    close(cut[0].params, alone[0].params)
    close(cut[1], alone[1])


def test_accumulation_on_a_mesh_is_the_big_batch(shardable, alone, eight_devices):
    cut = run(shardable, MeshConfig(2, 2, 1), eight_devices[:4], accumulate=2)
    close(cut[0].params, alone[0].params)


def test_a_bad_step_changes_nothing_but_the_counters(shardable, eight_devices):
    good = causal_batch(shardable.vocab_size)
    bad = dict(good, weights=np.full_like(good["weights"], np.nan))
    first, _, _ = run(shardable, MeshConfig(), eight_devices[:1], steps=1, batches=[good])
    state, metrics, _ = run(shardable, MeshConfig(), eight_devices[:1], steps=3, batches=[good, bad, bad])
    jax.tree.map(np.testing.assert_array_equal, state.params, first.params)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, first.opt_state)
    assert (int(state.step), int(state.bad_in_row), int(state.bad_total)) == (3, 2, 2)
    assert [m["bad_in_row"] for m in metrics] == [0, 1, 2]
    after, _, _ = run(shardable, MeshConfig(), eight_devices[:1], steps=3, batches=[good, bad, good])
    assert (int(after.bad_in_row), int(after.bad_total)) == (0, 1)


def test_dropout_differs_between_steps_and_not_between_runs(shardable, eight_devices):
    cfg = dataclasses.replace(shardable, dropout_residual=0.3, dropout_attention=0.2, dropout_embed=0.1)
    batch, still = causal_batch(cfg.vocab_size), OptimizerConfig(learning_rate=1e-30, weight_decay=0.0)
    _, a, _ = run(cfg, MeshConfig(), eight_devices[:1], batches=[batch, batch], optimizer=still)
    _, b, _ = run(cfg, MeshConfig(), eight_devices[:1], batches=[batch, batch], optimizer=still)
    assert a == b
    assert abs(a[0]["loss"] - a[1]["loss"]) > 1e-3


def test_a_mesh_that_does_not_divide_names_the_parameter(tiny, eight_devices):
    mesh = sharding.make_mesh(MeshConfig(1, 1, 8), eight_devices)
    module = make_module("gpt", tiny)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), **tiny_inputs("gpt"))["params"])
    with pytest.raises(ValueError, match=r"mlp/up/kernel \(3, 22, 26\): ff=26 is not divisible by mesh.tensor=8"):
        sharding.parameter_shardings(mesh, shapes)


def test_label_smoothing_is_for_training_only(shardable, eight_devices):
    module, batch = make_module("gpt", shardable), causal_batch(shardable.vocab_size)
    params = module.init(jax.random.key(0), **tiny_inputs("gpt"))["params"]

    def nats(smoothing, deterministic):
        objective = make_objective(ObjectiveConfig(label_smoothing=smoothing))
        return module.apply(
            {"params": params},
            method=lambda m: objective.terms(m, jax.tree.map(jnp.asarray, batch), deterministic),
            rngs={"dropout": jax.random.key(0)},
        )["nll"].nats

    assert nats(0.3, True) == nats(0.0, True)
    assert abs(nats(0.3, False) - nats(0.0, False)) > 1e-2
