"""Runs: resumed equals uninterrupted, on any mesh, whatever ended them."""

import dataclasses
import json
import os
import shutil
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from bothways import checkpoints, rundir, sharding
from bothways.config import MeshConfig, TrainConfig
from bothways.data import corpora
from bothways.data.examples import as_is
from bothways.data.pipeline import Stacked
from bothways.data.tokenizer import Tokenizer
from bothways.errors import CheckpointUnavailable, Diverged, InputError, Stopped
from bothways.flops import recipe_flops_per_token
from bothways.sample import evaluate as figures
from bothways.train import loop, steps
from bothways.train.loop import Evaluator, train
from bothways.train.objectives import Objective
from bothways.train.steps import Throughput, run_steps
from tests.conftest import on_one_device, plotting
from tests.train.jobs import counting


def training(recipe, **fields):
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, **fields))


@pytest.fixture(scope="module")
def recipe(tiny_recipe):
    model = dataclasses.replace(tiny_recipe.model, d_model=16)
    return dataclasses.replace(tiny_recipe, model=model, mesh=MeshConfig(8, 1, 1))


@pytest.fixture
def on_one(recipe):
    """The same where its mesh does not matter."""
    with on_one_device():
        yield dataclasses.replace(recipe, mesh=MeshConfig())


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """A run that nobody interrupts."""
    home = tmp_path_factory.mktemp("runs") / "whole"
    with plotting():
        return home, train(recipe, home)


def params_of(home):
    return jax.device_get(rundir.load_run(home, print).params)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def stop_after(monkeypatch, count):
    """Send this process SIGTERM once so many steps are reported."""
    seen = []
    original = steps._report

    def reporting(reporter, meter, step, *rest):
        seen.append(step)
        if step == count:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(reporter, meter, step, *rest)

    monkeypatch.setattr(steps, "_report", reporting)
    return seen


def test_a_run_directory_describes_itself(whole):
    home, result = whole
    assert {"recipe.json", "tokenizer.model", "checkpoints", "metrics.jsonl", "events", "loss.png"} <= set(
        os.listdir(home)
    )
    assert (home / "loss.png").stat().st_size > 10_000
    assert any((home / "events").iterdir())
    rows = [json.loads(line) for line in (home / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in rows if "tokens_per_second" in r] == [2, 3, 4, 5, 6]  # the first compiles
    assert [r["step"] for r in rows if "eval_loss" in r] == [3, 6]
    assert rows[-1]["eval_loss"] == result.loss
    assert rows[-1]["eval_bits_per_byte"] == result.bits_per_byte


def test_sigterm_saves_and_the_resumed_run_is_the_same_run(whole, recipe, tmp_path, monkeypatch):
    home = tmp_path / "stopped"
    stop_after(monkeypatch, 4)
    with pytest.raises(Stopped, match="step 5"):
        train(recipe, home)
    monkeypatch.undo()
    result = train(recipe, home)
    same(params_of(home), params_of(whole[0]))
    assert result.loss == whole[1].loss

    def metrics(path):
        rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in rows]

    assert metrics(home) == metrics(whole[0])


def test_resuming_on_another_mesh_goes_on_with_the_same_data(whole, recipe, tmp_path, monkeypatch):
    home = tmp_path / "moved"
    stop_after(monkeypatch, 4)
    with pytest.raises(Stopped):
        train(recipe, home)
    monkeypatch.undo()
    moved = dataclasses.replace(recipe, mesh=MeshConfig(2, 1, 1))
    with monkeypatch.context() as two:
        two.setattr(jax, "device_count", lambda: 2)
        two.setattr(sharding, "make_mesh", partial_mesh(sharding.make_mesh))
        result = train(moved, home)
    assert result.loss == pytest.approx(whole[1].loss, rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), params_of(home), params_of(whole[0]))


def partial_mesh(make):
    return lambda cfg: make(cfg, jax.devices()[:2])


def test_a_finished_run_is_not_trained_again(whole, recipe):
    home, result = whole
    before = (home / "metrics.jsonl").read_text()
    again = train(training(recipe, log_every=2), home)
    assert again.loss == pytest.approx(result.loss)
    assert rundir.read_recipe(home).train.log_every == 2  # what it was told last
    assert (home / "metrics.jsonl").read_text() == before


