"""Masked diffusion in blocks: what is hidden and what it weighs; the ends of the dial are the causal and masked objectives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bothways import sharding
from bothways.config import MeshConfig, OptimizerConfig
from bothways.data import examples
from bothways.data.diffusion import diffused, hide_in_blocks
from bothways.data.rng import ExampleRng
from bothways.data.tokenizer import made_up_vocabulary
from bothways.model.gpt import GPT, MaskedNextToken
from bothways.registry import tiny_inputs
from bothways.train.objectives import ObjectiveConfig, make_objective
from bothways.train.optimizer import make_optimizer
from bothways.train.step import init_state, make_train_step, state_shardings

VOCABULARY = made_up_vocabulary(37)
T = 14
SEGMENTS = np.array([[1] * 14, [1] * 5 + [2] * 9, [1] * 3 + [2] * 4 + [0] * 7], np.int32)


def rows(seed: int = 0) -> dict[str, np.ndarray]:
    return {"tokens": np.random.default_rng(seed).integers(5, 37, SEGMENTS.shape).astype(np.int32), "segments": SEGMENTS}


def example(sizes: tuple[int, ...], predicts: str, numbers=(0, 1, 2), flat: bool = False) -> dict[str, np.ndarray]:
    return diffused(rows(), ExampleRng(3, np.array(numbers)), VOCABULARY, sizes, predicts, flat)


@pytest.mark.parametrize("predicts", ["next", "own"])
@pytest.mark.parametrize("size", [1, 3, 4, 0])
def test_every_block_hides_some_and_every_token_weighs_one_on_average(size, predicts):
    total, flat, draws = 0.0, 0.0, 400
    for number in range(draws):
        found = example((size,), predicts, (3 * number, 3 * number + 1, 3 * number + 2))
        hidden = found["tokens"] == VOCABULARY.mask
        scored = (found["positions"] > 0) & (SEGMENTS > 0)
        assert (found["scored"] == scored).all()
        assert (found["tokens"] == np.where(hidden, VOCABULARY.mask, rows()["tokens"])).all()
        first = found["positions"] % (size or T) == 0
        may = scored & ~first if predicts == "next" else scored
        assert not (hidden & ~may).any()
        assert (found["weights"][scored & ~may] == 1).all()
        assert (found["weights"][~scored] == 0).all()
        for r in range(3):
            for block in {(s, p // (size or T)) for s, p in zip(SEGMENTS[r], found["positions"][r], strict=True)}:
                inside = (SEGMENTS[r] == block[0]) & (found["positions"][r] // (size or T) == block[1]) & may[r]
                L, k = inside.sum(), (inside & hidden[r]).sum()
                assert (L == 0) == (k == 0)
                assert found["weights"][r][inside].sum() == pytest.approx(L)
        total = total + found["weights"]
        flat = flat + example((size,), predicts, (3 * number, 3 * number + 1, 3 * number + 2), True)["weights"]
    np.testing.assert_allclose(total / draws, scored, atol=0.35)  # weights up to 13
    np.testing.assert_allclose(flat / draws, scored, atol=0.15)


def test_levels_cover_every_count_evenly():
    """Over consecutive examples every number of hidden tokens comes about as often: k is stratified."""
    positions = np.tile(np.arange(9), (64, 1))
    level = ExampleRng(5, np.arange(64)).stratified()
    noise = np.random.default_rng(0).random((64, 9))
    hidden, _ = hide_in_blocks(positions, positions > 0, np.full(64, 9), level, noise, "own")
    assert np.bincount(hidden.sum(1), minlength=9)[1:].tolist() == pytest.approx([8] * 8, abs=1)


def test_blocks_are_drawn_by_row_and_depend_on_the_row_alone():
    numbers = np.arange(90)
    many = {
        k: np.concatenate([example((2, 5, 0), "own", numbers[i : i + 3])[k] for i in range(0, 90, 3)])
        for k in ("block", "tokens")
    }
    assert set(many["block"]) == {2, 5, T}
    again = example((2, 5, 0), "own", (30, 31, 32))
    assert (again["tokens"] == many["tokens"][30:33]).all()


@pytest.fixture(scope="module")
def gpts(tiny):
    """A GPT that predicts next tokens and one that predicts its own, and their random parameters."""
    cfg = dataclasses.replace(tiny, n_layers=2)
    params = jax.jit(GPT(cfg).init)(jax.random.key(1), jnp.zeros((1, 2), jnp.int32))["params"]
    return {name: GPT(dataclasses.replace(cfg, predicts=name)) for name in ("next", "own")}, params


def loss_and_gradient(module, params, objective, batch):
    batch = {k: jnp.asarray(v) for k, v in batch.items()}

    def loss(params):
        sums = module.apply({"params": params}, method=lambda bound: objective.terms(bound, batch, True))
        (term,) = sums.values()
        return term.nats / objective.weights(batch)[next(iter(sums))]

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("sizes", [(1,), (1, 1)])
def test_blocks_of_one_are_next_token_prediction(sizes, gpts):
    """Loss and gradient are the causal objective's on the same packed rows; also through both streams."""
    modules, params = gpts
    causal = make_objective(ObjectiveConfig(), VOCABULARY)
    batch = example(sizes, "next")
    objective = make_objective(ObjectiveConfig(kind="diffusion", block_sizes=sizes), VOCABULARY)
    if len(sizes) == 2:  # as where other sizes are drawn too
        objective = make_objective(ObjectiveConfig(kind="diffusion", block_sizes=(1, 0)), VOCABULARY)
    found = loss_and_gradient(modules["next"], params, objective, batch)
    wanted = loss_and_gradient(modules["next"], params, causal, examples.causal(rows(), None))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), found, wanted)


