"""Runs of a masked model: two row lengths in one run, resumed on either side of the change."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest

import bothways
from bothways import rundir
from bothways.config import ObjectiveConfig
from bothways.errors import InputError, Stopped
from bothways.recipes import Recipe
from bothways.train import loop, steps
from tests.corpus import made_up_text

SHORT, LONG, SHORT_STEPS, STEPS = 11, 16, 3, 5


@pytest.fixture(scope="module")
def recipe(tiny_recipe, one_device, tmp_path_factory) -> Recipe:
    """A BERT with both heads on four documents."""
    home = tmp_path_factory.mktemp("tales")
    for seed in range(4):
        (home / f"{seed}.txt").write_text(made_up_text(120, seed=seed))
    bert = {"norm_position": "post", "segment_types": 2, "embed_norm": True, "next_sentence": True}
    lengths = {"short_length": SHORT, "short_steps": SHORT_STEPS, "steps": STEPS}
    return dataclasses.replace(
        tiny_recipe,
        family="bert",
        model=dataclasses.replace(
            tiny_recipe.model, d_model=16, n_layers=1, scan_layers=False, context_length=LONG, **bert
        ),
        data=dataclasses.replace(tiny_recipe.data, corpus=str(home / "*.txt")),
        objective=ObjectiveConfig(kind="masked", next_sentence=True),
        train=dataclasses.replace(tiny_recipe.train, eval_every=STEPS, save_every=STEPS, **lengths),
    )


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """A run that nobody interrupts: its directory, and the batches that it saw."""
    home = tmp_path_factory.mktemp("runs") / "whole"
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        to_global = loop.sharding.to_global
        patch.setattr(loop.sharding, "to_global", lambda mesh, batch: seen.append(batch) or to_global(mesh, batch))
        loop.train(recipe, home)
    return home, seen


def rows_of(home) -> list[dict]:
    rows = [json.loads(line) for line in (home / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]


def test_the_first_steps_read_short_rows(whole):
    lengths = [batch["tokens"].shape for batch in whole[1][:STEPS]]
    assert lengths == [(8, SHORT)] * SHORT_STEPS + [(8, LONG)] * (STEPS - SHORT_STEPS)
    slots = [batch["mask_positions"].shape[1] for batch in whole[1][:STEPS]]
    assert slots == [round(0.15 * SHORT)] * SHORT_STEPS + [round(0.15 * LONG)] * (STEPS - SHORT_STEPS)
    assert all(batch["tokens"].shape[1] == LONG for batch in whole[1][STEPS:])


def test_both_losses_are_reported(whole):
    rows = rows_of(whole[0])
    trained = [row for row in rows if "loss" in row]
    assert [row["step"] for row in trained] == list(range(1, STEPS + 1))
    for row in trained:
        assert row["loss"] == pytest.approx(row["mlm"] + row["nsp"], rel=1e-5)
        assert row["mlm"] > row["nsp"] > 0
        assert {0 <= row[f"{name}_accuracy"] <= 1 for name in ("mlm", "nsp")} == {True}
        assert row["nsp_accuracy"] * 8 == pytest.approx(round(row["nsp_accuracy"] * 8))
    (held,) = [row for row in rows if "eval_loss" in row]
    assert held["eval_loss"] == pytest.approx(held["eval_mlm"] + held["eval_nsp"], rel=1e-5)
    assert "eval_nsp_accuracy" in held


@pytest.mark.parametrize("saved", [SHORT_STEPS - 1, SHORT_STEPS], ids=["before", "where"])
def test_a_run_stopped_at_the_change_of_lengths_goes_on_as_if_it_was_not(whole, recipe, tmp_path, monkeypatch, saved):
    home, report = tmp_path / "stopped", steps._report

    def stopping(reporter, meter, step, *rest):
        if step == saved - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return report(reporter, meter, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(steps, "_report", stopping)
        with pytest.raises(Stopped, match=f"step {saved}"):
            loop.train(recipe, home)
    loop.train(recipe, home)
    found, wanted = (jax.device_get(rundir.load_run(h, print).params) for h in (home, whole[0]))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert rows_of(home) == rows_of(whole[0])


def test_a_trained_run_fills_masks_from_the_command_line(whole, capsys):
    text = "the [MASK] sees [MASK]"
    assert bothways.main(["fill", str(whole[0]), text, "--top", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["text", "filled", "masks"]
    assert found["text"] == text
    assert [[list(candidate) for candidate in mask] for mask in found["masks"]] == [[["token", "p"]] * 2] * 2


def test_one_document_has_no_next_sentences(recipe, tiny_recipe, tmp_path):
    alone = dataclasses.replace(recipe, data=tiny_recipe.data)
    with pytest.raises(InputError, match=r"there is 1 document; give more files, or set --objective.no-next-sentence$"):
        loop.train(alone, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        (
            {"family": "gpt"},
            "objective.kind=masked is not for a gpt, whose mask serves causal or chat or hybrid or diffusion or contrastive; set --objective.kind causal",
        ),
        (
            {"objective": ObjectiveConfig()},
            "objective.kind=causal is not for a bert, whose mask serves masked or diffusion or contrastive; set --objective.kind masked",
        ),
        ({"model.next_sentence": False}, "objective.next_sentence needs the head: set --model.next-sentence"),
        ({"model.segment_types": 3}, "pairs have 2 segment types, and model.segment_types=3"),
        ({"train.short_length": LONG + 1}, f"train.short_length={LONG + 1} > model.context_length={LONG}"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_together_is_refused(recipe, fields, wanted):
    recipe.check(8)
    for path, value in fields.items():
        section, _, name = path.rpartition(".")
        if section:
            name, value = section, dataclasses.replace(getattr(recipe, section), **{name: value})
        recipe = dataclasses.replace(recipe, **{name: value})
    with pytest.raises(InputError) as refused:
        recipe.check(8)
    assert f"{wanted}\n" in f"{refused.value}\n"
