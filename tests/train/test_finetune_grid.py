"""A grid of fine-tunings: stopped and gone on with to the same answer, one candidate in memory, batches by length."""

import dataclasses
import os
import signal
import types
from pathlib import Path

import numpy as np
import pytest

from bothways import rundir
from bothways.config import FinetuneConfig
from bothways.data import task_batches
from bothways.errors import Diverged, InputError, Stopped
from bothways.train import finetune as grids
from bothways.train.finetune import finetune
from tests.train.bodies import body, changed, dog_task

pytestmark = pytest.mark.usefixtures("one_device")

GRID = FinetuneConfig(epochs=2, batch_size=16, learning_rates=(1e-2,), seeds=2)


def kept(home: Path) -> dict[str, object]:
    """What a run directory says, and its parameters."""
    files = {p.name: p.read_text() for p in (home / "recipe.json", home / "task.json")}
    return files | {"params": rundir.load_run(home, print).params}


def test_a_grid_that_is_stopped_goes_on_to_the_same_answer(tiny, tmp_path, monkeypatch):
    run = body("gpt", tiny)
    task, begun, stop = dog_task("classify", train=32), [], [(1, 3), (3, 1)]
    whole = finetune(run, task, tmp_path / "whole", GRID)
    training_batches = task_batches.training_batches

    def stopping(rows, sizes, batch_size, seed, step):
        for number, batch in enumerate(training_batches(rows, sizes, batch_size, seed, step), step):
            if stop and (len(begun), number) == stop[0]:
                stop.pop(0)
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    candidate = grids.candidate

    def counted(runner, home, *rest):
        if not (home / "result.json").exists():
            begun.append(home.name)
        return candidate(runner, home, *rest)

    monkeypatch.setattr(task_batches, "training_batches", stopping)
    monkeypatch.setattr(grids, "candidate", counted)
    home = tmp_path / "stopped"
    for _ in range(2):
        with pytest.raises(Stopped, match="saved in .*grid.*, run the same command to go on"):
            finetune(run, task, home, GRID)
        assert not (home / "recipe.json").exists()  # no run yet
    again = finetune(run, task, home, GRID)
    assert stop == []
    assert begun == ["0.01-0", "0.01-0", "0.01-1", "0.01-1", "scratch-0.01-0", "scratch-0.01-1"]
    assert again == dataclasses.replace(whole, run=str(home))
    first, second = kept(tmp_path / "whole"), kept(home)
    assert changed(first.pop("params"), second.pop("params")) == []
    assert first == second
    assert not list(home.rglob("grid/*/checkpoints"))
    assert finetune(run, task, home, GRID) == again  # what is complete is read, not trained
    assert len(begun) == 6
    with pytest.raises(InputError, match=r"another fine-tuning; .*\n  - epochs: 2 -> 3\n"):
        finetune(run, task, home, dataclasses.replace(GRID, epochs=3))


def test_checkpoints_of_two_candidates_are_kept_at_most(tmp_path, monkeypatch):
    """And of the one at hand."""
    values, most = iter([0.5, 0.7, 0.6, 0.6, 0.9, 0.9]), []

    def candidate(runner, home, rate, seed, pretrained):
        (home / "checkpoints").mkdir(parents=True)
        most.append(sorted(path.parent.name for path in tmp_path.rglob("checkpoints")))
        return {"validation": next(values), "test": {"accuracy": rate}, "step": 1}

    monkeypatch.setattr(grids, "candidate", candidate)
    runner = types.SimpleNamespace(
        cfg=dataclasses.replace(GRID, learning_rates=(0.1, 0.2, 0.3), seeds=2), lead="accuracy"
    )
    rate, results, best = grids.search(runner, tmp_path, pretrained=True)
    assert (rate, best.name, [r["test"]["accuracy"] for r in results]) == (0.3, "0.3-0", [0.3, 0.3])
    assert most == [["0.1-0"], ["0.1-0", "0.1-1"], ["0.1-1", "0.2-0"], ["0.1-1", "0.2-0", "0.2-1"], ["0.1-1", "0.3-0"],
                    ["0.1-1", "0.3-0", "0.3-1"]]  # fmt: skip
    assert [path.parent.name for path in tmp_path.rglob("checkpoints")] == ["0.3-0"]


# ---- batches by length ---------------------------------------------------------------------------------------------


def test_every_example_is_in_an_epoch_once_with_others_of_its_length():
    lengths = np.random.default_rng(0).integers(3, 97, 67 * 16)
    epochs = [task_batches.epoch_batches(lengths, 16, epoch, seed=3) for epoch in (0, 1)]
    for batches in epochs:
        assert batches.shape == (67, 16)
        assert sorted(batches.ravel()) == list(range(67 * 16))
        assert np.mean([np.ptp(lengths[batch]) for batch in batches]) < 10  # of 94, were they random
        assert abs(np.corrcoef(lengths[batches].mean(axis=1), np.arange(67))[0, 1]) < 0.4  # in random order
    assert (epochs[0] != epochs[1]).any()
    assert (task_batches.epoch_batches(lengths, 16, 1, seed=3) == epochs[1]).all()


def test_fewer_examples_than_a_batch_are_taken_again():
    (batch,) = task_batches.epoch_batches(np.array([3, 5, 7]), 7, 0, seed=0)
    assert sorted(np.bincount(batch)) == [2, 2, 3]


@pytest.mark.parametrize(
    ("lengths", "longest", "wanted"),
    [
        ([5] * 10, 24, [8]),
        ([5, 6, 7, 40] * 5, 64, [8, 40]),
        (list(range(1, 101)), 128, [32, 64, 104]),
        ([9] * 4, 11, [11]),
    ],
)
def test_a_handful_of_lengths_holds_all(lengths, longest, wanted):
    found = task_batches.batch_lengths(np.array(lengths), longest)
    assert found == wanted
    assert [task_batches.fitting(found, n) for n in (min(lengths), max(lengths))] == [found[0], found[-1]]


def test_a_scratch_baseline_that_diverges_costs_no_result(tiny, tmp_path, monkeypatch, capfd):
    search = grids.search

    def diverging(runner, grid, pretrained):
        if not pretrained:
            raise Diverged("no candidate had a finite loss")
        return search(runner, grid, pretrained)

    monkeypatch.setattr(grids, "search", diverging)
    cfg = dataclasses.replace(GRID, epochs=1, seeds=1)
    found = finetune(body("gpt", tiny), dog_task("classify", train=32), tmp_path / "x", cfg)
    assert set(found.baselines) == {"majority", "naive_bayes"}
    assert kept(tmp_path / "x")
    assert "from scratch no candidate had a finite loss" in capfd.readouterr().err