def features(module, params, *inputs):
    return np.asarray(jax.jit(lambda p: module.apply({"params": p}, *inputs, method="denoise"))(params))


@pytest.mark.parametrize("predicts", ["next", "own"])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_a_block_sees_itself_and_clean_blocks_before_it(size, predicts, gpts):
    """Two streams in one pass give every block what a row of clean blocks with this one hidden at its end gives."""
    modules, params = gpts
    module, batch = modules[predicts], example((size,), predicts)
    args = batch["tokens"], batch["targets"], batch["positions"], batch["segments"]
    found = features(module, params, *args, jnp.full(3, size))
    one = jax.jit(lambda p, x: module.apply({"params": p}, x, block=size)[0])
    for begin in range(0, T, size):
        canvas = batch["targets"][:1].copy()  # the first row is one document
        canvas[:, begin : begin + size] = batch["tokens"][:1, begin : begin + size]
        alone = np.asarray(one(params, canvas))[0]
        clean = np.asarray(one(params, batch["targets"][:1]))[0]
        for t in range(max(begin, 1), min(begin + size, T)):
            wanted = alone[t] if predicts == "own" else clean[t - 1] if t == begin else alone[t - 1]
            np.testing.assert_allclose(found[0, t], wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("predicts", ["next", "own"])
def test_a_packed_document_is_read_as_it_is_alone(predicts, gpts):
    modules, params = gpts
    batch = example((4,), predicts)
    together = features(
        modules[predicts], params, batch["tokens"], batch["targets"], batch["positions"], batch["segments"], 4
    )
    part = slice(5, 14)
    alone = features(
        modules[predicts], params, *(batch[k][1:2, part] for k in ("tokens", "targets")), np.arange(9)[None], None, 4
    )
    np.testing.assert_allclose(together[1, part][1:], alone[0, 1:], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("predicts", ["next", "own"])
def test_one_block_needs_no_clean_stream(predicts, gpts):
    modules, params = gpts
    batch = example((0,), predicts)
    args = batch["positions"], batch["segments"]
    both = features(modules[predicts], params, batch["tokens"], batch["targets"], *args, jnp.asarray(batch["block"]))
    one = features(modules[predicts], params, batch["tokens"], None, *args)
    scored = batch["scored"] > 0
    np.testing.assert_allclose(both[scored], one[scored], rtol=1e-3, atol=1e-4)


def test_a_block_of_the_whole_row_is_the_masked_objective(gpts):
    """Loss and gradient, with the same tokens hidden and the same weights, of the same weights read both ways."""
    modules, params = gpts
    batch = example((0,), "next")
    diffusion = make_objective(ObjectiveConfig(kind="diffusion"), VOCABULARY)
    found = loss_and_gradient(modules["next"], params, diffusion, batch)
    hidden = batch["tokens"] == VOCABULARY.mask
    at = np.argsort(~hidden, axis=1, kind="stable")[:, : hidden.sum(axis=1).max()]
    part = {k: np.take_along_axis(batch[k], at, axis=1) for k in ("targets", "weights")}
    part["weights"] = part["weights"] * np.take_along_axis(hidden, at, axis=1)
    asked = {k: batch[k] for k in ("tokens", "positions", "segments")} | {"mask_positions": at} | part
    both_ways = MaskedNextToken(modules["next"].cfg)
    masked = make_objective(ObjectiveConfig(kind="masked", next_sentence=False), VOCABULARY)
    scale = part["weights"].sum() / batch["scored"].sum()  # each objective divides by its own weights
    wanted = jax.tree.map(lambda x: x * scale, loss_and_gradient(both_ways, params, masked, asked))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), found, wanted)


