"""What a run writes besides checkpoints: traces, trackers' metrics, and checkpoints by the clock."""

import dataclasses
import gzip
import json
import types

import pytest

from bothways.config import TrainConfig
from bothways.errors import InputError
from bothways.train import hosts, trackers
from bothways.train.loop import train
from bothways.train.steps import run_steps
from tests.train.jobs import counting


def test_a_checkpoint_by_the_clock_as_well_as_by_steps(tmp_path, monkeypatch):
    """A clock that goes on by 25 seconds a step: a minute has gone by at every third."""
    clock = iter(range(0, 10_000, 25))
    monkeypatch.setattr(hosts, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    cfg = TrainConfig(steps=8, eval_every=8, save_every=5, save_every_minutes=1, max_to_keep=9, tracker="none")
    run_steps(counting(tmp_path, cfg))
    saved = {int(d.name) for d in (tmp_path / "checkpoints").iterdir() if d.name.isdigit()}
    assert saved >= {5, 8}
    assert saved - {5, 8}  # by the clock
    assert len(saved) < 8


def test_no_clock_where_none_is_wanted():
    due = hosts.time_to_save(0, 1)
    assert not any(due(step) for step in range(5))


def test_a_trace_that_perfetto_opens(tmp_path):
    run_steps(counting(tmp_path, TrainConfig(steps=6, eval_every=6, tracker="none"), profile=2))
    (found,) = (tmp_path / "profile").rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(found.read_bytes()))["traceEvents"]
    numbers = {event["args"].get("step_num") for event in events if event.get("name") == "train_step"}
    assert {int(number) for number in numbers if number} == {4, 5}
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))  # XProf's


def test_a_run_that_is_too_short_for_its_trace_says_so(tiny_recipe, tmp_path, capsys):
    run_steps(counting(tmp_path / "run", TrainConfig(steps=3, eval_every=3, tracker="none"), profile=2))
    assert "no trace" in capsys.readouterr().err
    assert not (tmp_path / "run" / "profile").exists()
    with pytest.raises(InputError, match="--profile is -1"):
        train(tiny_recipe, tmp_path / "other", profile=-1)


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_made(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: None)
    recipe = dataclasses.replace(tiny_recipe, train=dataclasses.replace(tiny_recipe.train, tracker="wandb"))
    with pytest.raises(InputError, match="needs wandb, which is not installed: pip install wandb"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


METRICS = [(1, {"loss": 2.5}), (2, {"loss": 2.25, "eval_loss": 2.0})]


def test_mlflow_goes_on_with_its_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for step, metrics in METRICS:
        tracker = trackers.MLflow(tmp_path, start=0)
        tracker.add(step, metrics)
        tracker.close()
    client = mlflow.MlflowClient()
    run = json.loads((tmp_path / "mlflow.json").read_text())["id"]
    assert [(m.step, m.value) for m in client.get_metric_history(run, "loss")] == [(1, 2.5), (2, 2.25)]
    assert client.get_run(run).data.metrics["eval_loss"] == 2.0


def test_wandb_goes_on_with_its_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    kept = []
    for step, metrics in METRICS:
        tracker = trackers.WandB(tmp_path, start=0)
        tracker.add(step, metrics)
        assert tracker.run.step == step
        tracker.close()
        kept.append(tracker.run.id)
    assert kept[0] == kept[1]
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
