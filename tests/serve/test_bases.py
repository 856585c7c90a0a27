"""Adapters beside a base that several runs share: the same answers as merged, the base in memory once, in a server too."""

import dataclasses
import gc

import jax
import numpy as np
import pytest

import bothways
from bothways import bases
from bothways.config import FinetuneConfig
from bothways.errors import InputError
from bothways.model.config import LoRAConfig
from bothways.rundir import load_run
from bothways.serve.runs import Limits, Runs, named
from bothways.train.finetune import finetune
from bothways.train.loop import train
from tests.serve.conftest import SLOTS
from tests.serve.test_slots import generation
from tests.serve.test_slots import run as go
from tests.train.bodies import body, dog_task, write

LORA = LoRAConfig(rank=3, alpha=7.0)
APART = Limits(**SLOTS, context=32, prefix_cache=500, merge_adapters=False)
pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def homes(tiny_recipe, tmp_path_factory):
    """Two runs of adapters, of different rank, on one base."""
    home = tmp_path_factory.mktemp("runs")
    train(tiny_recipe, home / "base")
    for name, rank, rate in (("a", 3, 0.05), ("b", 2, 0.03)):
        recipe = dataclasses.replace(
            tiny_recipe,
            model=dataclasses.replace(tiny_recipe.model, lora=dataclasses.replace(LORA, rank=rank)),
            train=dataclasses.replace(tiny_recipe.train, init_from=str(home / "base")),
            optimizer=dataclasses.replace(tiny_recipe.optimizer, learning_rate=rate),
        )
        train(recipe, home / name)
    return home


def leaves(model) -> dict[int, jax.Array]:
    return {id(x): x for x in jax.tree.leaves(model.run.params)}


def test_two_runs_share_a_base_and_answer_as_merged_ones(homes):
    apart = {name: bothways.load(homes / name, merge_adapters=False) for name in "ab"}
    merged = {name: bothways.load(homes / name) for name in "ab"}
    assert apart["a"].run.base is apart["b"].run.base
    assert len(bases.BASES) == 1
    shared = leaves(apart["a"]).keys() & leaves(apart["b"]).keys()
    assert sum(leaves(apart["a"])[i].size for i in shared) == sum(
        x.size for x in jax.tree.leaves(load_run(homes / "base", print).params)
    )
    texts = ["the king loves the dog", "a cat"]
    scores = {}
    for name in "ab":
        scores[name], wanted = ([s.logprob for s in model.score(texts)] for model in (apart[name], merged[name]))
        np.testing.assert_allclose(scores[name], wanted, atol=2e-3)  # told to three places
        one, other = (model.sample(["the king"], max_tokens=9, greedy=True)[0] for model in (apart[name], merged[name]))
        assert one.text == other.text
    assert abs(scores["a"][0] - scores["b"][0]) > 0.1
    del apart
    gc.collect()
    assert not bases.BASES


def test_a_fine_tuned_run_beside_its_body(tiny, tmp_path):
    write(body("bert", tiny), tmp_path / "body")
    task = dog_task("classify", train=40)
    cfg = FinetuneConfig(
        epochs=1, learning_rates=(2e-2,), seeds=1, lora=dataclasses.replace(LORA, targets=("query", "down"))
    )
    finetune(load_run(tmp_path / "body", print), task, tmp_path / "run", cfg)
    apart, merged = bothways.load(tmp_path / "run", merge_adapters=False), bothways.load(tmp_path / "run")
    assert apart.run.base is not None
    assert merged.run.base is None
    texts = [item["text"] for item in task.splits["test"]]
    for one, other in zip(apart.predict(texts), merged.predict(texts), strict=True):
        assert one.label == other.label
        assert one.p == pytest.approx(other.p, abs=1e-5)


def test_whole_runs_are_opened_as_ever_and_a_base_that_went_is_said(homes, tmp_path):
    assert bothways.load(homes / "base", merge_adapters=False).run.base is None
    (tmp_path / "base").mkdir()
    with pytest.raises(InputError, match="is not a run directory"):
        bothways.load(tmp_path / "base", merge_adapters=False)


def written(loaded) -> list[int]:
    loaded.pool.add(one := generation(loaded.pool, [7, 11, 5], 8))
    go(loaded.pool, lambda: not loaded.pool.busy)
    return one.said


def test_a_server_counts_a_base_once_and_writes_what_merged_runs_write(homes):
    served = named([str(homes / "a"), str(homes / "b")])
    apart, merged = Runs(served, APART), Runs(served, dataclasses.replace(APART, merge_adapters=True))
    assert apart.get("a").model.run.base is apart.get("b").model.run.base
    for name in "ab":
        assert written(apart.get(name)) == written(merged.get(name))
    assert served["a"].base_bytes > served["a"].bytes / 2
    assert merged.bytes - apart.bytes == served["a"].base_bytes
    for spare, kept in ((0, ["a", "b"]), (-1, ["b"])):
        runs = Runs(served, dataclasses.replace(APART, memory=apart.bytes + spare))
        for name in "ab":
            runs.get(name)
        assert list(runs.loaded) == kept
