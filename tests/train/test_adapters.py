"""Low-rank adapters: what they compute, what is trained and kept, and where it lies."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bothways
from bothways import rundir, sharding
from bothways.config import MeshConfig, ObjectiveConfig, OptimizerConfig, TrainConfig
from bothways.data.tokenizer import made_up_vocabulary
from bothways.errors import InputError
from bothways.model import adapters
from bothways.model.config import LoRAConfig
from bothways.registry import make_module, tiny_inputs
from bothways.sharding import make_mesh  # itself, and not that of `one_device`
from bothways.train.loop import train
from bothways.train.objectives import make_objective
from bothways.train.optimizer import make_optimizer
from bothways.train.step import init_state, make_train_step, state_shardings

LORA = LoRAConfig(rank=3, alpha=7.0)


def inputs_of(family: str) -> dict:
    rng = np.random.default_rng(0)
    names = ("tokens", "source") if family == "seq2seq" else ("tokens",)
    return {name: jnp.asarray(rng.integers(5, 37, (2, 11)), jnp.int32) for name in names}


def randomised(params: dict, seed: int = 1) -> dict:
    """The same tree with noise, so that no adapter is nothing."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return treedef.unflatten([x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("gpt", {"activation": "swiglu", "n_kv_heads": 1, "scan_layers": True, "n_layers": 2}),
        ("bert", {"segment_types": 2, "next_sentence": True, "n_layers": 1}),
        ("seq2seq", {"n_layers": 1}),
    ],
)
def test_outputs_and_gradients_are_those_of_a_hand_made_low_rank_model(family, fields, tiny_with):
    cfg = tiny_with(lora=LORA, **fields)
    module, plain = make_module(family, cfg), make_module(family, dataclasses.replace(cfg, lora=LoRAConfig()))
    inputs = inputs_of(family)
    params = randomised(jax.jit(module.init)(jax.random.key(0), **inputs)["params"])
    mine, frozen = adapters.split(params)
    assert adapters.join(mine, frozen).keys() == params.keys()
    assert jax.tree.structure(adapters.join(mine, frozen)) == jax.tree.structure(params)

    def by_hand(mine: dict) -> dict:
        """Every kernel is W + alpha / r A B, written out."""
        path_of = lambda path: "/".join(str(p.key) for p in path)  # noqa: E731
        flat = {path_of(path): x for path, x in jax.tree_util.tree_leaves_with_path(mine)}

        def kernel(path, w):
            name = path_of(path).removesuffix("/kernel")
            if f"{name}/lora/a" not in flat:
                return w
            a, b = flat[f"{name}/lora/a"], flat[f"{name}/lora/b"]
            layers = [LORA.alpha / LORA.rank * jnp.tensordot(a[i], b[i], 1) for i in range(len(a))]
            return w + jnp.stack(layers)

        return jax.tree_util.tree_map_with_path(kernel, frozen)

    def total(module, params):
        found = module.apply({"params": params}, **inputs)
        return sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(found))

    ours, gradient = jax.jit(jax.value_and_grad(lambda m: total(module, adapters.join(m, frozen))))(mine)
    theirs, other = jax.jit(jax.value_and_grad(lambda m: total(plain, by_hand(m))))(mine)
    np.testing.assert_allclose(ours, theirs, rtol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3), gradient, other)
    np.testing.assert_allclose(jax.jit(lambda p: total(plain, adapters.merge(p, cfg)))(params), theirs, rtol=2e-5)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradient))


def test_targets_and_dropout(tiny_with):
    cfg = tiny_with(lora=LoRAConfig(rank=2, targets=("query", "down"), dropout=0.5), n_layers=1)
    module, inputs = make_module("gpt", cfg), inputs_of("gpt")
    params = randomised(jax.jit(module.init)(jax.random.key(0), **inputs)["params"])
    mine, _ = adapters.split(params)
    names = {"/".join(str(p.key) for p in path[-3:]) for path, _ in jax.tree_util.tree_leaves_with_path(mine)}
    assert names == {f"{where}/lora/{leaf}" for where in ("query", "down") for leaf in "ab"}

    @jax.jit
    def dropped(key):
        return module.apply({"params": params}, **inputs, deterministic=False, rngs={"dropout": jax.random.key(key)})[0]

    @jax.jit
    def whole(params):
        return module.apply({"params": params}, **inputs)[0]

    assert not np.allclose(dropped(1), dropped(2))
    found = whole(params)
    np.testing.assert_array_equal(found, whole(params))
    merged = make_module("gpt", dataclasses.replace(cfg, lora=LoRAConfig()))
    wanted = jax.jit(lambda p: merged.apply({"params": adapters.merge(p, cfg)}, **inputs)[0])(params)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def base(tiny_recipe, one_device, tmp_path_factory):
    home = tmp_path_factory.mktemp("base") / "base"
    train(tiny_recipe, home)
    return home


@pytest.fixture(scope="module")
def recipe(tiny_recipe, base):
    model = dataclasses.replace(tiny_recipe.model, lora=dataclasses.replace(LORA, dropout=0.1))
    cfg = dataclasses.replace(tiny_recipe.train, init_from=str(base))
    return dataclasses.replace(tiny_recipe, model=model, train=cfg)


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    home = tmp_path_factory.mktemp("adapted") / "run"
    train(recipe, home)
    return home


def sized(recipe):
    """With the vocabulary's size, as a run's recipe has it."""
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, vocab_size=320))


