"""The train step computes the same update however it is cut up or spread."""

import dataclasses
import functools

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from bothways import sharding
from bothways.config import MeshConfig, ObjectiveConfig, OptimizerConfig
from bothways.data import examples, pairs
from bothways.data.rng import ExampleRng
from bothways.data.tokenizer import made_up_vocabulary
from bothways.data.tokens import Tokens
from bothways.registry import FAMILIES, make_module, tiny_inputs
from bothways.train.objectives import make_objective
from bothways.train.optimizer import make_optimizer
from bothways.train.step import init_state, make_eval_step, make_train_step, state_shardings

ROWS, LENGTH = 16, 14  # the context axis divides the length


def causal_batch(vocab: int, seed: int = 0, rows: int = ROWS) -> dict[str, np.ndarray]:
    """Packed rows, some ending in padding: every row has another number of tokens that count."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(rows):
        segments = np.repeat([1, 2, 0], [5, LENGTH + 1 - 5 - i % 4, i % 4]).astype(np.int32)
        tokens = rng.integers(5, vocab, LENGTH + 1).astype(np.int32)
        made.append({"tokens": tokens, "segments": segments})
    return examples.causal(examples.stacked(made), ExampleRng(seed, np.arange(rows)))


def masked_batch(vocab: int, seed: int = 0, rows: int = ROWS) -> dict[str, np.ndarray]:
    """Sentence pairs, some short and padded, with another number of hidden tokens in every row."""
    rng = np.random.default_rng(seed)
    vocabulary = made_up_vocabulary(vocab)
    ids = rng.integers(5, vocab, 300)
    source = examples.Pairs(Tokens(ids, np.array([0, 100, 200]), 0), LENGTH, vocabulary)
    masking = examples.Masking(rate=0.3)
    picked, draws = source[rng.integers(len(source), size=rows)], ExampleRng(seed, np.arange(rows))
    return examples.sentence_pair(picked, draws, source, masking, 5, short_share=0.5)


def pairs_batch(vocab: int, seed: int = 0, rows: int = ROWS) -> dict[str, np.ndarray]:
    """Two pairs in a row, and padding in most, of source and target at different positions."""
    rng = np.random.default_rng(seed)

    def texts(*lengths: int) -> list[np.ndarray]:
        return [rng.integers(5, vocab, n) for n in lengths]

    made = [pairs.packed(texts(5, 9 - i % 4), texts(4 + i % 3, 8), LENGTH, LENGTH, 0) for i in range(rows)]
    return {k: np.stack([m[k] for m in made]) for k in made[0]}


BATCHES = {"gpt": causal_batch, "bert": masked_batch, "seq2seq": pairs_batch}
OBJECTIVES = {
    "gpt": ObjectiveConfig(),
    "bert": ObjectiveConfig(kind="masked", next_sentence=True),
    "seq2seq": ObjectiveConfig(kind="pairs"),
}


@functools.cache
def first_state(family, cfg, optimizer):
    """Compiled once for all meshes."""
    module, optimizer = make_module(family, cfg), make_optimizer(optimizer, 10)
    return jax.device_get(jax.jit(lambda: init_state(module, tiny_inputs(family), optimizer, 3))())


@functools.cache
def programs(family, cfg, mesh_cfg, devices, optimizer, accumulate):
    """Mesh, train step, evaluation, and where the state lies."""
    mesh, module = sharding.make_mesh(mesh_cfg, list(devices)), make_module(family, cfg)
    objective = make_objective(OBJECTIVES[family], made_up_vocabulary(cfg.vocab_size))
    begun, update = first_state(family, cfg, optimizer), make_optimizer(optimizer, 10)
    shardings = state_shardings(mesh, jax.eval_shape(lambda: begun))
    step = make_train_step(module, objective, update, mesh, shardings, accumulate=accumulate)
    return mesh, step, make_eval_step(module, objective, mesh, shardings.params), shardings


def run(cfg, mesh_cfg, devices, steps=2, accumulate=1, optimizer=None, batches=None, family="gpt", evaluating=False):
    """State, metrics and, where it is wanted, the evaluation of the first batch, after some steps on a mesh."""
    batches = batches or [BATCHES[family](cfg.vocab_size, seed=k) for k in range(steps)]
    asked = optimizer or OptimizerConfig(learning_rate=1e-2, eps=1e-3)
    mesh, step, evaluate, shardings = programs(family, cfg, mesh_cfg, tuple(devices), asked, accumulate)
    state = jax.device_put(jax.tree.map(np.copy, first_state(family, cfg, asked)), shardings)  # a step consumes it
    metrics = []
    for batch in batches:
        state, m = step(state, sharding.to_global(mesh, batch), 3)
        metrics.append({name: float(v) for name, v in m.items()})
    evaluated = None
    if evaluating:  # one more program
        evaluated = jax.device_get(evaluate(state.params, sharding.to_global(mesh, batches[0])))
    return jax.device_get(state), metrics, evaluated


@pytest.fixture(scope="module")
def shardable(tiny):
    """Widths that 8 devices divide, still no two axes of one size; dense and windowed layers."""
    wide = dataclasses.replace(tiny, vocab_size=40, d_model=32, n_heads=8, n_kv_heads=8, d_head=6, d_ff=48, norm="rms")
    return dataclasses.replace(wide, n_layers=2, layer_pattern=("global", "local"), window=4).resolved()


def config_of(family, shardable):
    """The family's own norm, activation and embeddings."""
    if family != "bert":
        return shardable
    bert = {"norm_position": "post", "activation": "gelu", "segment_types": 2, "embed_norm": True, "next_sentence": True}
    return dataclasses.replace(shardable, **bert)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def alone(family, shardable, eight_devices):
    return run(config_of(family, shardable), MeshConfig(), eight_devices[:1], family=family, evaluating=True)