def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_is_kept_aside(whole, recipe, tmp_path, capfd):
    home = tmp_path / "damaged"
    shutil.copytree(whole[0], home)
    for path in (home / "checkpoints" / "6" / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    train(recipe, home)
    assert "checkpoint 6 is damaged" in capfd.readouterr().err
    same(params_of(home), params_of(whole[0]))
    assert (home / "unreadable-checkpoints" / "6" / "params").is_dir()


def test_an_error_while_restoring_that_is_no_damage_deletes_nothing(tmp_path, monkeypatch):
    cfg = TrainConfig(steps=6, eval_every=3, save_every=3)
    run_steps(counting(tmp_path, cfg))
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    monkeypatch.setattr(checkpoints, "WAITS", ())

    def refused(*_, **__):
        raise ConnectionError("503 Service Unavailable")

    monkeypatch.setattr(checkpoints.ocp.CheckpointManager, "restore", refused)
    with pytest.raises(CheckpointUnavailable, match="nothing was deleted"):
        run_steps(counting(tmp_path, cfg))
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def test_a_run_is_trained_longer(on_one, tmp_path, capfd):
    constant = dataclasses.replace(on_one, optimizer=dataclasses.replace(on_one.optimizer, schedule="constant"))
    train(constant, tmp_path / "whole")
    train(training(constant, steps=3), tmp_path / "longer")
    train(constant, tmp_path / "longer")
    assert "train.steps: 3 -> 6; the learning rate of each step stays what it was" in capfd.readouterr().err
    same(params_of(tmp_path / "longer"), params_of(tmp_path / "whole"))


def test_a_checkpoint_of_version_1_is_gone_on_with(tmp_path):
    """Its counter of steps without a finite loss has another name."""
    cfg = TrainConfig(steps=3, tracker="none")
    state = counting(tmp_path, cfg).begin().replace(consecutive_nonfinite=jnp.int32(4), step=jnp.int32(2))
    kept = {"step": state.step, "opt_state": state.opt_state, "bad_in_row": state.consecutive_nonfinite}
    with checkpoints.checkpoint_manager(tmp_path, keep=1) as manager:
        items = {"params": state.params, "train": kept | {"bad_total": state.bad_total}}
        manager.save(2, args=ocp.args.Composite(**{k: ocp.args.StandardSave(x) for k, x in items.items()}))
        manager.wait_until_finished()
    found = steps._restore(counting(tmp_path, cfg))
    assert (found[0], int(found[1].consecutive_nonfinite), int(found[1].step)) == (2, 4, 2)


def test_sigterm_at_an_evaluation_step_saves_and_does_not_evaluate(tmp_path, monkeypatch):
    """A machine that is taken away gives some thirty seconds, and an evaluation may take minutes."""
    evaluated = []
    cfg = TrainConfig(steps=6, eval_every=3, save_every=100, log_every=1, max_to_keep=1)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Stopped, match="step 3"):
            run_steps(counting(tmp_path, cfg, held=lambda step: evaluated.append(step) or 1.0))
    assert evaluated == []
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["3"]
    run_steps(counting(tmp_path, cfg, held={3: 1.0, 6: 2.0}.__getitem__))  # which makes up for it, and may be the best
    with checkpoints.checkpoint_manager(tmp_path, read_only=True) as manager:
        assert {step: manager.metrics(step) for step in manager.all_steps()} == {3: {"loss": 1.0}, 6: {"loss": 2.0}}


def test_another_recipe_in_the_same_directory_is_refused(whole, recipe):
    other = dataclasses.replace(recipe, optimizer=dataclasses.replace(recipe.optimizer, learning_rate=0.5))
    with pytest.raises(InputError, match=r"optimizer.learning_rate: 0.003 -> 0.5"):
        train(other, whole[0])


def test_a_run_goes_on_with_its_own_text_only(whole, recipe, text_file, tmp_path, monkeypatch):
    home = tmp_path / "run"
    shutil.copytree(whole[0], home)
    held, cfg = tmp_path / "new.txt", recipe.data
    held.write_text(text_file.read_text() + "and one more line\n")
    glob = dataclasses.replace(recipe, data=dataclasses.replace(cfg, corpus=str(tmp_path / "*.txt")))
    with pytest.raises(InputError, match=r"\*.txt is not the text that .* was trained on; put that back"):
        train(glob, home)
    told = []
    model = types.SimpleNamespace(recipe=glob, tokenizer=Tokenizer.load(home), run=types.SimpleNamespace(home=home))
    monkeypatch.setattr(figures, "causal_figures", lambda *_: [])
    figures.evaluate(model, ["validation"], told.append)
    assert "no longer the text" in told.pop()
    moved = dataclasses.replace(glob, data=dataclasses.replace(cfg, corpus=str(tmp_path / text_file.name)))
    shutil.copy(text_file, tmp_path / text_file.name)
    assert corpora.load(moved.data).fingerprint == corpora.load(cfg).fingerprint
    (home / "corpus.json").unlink()  # as runs were left before it was kept
    figures.evaluate(model, ["validation"], told.append)
    assert told == []


