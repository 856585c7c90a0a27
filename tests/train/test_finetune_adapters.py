"""Adapters under a task's head: what is trained and kept, and that a mesh, or a batch in pieces, changes nothing."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bothways
from bothways import rundir, sharding
from bothways.config import FinetuneConfig, MeshConfig
from bothways.errors import InputError
from bothways.model import adapters
from bothways.model.config import LoRAConfig
from bothways.sharding import make_mesh
from bothways.train.finetune import finetune
from bothways.train.tuning import FinetuneRunner
from tests.train.bodies import body, changed, dog_task, write

pytestmark = pytest.mark.usefixtures("one_device")

LORA = LoRAConfig(rank=3, alpha=7.0, targets=("query", "value", "down"))
GRID = FinetuneConfig(
    epochs=5, batch_size=16, learning_rates=(2e-2,), seeds=1, lora=LORA, patience=5, optimizer="adamw", dropout=0.0
)


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory):
    home = tmp_path_factory.mktemp("base") / "body"
    write(body("bert", tiny), home)
    return rundir.load_run(home, print)


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    home = tmp_path_factory.mktemp("tuned") / "run"
    task = dog_task("classify", train=160)
    return home, task, finetune(base, task, home, GRID)


def test_adapters_and_a_head_are_learned_kept_and_predict(tuned, base):
    home, task, result = tuned
    assert result.value >= 0.8
    assert "from_scratch" not in result.baselines
    kept = json.loads((home / "checkpoints" / "0" / "params" / "_METADATA").read_text())["tree_metadata"]
    assert len(kept) == 2 * len(LORA.targets) + 2
    assert all("lora" in path or "task_head" in path for path in kept)
    run = rundir.load_run(home, print)
    assert (run.recipe.model.lora.rank, run.task.name) == (0, "dogs")
    names = {path.split("'")[-4] for path in changed(run.params["body"], base.params)}
    assert names == set(LORA.targets)
    found = bothways.load(home).predict([item["text"] for item in task.splits["test"]])
    right = [p.label == item["label"] for p, item in zip(found, task.splits["test"], strict=True)]
    assert np.mean(right) == pytest.approx(result.value, abs=1e-4)  # merged, as it was apart
    assert finetune(base, task, home, GRID) == result


def test_what_adapters_are_for_must_stay(tuned, tmp_path, base):
    home, task, _ = tuned
    noted = (home / "adapters.json").read_text()
    (home / "adapters.json").write_text(json.dumps(json.loads(noted) | {"base": str(tmp_path / "gone")}))
    with pytest.raises(InputError, match="is not there; put it back"):
        bothways.load(home)
    (home / "adapters.json").write_text(noted)
    for fields, match in (
        ({"targets": ("gate",)}, "lora.targets is .*: this model has none"),
        ({"alpha": float("nan")}, "^lora.alpha is nan; it must be positive"),
    ):
        with pytest.raises(InputError, match=match):
            finetune(base, task, tmp_path / "new", dataclasses.replace(GRID, lora=dataclasses.replace(LORA, **fields)))
    assert not (tmp_path / "new").exists()


def steps_of(run, task, mesh, devices, monkeypatch, count=3):
    """The losses of a few steps on one batch, and what they leave."""
    monkeypatch.setattr(sharding, "make_mesh", lambda cfg: make_mesh(cfg, devices))
    tuner = FinetuneRunner(run, task, dataclasses.replace(GRID, mesh=mesh).settled(1, "adamw"))
    state = tuner.fresh(jax.random.key(0), 2e-2, None)
    # B is zero at first, and A would have no gradient.
    params = jax.tree.map(lambda x: x + 0.1 * np.cos(np.arange(x.size)).reshape(x.shape), state.params)
    frozen = jax.tree.map(jnp.copy, tuner.frozen)
    state = state.replace(params=jax.device_put(params, tuner.shardings.params), frozen=frozen)
    batch = sharding.to_global(tuner.mesh, tuner.rows["train"].batch(np.arange(16), 24))
    losses = []
    for _ in range(count):
        state, metrics = tuner.step(state, batch, 0)
        losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state.params)


def test_eight_devices_train_what_one_does(base, eight_devices, monkeypatch):
    task = dog_task("classify", train=32)
    many, after = steps_of(base, task, MeshConfig(data=2, fsdp=2, tensor=2), eight_devices, monkeypatch)
    one, alone = steps_of(base, task, MeshConfig(), eight_devices[:1], monkeypatch)
    np.testing.assert_allclose(many, one, rtol=1e-4)
    assert one[-1] < one[0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), after, alone)


def test_the_body_is_merged_as_it_was_apart(base):
    """The scores of frozen weights with adapters beside them are those of the merged model."""
    tuner = FinetuneRunner(base, dog_task("classify", train=16), GRID.settled(1, "adamw"))
    params = jax.device_get(tuner.fresh(jax.random.key(0), 1e-2, None).params)
    params = jax.tree.map(lambda x: x + 0.2 * np.sin(np.arange(x.size)).reshape(x.shape), params)
    whole = adapters.join(params, tuner.frozen)
    batch = tuner.rows["train"].batch(np.arange(8), 24)
    inputs = [batch[name] for name in ("tokens", "segments", "types")]
    apart = jax.jit(lambda p: tuner.module.apply({"params": p}, *inputs))(whole)
    plain, merge = rundir.module_of(base.recipe, tuner.info), lambda p: adapters.merge(p, tuner.recipe.model)
    found = jax.jit(lambda p: plain.apply({"params": merge(p)}, *inputs))(whole)
    assert np.abs(apart).max() > 0.1
    np.testing.assert_allclose(apart, found, rtol=1e-4, atol=1e-5)