def losses(home) -> list[float]:
    lines = map(json.loads, (home / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_only_adapters_are_trained_and_kept(run, base, recipe):
    found = [
        path
        for item in ("params", "train")
        for path in json.loads((run / "checkpoints" / "6" / item / "_METADATA").read_text())["tree_metadata"]
    ]
    arrays = [path for path in found if "blocks" in path or "embedding" in path or "kernel" in path]
    assert arrays
    assert all("lora" in path for path in arrays)
    before, after = (rundir.load_run(home, print) for home in (base, run))
    assert after.recipe.model.lora.rank == 0
    changed = {
        str(path[-2].key)
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(before.params), jax.tree.leaves(after.params), strict=True
        )
        if not np.array_equal(a, b)
    }
    assert changed == {"query", "key", "value", "out", "up", "down"}
    assert bothways.load(run).sample(["the king"], max_tokens=3)[0].tokens > 0


def test_a_resumed_run_is_the_same_run(run, recipe, tmp_path):
    half = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, steps=3))
    train(half, tmp_path / "run")
    train(recipe, tmp_path / "run")
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(run), rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        *(rundir.load_run(home, print).params for home in (tmp_path / "run", run)),
    )


def test_a_batch_in_pieces_has_the_gradient_of_the_whole(tiny_with):
    """Of adapters: a step in two pieces changes them as one step does."""
    cfg = tiny_with(lora=LORA, n_layers=1)
    module, mesh = make_module("gpt", cfg), make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = make_optimizer(OptimizerConfig(name="adamw", clip_norm=0.0), 6)
    state = init_state(module, tiny_inputs("gpt"), optimizer, 0)
    state = state.replace(params=randomised(state.params))
    shardings = state_shardings(mesh, jax.eval_shape(lambda: state))
    objective = make_objective(ObjectiveConfig(), made_up_vocabulary(37))
    rng, shape = np.random.default_rng(3), (4, 11)
    batch = {name: rng.integers(5, 37, shape).astype(np.int32) for name in ("tokens", "targets")}
    batch |= {"segments": np.ones(shape, np.int32), "positions": np.tile(np.arange(11, dtype=np.int32), (4, 1))}
    batch["weights"] = (rng.random(shape) < [[0.9], [0.1], [0.5], [0.3]]).astype(np.float32)  # pieces of unequal weight

    def after(pieces):
        step = make_train_step(module, objective, optimizer, mesh, shardings, accumulate=pieces)
        found, metrics = step(jax.tree.map(jnp.copy, state), batch, 0)
        return found.opt_state, metrics["loss"], metrics["grad_norm"]

    whole, pieces = after(1), after(2)
    assert whole[2] > 0.1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), whole, pieces)


def test_adapters_lie_as_their_kernels_and_a_mesh_changes_nothing(run, recipe, tmp_path, eight_devices, monkeypatch):
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    shapes = rundir.param_shapes(sized(recipe))
    placed = sharding.parameter_shardings(make_mesh(mesh, eight_devices), shapes)
    attention = placed["decoder"]["stack"]["blocks"]["attention"]
    for name in ("query", "out"):
        kernel, a, b = (
            tuple(leaf.spec) for leaf in (attention[name]["kernel"], *(attention[name]["lora"][x] for x in "ab"))
        )
        cut = len(a) - 1
        assert a == (*kernel[:cut], None)
        assert b == (kernel[0], None, *kernel[cut:])
    monkeypatch.setattr(sharding, "make_mesh", make_mesh)
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    train(dataclasses.replace(recipe, mesh=mesh), tmp_path / "run")
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(run), rtol=2e-4)


def test_frozen_weights_in_bfloat16(run, recipe, tmp_path):
    model = dataclasses.replace(recipe.model, lora=dataclasses.replace(recipe.model.lora, frozen="bfloat16"))
    narrow = dataclasses.replace(recipe, model=model)
    shapes = adapters.frozen_types(adapters.split(rundir.param_shapes(sized(narrow)))[1], model)
    types = {str(path[-1].key): x.dtype for path, x in jax.tree_util.tree_leaves_with_path(shapes)}
    assert types["kernel"] == types["embedding"] == jnp.bfloat16
    assert types["scale"] == jnp.float32
    train(narrow, tmp_path / "run")
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(run), rtol=2e-2)
    assert losses(tmp_path / "run") != losses(run)


def test_what_adapters_are_not_for(recipe, run, base, tmp_path):
    with pytest.raises(InputError, match="adapters are for a run that is trained already"):
        train(dataclasses.replace(recipe, train=TrainConfig(steps=6)), tmp_path / "a")
    for fields, match in (
        ({"targets": ("gate",)}, "none of these projections"),
        ({"rank": -1}, "must be 0"),
        ({"alpha": 0.0}, "must be positive"),
        ({"dropout": 1.0}, r"in \[0, 1\)"),
    ):
        model = dataclasses.replace(recipe.model, lora=dataclasses.replace(LORA, **fields))
        with pytest.raises(InputError, match=match):
            train(dataclasses.replace(recipe, model=model), tmp_path / "a")
    wide = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, d_ff=30))
    with pytest.raises(InputError, match="model.d_ff is 30, and there 26"):
        train(wide, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    noted = json.loads((run / "adapters.json").read_text())
    (run / "adapters.json").write_text(json.dumps(noted | {"base": str(tmp_path / "gone")}))
    with pytest.raises(InputError, match="is not there; put it back"):
        bothways.load(run)
    (run / "adapters.json").write_text(json.dumps(noted | {"step": 99}))
    with pytest.raises(InputError, match="no checkpoint 99"):
        bothways.load(run)
    (run / "adapters.json").write_text(json.dumps(noted))
