"""Parameters that are computed while a run leaves: adapters merged, checkpoints averaged, one parameter at a time."""

import dataclasses
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from bothways import rundir
from bothways.convert.stored import DTYPES, room_for
from bothways.model import adapters
from bothways.model.config import LoRAConfig
from tests.convert.published import quiet
from tests.train.bodies import body, write

LORA = LoRAConfig(rank=2, alpha=3.0)


def drawn(shapes, seed: int):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(np.float32), shapes)


def adapted(base, home) -> None:
    """A run of random adapters for a run."""
    recipe = rundir.read_recipe(base)
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, lora=LORA))
    home.mkdir()
    shutil.copyfile(base / "tokenizer.model", home / "tokenizer.model")
    (home / "recipe.json").write_text(recipe.to_json())
    saved(home, {1: drawn(adapters.split(rundir.param_shapes(recipe))[0], 1)})
    rundir.write_base(home, base)


def saved(home, checkpoints: dict) -> None:
    with rundir.checkpoint_manager(home, keep=9) as manager:
        for step, params in checkpoints.items():
            items = {"params": ocp.args.StandardSave(params), "meta": ocp.args.JsonSave({"step": step})}
            manager.save(step, args=ocp.args.Composite(**items))
        manager.wait_until_finished()


def run_of(what: str, tiny, home):
    run = body("gpt", tiny)
    run = dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, model=dataclasses.replace(tiny, n_layers=3)))
    mean = dataclasses.replace(run.recipe.train, average_last_checkpoints=3 if what == "mean" else 1)
    recipe = dataclasses.replace(
        run.recipe, train=mean, model=dataclasses.replace(run.recipe.model, vocab_size=len(run.tokenizer))
    )
    shapes = rundir.param_shapes(recipe)
    write(dataclasses.replace(run, recipe=recipe, params=drawn(shapes, 0)), home / "run")
    if what == "mean":
        saved(home / "run", {step: drawn(shapes, step) for step in (2, 3, 4)})
        return home / "run"
    adapted(home / "run", home / "adapters")
    return home / "adapters"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("what", ["adapters", "mean"])
def test_what_is_computed_lies_in_files_and_is_what_it_would_be_in_memory(what, dtype, tiny, tmp_path, monkeypatch):
    """No more than one layer of one parameter is in memory on a device."""
    monkeypatch.setattr("bothways.convert.stored.ON_DISK", 1)
    home, asked, held = run_of(what, tiny, tmp_path), "" if dtype == "float32" else dtype, []
    wanted = jax.tree.map(np.asarray, rundir.load_run(home, quiet, dtype=asked).params)
    before = sum(x.nbytes for x in jax.live_arrays())
    with room_for(home, DTYPES[dtype]) as allocate:

        def watched(path, shape):
            held.append(sum(x.nbytes for x in jax.live_arrays()) - before)
            return allocate(path, shape)

        run = rundir.load_run(home, quiet, dtype=asked, into=watched)
        found = jax.tree.leaves(run.params)
        assert all(isinstance(x, np.memmap) for x in found)
        assert max(held) < sum(x.nbytes for x in found) / 4
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x.dtype, y.dtype), run.params, wanted)
        close = {"float32": 1e-6, "bfloat16": 2**-8}[dtype]
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x.astype(np.float32), y.astype(np.float32), close, 1e-7),
            run.params,
            wanted,
        )
    assert not run.recipe.model.lora.rank