def close(a, b, tolerance=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


# Every axis for every family; one axis alone over all devices for a GPT.
MESHES = [(family, mesh) for family in sorted(FAMILIES) for mesh in ((2, 2, 2, 1), (2, 1, 2, 2))]
MESHES += [("gpt", mesh) for mesh in ((8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1))]


@pytest.mark.parametrize(("family", "mesh"), MESHES, indirect=["family"], ids=str)
def test_sharded_equals_unsharded(mesh, family, shardable, alone, eight_devices):
    """Losses, norms of gradients, and after two steps parameters and Adam's moments, which hold the gradients."""
    cfg = config_of(family, shardable)
    state, metrics, evaluated = run(cfg, MeshConfig(*mesh), eight_devices, family=family, evaluating=True)
    close(state.params, alone[0].params)
    close(state.opt_state, alone[0].opt_state)
    close(metrics, alone[1])
    close(evaluated, alone[2])


@pytest.fixture(scope="module")
def dropping(shardable):
    """With dropout everywhere."""
    return dataclasses.replace(shardable, dropout_residual=0.3, dropout_attention=0.2, dropout_embed=0.1)


@pytest.fixture(scope="module")
def dropped(dropping, eight_devices):
    return {
        dtype: run(dataclasses.replace(dropping, dtype=dtype), MeshConfig(), eight_devices[:1])
        for dtype in ("float32", "bfloat16")
    }


@pytest.mark.parametrize(
    ("mesh", "dtype"), [((2, 2, 2, 1), "float32"), ((1, 2, 2, 2), "float32"), ((2, 2, 2, 1), "bfloat16")]
)
def test_dropout_and_the_residual_stream_do_not_depend_on_the_mesh(mesh, dtype, dropping, dropped, eight_devices):
    """The residual stream's 14 positions are spread over `tensor`, and over `context` as far as they divide."""
    state, metrics, _ = run(dataclasses.replace(dropping, dtype=dtype), MeshConfig(*mesh), eight_devices)
    tolerance = 2e-5 if dtype == "float32" else 0.02
    close(metrics, dropped[dtype][1], tolerance)
    close(state.params, dropped[dtype][0].params, tolerance)


def test_bfloat16_trains_as_float32_to_its_rounding(dropped):
    close(dropped["bfloat16"][1][0]["loss"], dropped["float32"][1][0]["loss"], 0.02)
    close(dropped["bfloat16"][0].params, dropped["float32"][0].params, 0.03)


def test_optimizer_state_and_update_are_spread_over_data(shardable, eight_devices):
    """Parameters are whole on every device of `data`, their moments are not; and with fsdp both are cut further."""
    module, optimizer = make_module("gpt", shardable), make_optimizer(OptimizerConfig(), 10)
    shapes = jax.eval_shape(lambda: init_state(module, tiny_inputs("gpt"), optimizer, 0))
    for mesh, share in ((MeshConfig(8, 1, 1), 8), (MeshConfig(2, 4, 1), 8), (MeshConfig(2, 2, 2), 8)):
        at = state_shardings(sharding.make_mesh(mesh, eight_devices), shapes)
        names = "decoder", "stack", "blocks", "mlp", "up", "kernel"
        find = functools.partial(functools.reduce, lambda tree, name: tree[name])
        kernel = find(names, shapes.params)
        whole = np.prod(kernel.shape)
        held = np.prod(find(names, at.params).shard_shape(kernel.shape))
        assert held == whole * mesh.data // 8
        moments = [
            s
            for s, x in zip(jax.tree.leaves(at.opt_state), jax.tree.leaves(shapes.opt_state), strict=True)
            if x.shape == kernel.shape
        ]
        assert [np.prod(m.shard_shape(kernel.shape)) for m in moments] == [whole // share] * 2


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_optimizer_state_restores_on_another_mesh(name, shardable, eight_devices, tmp_path):
    """Saved on one device, as runs before it was spread over `data`; and back."""
    module, optimizer = make_module("gpt", shardable), make_optimizer(OptimizerConfig(name=name), 10)
    shapes = jax.eval_shape(lambda: init_state(module, tiny_inputs("gpt"), optimizer, 0))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda s: jax.numpy.asarray(rng.integers(0, 99, s.shape), s.dtype), shapes.opt_state)
    found = state
    for step, mesh in enumerate((MeshConfig(4, 2, 1), MeshConfig(1, 1, 1))):
        devices = eight_devices[: mesh.data * mesh.fsdp]
        at = state_shardings(sharding.make_mesh(mesh, devices), shapes).opt_state
        wanted = jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), shapes.opt_state, at)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / str(step), found)
            checkpointer.wait_until_finished()
            found = checkpointer.restore(tmp_path / str(step), wanted)
        jax.tree.map(lambda x, d: pytest.fail("elsewhere") if x.sharding != d else None, found, at)
        jax.tree.map(np.testing.assert_array_equal, found, state)


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
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 32 // 4, 48 // 2)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == kernel.shape]
    assert len(moments) >= 2
    assert all(m.sharding == kernel.sharding for m in moments)


