"""Several processes are one run: the same losses, one end for all, and a checkpoint that any other number goes on from."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import time

import pytest

from bothways.recipes import Recipe
from bothways.train.loop import train
from tests import forks
from tests.conftest import HANGS, QUICK, on_one_device

STEPS, SAVE = 120, 20


@pytest.fixture(scope="module")
def recipe(tiny_recipe) -> Recipe:
    """Long enough to be stopped twice on the way."""
    every = {"steps": STEPS, "save_every": SAVE, "eval_every": STEPS, "eval_rows": 8, "tracker": "none"}
    return dataclasses.replace(tiny_recipe, train=dataclasses.replace(tiny_recipe.train, **every))


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory) -> list[float]:
    """The losses of one process that nobody interrupts."""
    home = tmp_path_factory.mktemp("alone")
    with on_one_device():
        train(recipe, home / "run")
    return losses(home / "run")


def losses(home) -> list[float]:
    """Of every step, in order."""
    rows = [json.loads(line) for line in (home / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def bothways():
    """What stands for `python -m bothways`."""
    with forks.server() as argv:
        yield argv


class Processes:
    """A run by `count` processes of one device each; each executes the lines `first` before anything else."""

    def __init__(self, bothways: list[str], count: int, recipe: Recipe, home, *flags: str, first: str = ""):
        path = home.parent / "tiny.py"
        (home.parent / "tiny.json").write_text(recipe.to_json())
        path.write_text(
            f"{first}\nfrom pathlib import Path\nfrom bothways.recipes import Recipe\n"
            f"recipes = {{'tiny': Recipe.from_json(Path({str(home.parent / 'tiny.json')!r}).read_text())}}\n"
        )
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        env = os.environ | {"JAX_NUM_PROCESSES": str(count), "XLA_FLAGS": QUICK}  # one device
        argv = [*bothways, "train", str(path), "--workdir", str(home), *flags]
        argv += ["--hosts.coordinator", f"localhost:{port}", "--hosts.heartbeat", "30"]
        self.logs = [home.parent / f"{home.name}-{count}-{index}.log" for index in range(count)]
        self.results = home.parent / f"{home.name}-{count}.out"
        self.all = []
        for index, log in enumerate(self.logs):
            with log.open("w") as err, self.results.open("a") as out:
                mine = env | {"JAX_PROCESS_ID": str(index)}
                self.all.append(subprocess.Popen(argv, env=mine, stdout=out, stderr=err))

    def reach(self, home, step: int) -> None:
        """Wait until this step is in the metrics."""
        path = home / "metrics.jsonl"
        while not path.exists() or f'"step": {step},' not in path.read_text():
            assert all(p.poll() is None for p in self.all), self.said()
            time.sleep(0.02)

    def ends(self) -> list[int]:
        return [process.wait(HANGS) for process in self.all]

    def said(self) -> str:
        return "\n".join(log.read_text()[-2000:] for log in self.logs)


def test_four_then_two_then_one(recipe, alone, bothways, tmp_path):
    home = tmp_path / "run"
    four = Processes(bothways, 4, recipe, home, "--mesh.data", "2", "--mesh.fsdp", "2")
    four.reach(home, 3)
    four.all[2].send_signal(signal.SIGTERM)
    assert four.ends() == [143] * 4, four.said()
    (stopped,) = (int(path.name) for path in (home / "checkpoints").iterdir())
    assert all(f"stopped by SIGTERM at step {stopped}" in log.read_text() for log in four.logs)
    assert losses(home) == pytest.approx(alone[:stopped], rel=1e-4)
    assert four.results.read_text() == ""
    assert not any("[Gloo]" in log.read_text() for log in four.logs)

    two = Processes(bothways, 2, recipe, home, "--mesh.tensor", "2")  # both hold every row, and half of every head
    saved = (stopped // SAVE + 1) * SAVE
    two.reach(home, saved + 3)
    two.all[1].send_signal(signal.SIGKILL)
    assert two.ends() == [1, -signal.SIGKILL], two.said()
    assert "another process of this run has gone" in two.logs[0].read_text()
    assert losses(home) == pytest.approx(alone[: len(losses(home))], rel=1e-3)

    train(recipe, home)  # on eight devices of one process
    assert losses(home) == pytest.approx(alone, rel=1e-3)


CANNOT_READ = """
import os
from bothways import checkpoints
if os.environ["JAX_PROCESS_ID"] == "2":
    read = checkpoints.ocp.CheckpointManager.restore
    def restore(self, step, *args, **kwargs):
        if step == 40:
            raise ValueError("DATA_LOSS: this process finds half of it")
        return read(self, step, *args, **kwargs)
    checkpoints.ocp.CheckpointManager.restore = restore
"""


def test_what_one_of_four_cannot_read_none_restores(recipe, bothways, tmp_path):
    """Each reads for itself, then they agree: nobody waits in a read for one that has failed, and all take step 20."""
    recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, steps=40, eval_every=40))
    home = tmp_path / "run"
    with on_one_device():
        train(recipe, home)
    longer = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, steps=60, eval_every=60))
    four = Processes(bothways, 4, longer, home, "--mesh.data", "2", "--mesh.fsdp", "2", first=CANNOT_READ)
    assert four.ends() == [0] * 4, four.said()
    said = [log.read_text() for log in four.logs]
    assert all("checkpoint 40 is damaged" in text for text in said)
    assert "resumed at step 20" in said[0]
    assert "this process finds half of it" in said[2]
    assert (home / "unreadable-checkpoints" / "40" / "params").is_dir()
    rows = losses(home)
    assert len(rows) == 60