def test_divergence_stops_the_run_and_leaves_the_checkpoint(on_one, tmp_path):
    home = tmp_path / "wild"
    wild = dataclasses.replace(
        training(on_one, steps=9, max_nonfinite_steps=2),
        optimizer=dataclasses.replace(on_one.optimizer, learning_rate=1e38, clip_norm=0.0, warmup_steps=0),
    )
    with pytest.raises(Diverged, match="2 steps in a row"):
        train(wild, home)
    assert not list((home / "checkpoints").iterdir())


def test_a_batch_ramp_sees_every_row_in_order(on_one, tmp_path, monkeypatch):
    """Rows come in the same order whether the batch grows or not."""
    seen: dict[str, list] = {}

    def record(name):
        make = sharding.to_global
        seen[name] = []

        def keep(mesh, batch):
            seen[name].append(batch["tokens"])
            return make(mesh, batch)

        return keep

    for name, fields in (
        ("flat", {"batch_size": 8}),
        ("ramp", {"batch_size": 16, "batch_size_start": 8, "batch_size_ramp_rows": 16}),
    ):
        with monkeypatch.context() as m:
            m.setattr(sharding, "to_global", record(name))
            train(training(on_one, steps=7, eval_every=100, save_every=100, **fields), tmp_path / name)
    flat = np.concatenate(seen["flat"][:7])
    ramp = np.concatenate(seen["ramp"][:5])
    assert [len(b) for b in seen["ramp"][:5]].count(16) >= 1
    n = min(len(flat), len(ramp))
    np.testing.assert_array_equal(flat[:n], ramp[:n])


def test_evaluation_takes_no_more_rows_at_once_than_training(recipe, monkeypatch):
    cut, sizes = training(recipe, batch_size=32, grad_accum_steps=2, eval_rows=0), []
    rows = Stacked([{"targets": np.zeros(3, int), "weights": np.ones(3)}] * 40)
    tokenizer = types.SimpleNamespace(byte_lengths=lambda: np.ones(1))
    objective = Objective(None, None, None, likelihood="nll")
    evaluate = Evaluator(cut, objective, None, tokenizer, {"": (rows, as_is)}, sharding.make_mesh(cut.mesh), None)
    monkeypatch.setattr(evaluate, "count_bytes", lambda *_: 3)
    monkeypatch.setattr(
        evaluate, "step", lambda _, batch: sizes.append(len(batch["targets"])) or {"nll": (1.0, 1.0, 1.0)}
    )
    evaluate(None)
    assert sizes == [16, 16, 16]


def test_speed_is_that_of_the_steps_alone(recipe, monkeypatch):
    now, meter = [0.0], Throughput(recipe_flops_per_token(recipe))
    monkeypatch.setattr(steps.time, "monotonic", lambda: now[0])

    def pass_time(seconds):
        now[0] += seconds

    pass_time(7)  # the first step is compiled
    meter.count(100)
    pass_time(2)
    meter.count(100)
    with meter.paused():
        pass_time(30)
    pass_time(2)
    meter.count(100)
    pass_time(50)  # saving and plotting
    assert meter.tokens_per_second == 50


def test_patience_ends_a_run_and_the_best_checkpoint_stays(tmp_path):
    losses = [9.0, 3.0, 2.0, 2.5, 2.1, 1.0, 9.0]
    cfg = TrainConfig(steps=6, eval_every=1, save_every=1, max_to_keep=1, patience=2)
    for _ in range(2):  # it has ended: evaluated again, not gone on with
        assert run_steps(counting(tmp_path, cfg, held=losses.__getitem__)) == {"loss": 2.1}
        assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [2, 4]


def test_the_result_says_how_many_steps_were_made(whole, recipe, monkeypatch):
    """Not how many were allowed: patience may end a run before."""
    home, result = whole
    longer = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, steps=recipe.train.steps + 9))
    kept = (home / "recipe.json").read_text()
    monkeypatch.setattr(loop, "run_steps", lambda job: {"loss": 1.0})
    assert train(longer, home).steps == result.steps == recipe.train.steps
    (home / "recipe.json").write_text(kept)


def test_a_pause_before_the_clock_runs_is_not_taken_off_it(monkeypatch):
    """As where a resumed run owes an evaluation: it ends before the first step is counted."""
    now = [0.0]
    monkeypatch.setattr(steps, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    meter = Throughput(1.0)
    for pause, step, tokens in ((100, 50, 7), (30, 20, 60)):
        with meter.paused():
            now[0] += pause
        now[0] += step
        meter.count(tokens)
    assert meter.tokens_per_second == 60 / 20