PIECES = [*((family, (1, 1, 1), 4) for family in sorted(FAMILIES)), ("gpt", (2, 2, 1), 2), ("bert", (2, 2, 1), 2)]


@pytest.mark.parametrize(("family", "mesh", "accumulate"), PIECES, indirect=["family"])
def test_accumulation_is_the_big_batch(mesh, accumulate, family, shardable, alone, eight_devices):
    """Rows have different numbers of tokens that count, so a mean of means would not pass."""
    cfg, mesh = config_of(family, shardable), MeshConfig(*mesh)
    cut = run(cfg, mesh, eight_devices[: mesh.data * mesh.fsdp], accumulate=accumulate, family=family)
    close(cut[0].params, alone[0].params)
    close(cut[1], alone[1])


def test_a_bad_step_changes_nothing_but_the_counters(shardable, eight_devices):
    """Two bad steps between two good ones, against the good ones alone."""
    good, last = (causal_batch(shardable.vocab_size, seed) for seed in range(2))
    bad = dict(good, weights=np.full_like(good["weights"], np.nan))
    wanted, _, _ = run(shardable, MeshConfig(), eight_devices[:1], batches=[good, last])
    state, metrics, _ = run(shardable, MeshConfig(), eight_devices[:1], batches=[good, bad, bad, last])
    jax.tree.map(np.testing.assert_array_equal, state.params, wanted.params)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, wanted.opt_state)
    assert (int(state.step), int(state.consecutive_nonfinite), int(state.bad_total)) == (4, 0, 2)
    assert [m["consecutive_nonfinite"] for m in metrics] == [0, 1, 2, 0]


def test_dropout_differs_between_steps_and_not_between_runs(dropping, eight_devices):
    cfg = dropping
    batch, still = causal_batch(cfg.vocab_size), OptimizerConfig(learning_rate=1e-30, weight_decay=0.0)
    _, a, _ = run(cfg, MeshConfig(), eight_devices[:1], batches=[batch, batch], optimizer=still)
    _, b, _ = run(cfg, MeshConfig(), eight_devices[:1], batches=[batch, batch], optimizer=still)
    assert a == b
    assert abs(a[0]["loss"] - a[1]["loss"]) > 1e-3


def test_label_smoothing_is_for_training_only(shardable, eight_devices):
    module, batch = make_module("gpt", shardable), causal_batch(shardable.vocab_size)
    params = first_state("gpt", shardable, OptimizerConfig()).params

    def nats(smoothing, deterministic):
        objective = make_objective(ObjectiveConfig(label_smoothing=smoothing), made_up_vocabulary(40))

        @jax.jit
        def run(params, batch):
            rngs = {"dropout": jax.random.key(0)}
            terms = module.apply({"params": params}, method=lambda m: objective.terms(m, batch, deterministic), rngs=rngs)
            return terms["nll"].nats

        return run(params, batch)

    assert nats(0.3, True) == nats(0.0, True)
    assert abs(nats(0.3, False) - nats(0.0, False)) > 1e-2
