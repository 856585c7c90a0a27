"""Runs on a mixture: of one corpus the run without; of two, resumed as uninterrupted, with figures of each."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import bothways
from bothways import rundir
from bothways.errors import InputError
from bothways.sample.evaluate import evaluate
from bothways.train.loop import train
from tests.corpus import made_up_text


@pytest.fixture(scope="module")
def recipe(tiny_recipe, one_device):
    return dataclasses.replace(tiny_recipe, model=dataclasses.replace(tiny_recipe.model, d_model=16))


@pytest.fixture(scope="module")
def mixed(recipe, text_file, tmp_path_factory):
    """A recipe whose second corpus weighs more from step 4 on, and a run of it."""
    home = tmp_path_factory.mktemp("mixed")
    (home / "other.txt").write_text(made_up_text(300, seed=1))
    entries = (f"{text_file}=0.7", f"{home}/other.txt=0.3,4:2.1")
    data = dataclasses.replace(recipe.data, corpus="", mixture=entries)
    of_both = dataclasses.replace(recipe, data=data)
    return of_both, home / "run", train(of_both, home / "run")


def lines_of(home):
    rows = [json.loads(line) for line in (home / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("tokens_per_second", "mfu")} for row in rows]


def same(a, b):
    a, b = (jax.device_get(rundir.load_run(home, print).params) for home in (a, b))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_mixture_of_one_is_the_run_without(recipe, tmp_path):
    recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, steps=3))
    of_one = dataclasses.replace(recipe.data, corpus="", mixture=(f"{recipe.data.corpus}=3",))
    train(recipe, tmp_path / "a")
    train(dataclasses.replace(recipe, data=of_one), tmp_path / "b")
    assert lines_of(tmp_path / "a") == lines_of(tmp_path / "b")
    same(tmp_path / "a", tmp_path / "b")


def test_each_corpus_has_its_losses_in_the_log(mixed):
    _, home, result = mixed
    held = [row for row in lines_of(home) if "eval_loss" in row]
    assert [row["step"] for row in held] == [3, 6]
    for row in held:  # 0.7 and 2.1, of the last phase
        assert row["eval_loss"] == pytest.approx(0.25 * row["eval_loss/tale"] + 0.75 * row["eval_loss/other"])
        assert row["eval_loss/tale"] != row["eval_loss/other"]
    assert result.loss == held[-1]["eval_loss"]


def test_evaluate_has_figures_of_each(mixed):
    of = {(f.suite, f.metric): f for f in evaluate(bothways.load(mixed[1]), ["validation"])}
    assert {suite for suite, _ in of} == {"validation", "validation/tale", "validation/other"}
    for metric in ("loss", "bits_per_byte"):
        tale, other, both = (of[f"validation{name}", metric] for name in ("/tale", "/other", ""))
        assert both.value == pytest.approx(0.25 * tale.value + 0.75 * other.value)
        assert both.n == tale.n + other.n
        assert both.interval[0] < both.value < both.interval[1]


def test_a_resumed_run_is_the_uninterrupted_one(mixed, tmp_path):
    recipe, home, _ = mixed
    shutil.copytree(home, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    train(recipe, tmp_path / "run")
    assert lines_of(home) == lines_of(tmp_path / "run")
    same(home, tmp_path / "run")
    first, second = recipe.data.mixture
    other = dataclasses.replace(recipe.data, mixture=(first, second.replace("2.1", "2.2")))
    with pytest.raises(InputError, match=r"data.mixture: \('0.7', '0.3,4:2.1'\) -> \('0.7', '0.3,4:2.2'\)"):
        train(dataclasses.replace(recipe, data=other), home)