def test_a_step_in_blocks_is_the_same_however_it_is_spread(tiny, eight_devices):
    """Both streams, block sizes that differ by row, packed documents and padding."""
    cfg = dataclasses.replace(tiny, vocab_size=40, d_model=16, n_heads=4, n_kv_heads=4, d_head=6, d_ff=24, n_layers=1)
    module, optimizer = GPT(cfg), make_optimizer(OptimizerConfig(learning_rate=1e-2, eps=1e-3, warmup_steps=0), 10)
    objective = make_objective(ObjectiveConfig(kind="diffusion", block_sizes=(1, 3, 0)), VOCABULARY)
    parts = [example((1, 3, 0), "next", (3 * i, 3 * i + 1, 3 * i + 2)) for i in range(4)]
    batch = {k: np.concatenate([p[k] for p in parts])[:8] for k in parts[0]}
    assert len(set(batch["block"])) == 3
    begun = jax.device_get(jax.jit(lambda: init_state(module, tiny_inputs("gpt"), optimizer, 3))())
    found = []
    for devices, mesh_cfg in ((eight_devices[:1], MeshConfig()), (eight_devices, MeshConfig(2, 2, 2))):
        mesh = sharding.make_mesh(mesh_cfg, devices)
        shardings = state_shardings(mesh, jax.eval_shape(lambda: begun))
        step = make_train_step(module, objective, optimizer, mesh, shardings)
        state, metrics = step(jax.device_put(jax.tree.map(np.copy, begun), shardings), sharding.to_global(mesh, batch), 3)
        found.append(jax.device_get((state.params, state.opt_state, metrics)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), *found)


@pytest.mark.parametrize("ask", [ObjectiveConfig("causal"), ObjectiveConfig("diffusion", block_sizes=(2,))])
def test_padding_of_a_held_out_row_is_not_seen_where_documents_are_not_kept_apart(ask, gpts):
    """Its positions begin anew, so that by position alone it would stand before the text."""
    modules, params = gpts
    objective = make_objective(ask, VOCABULARY, separate=False, predicts="next")
    segments = np.array([[1] * 9 + [0] * 5], np.int32)
    losses = []
    for seed in (1, 2):
        tokens = np.random.default_rng(0).integers(5, 37, segments.shape)
        tokens[segments == 0] = np.random.default_rng(seed).integers(5, 37, 5)
        text, draws = {"tokens": tokens.astype(np.int32), "segments": segments}, ExampleRng(3, np.array([0]))
        if ask.kind == "causal":
            batch = examples.causal(text, draws)
        else:
            batch = diffused(text, draws, VOCABULARY, (2,), "next", False)
            batch["targets"] = np.where(segments > 0, batch["targets"], tokens)
        losses.append(float(loss_and_gradient(modules["next"], params, objective, batch)[0]))
    assert losses[0] == losses[1]
