"""What a restore that fails does: it deletes nothing, tries again what may heal, and says what to do."""

import dataclasses
import gc
import io
import json
import shutil
import sys
import types

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import bothways
from bothways import checkpoints, rundir
from bothways.cli import is_leftover
from bothways.errors import CheckpointUnavailable, InputError
from bothways.formats import FORMAT
from bothways.train.loop import train


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(checkpoints, "WAITS", (0.0, 0.0))


def manager(*steps):
    """A manager that knows steps and, as the real one would, has no way to delete them here."""
    return types.SimpleNamespace(all_steps=lambda: list(steps), directory="there")


def failing(errors: dict[int, list[Exception]]):
    """restore(step), which raises that step's errors one after the other and then gives the step's name."""

    def restore(step):
        if errors.get(step):
            raise errors[step].pop(0)
        return f"state {step}"

    return restore


@pytest.mark.parametrize(
    "error", [ConnectionError("reset"), OSError("HTTP 503 from the bucket"), ValueError("UNAVAILABLE: x")]
)
def test_a_store_that_does_not_answer_is_asked_again_and_then_nothing_is_passed_over(error):
    log: list[str] = []
    assert checkpoints.restore_latest_readable(manager(3, 6), failing({6: [error] * 2}), log.append) == (6, "state 6")
    with pytest.raises(CheckpointUnavailable, match=r"checkpoint 6 in there cannot be read .*nothing was deleted.*again"):
        checkpoints.restore_latest_readable(manager(3, 6), failing({6: [error] * 3}), log.append)
    assert log == []


def test_no_memory_is_not_damage():
    with pytest.raises(CheckpointUnavailable, match="nothing was deleted. Free some memory"):
        checkpoints.restore_latest_readable(manager(3, 6), failing({6: [MemoryError()]}), print)


def test_an_error_that_nobody_expected_is_not_swallowed():
    with pytest.raises(TypeError, match="changed library") as e:
        checkpoints.restore_latest_readable(manager(3, 6), failing({6: [TypeError("changed library")]}), print)
    assert "nothing was deleted" in e.value.__notes__[0]


@pytest.mark.parametrize(
    "error", [FileNotFoundError("d/0"), json.JSONDecodeError("cut", "{", 1), ValueError("DATA_LOSS: CRC-32C checksum")]
)
def test_a_checkpoint_that_was_cut_short_is_passed_over(error):
    log: list[str] = []
    assert checkpoints.restore_latest_readable(manager(3, 6), failing({6: [error]}), log.append) == (3, "state 3")
    assert "checkpoint 6 is damaged" in log[0]
    with pytest.raises(InputError, match=r"none of the checkpoints \[6, 3\]"):
        checkpoints.restore_latest_readable(manager(3, 6), failing({6: [error], 3: [error]}), log.append)


def test_what_one_process_cannot_read_none_takes(monkeypatch):
    """This process reads all. The other does not see step 9, which is new, and cannot read step 6."""
    votes = iter([False, False, True])

    def gathered(mine):
        if len(mine) > 1:
            return np.stack([mine, np.where(mine == 9, -1, mine)])
        return np.stack([mine, np.array([next(votes)])])

    monkeypatch.setattr(checkpoints, "_gathered", gathered)
    log: list[str] = []
    assert checkpoints.restore_latest_readable(manager(3, 6, 9), failing({}), log.append) == (3, "state 3")
    assert log[1] == "checkpoint 6 is damaged (on process 1); falling back to the one before"


def test_a_wrapped_error_counts_as_what_caused_it():
    """Orbax raises a bare Exception from what tensorstore raised."""

    def wrapped(cause):
        error = Exception("Encountered error while reading array index: (slice(0, 503, 1),)")
        error.__cause__ = cause
        return error

    assert checkpoints.is_cut_short(wrapped(ValueError("DATA_LOSS: Error decoding")))
    assert checkpoints.is_transient(wrapped(ValueError("UNAVAILABLE: HTTP response code: 503")))
    assert not checkpoints.is_transient(wrapped(None))  # 503 is the size of an array here
    assert not checkpoints.is_cut_short(wrapped(MemoryError()))


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A checkpoint, and what reads it."""
    home = tmp_path_factory.mktemp("kept")
    tree = {"a": jnp.arange(4099.0), "b": {"c": jnp.ones((3, 5))}}
    with checkpoints.checkpoint_manager(home, keep=1) as writer:
        writer.save(7, args=ocp.args.Composite(params=ocp.args.StandardSave(tree)))
        writer.wait_until_finished()

    def read(home):
        with checkpoints.checkpoint_manager(home, read_only=True) as reader:
            items = ocp.args.Composite(params=ocp.args.StandardRestore(tree))
            return checkpoints._restored(lambda step: reader.restore(step, args=items)["params"], 7, home)

    np.testing.assert_array_equal(read(home)["a"], tree["a"])
    return home, read


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")  # as the command line does
@pytest.mark.parametrize("how", ["gone", "half", "empty"])
def test_every_file_of_a_checkpoint_may_be_cut_short(kept, tmp_path, how, monkeypatch):
    """Each is read all the same, if it was not needed, or found damaged; no other error comes out, and what comes later is not shown."""
    home, read = kept
    later: list[BaseException] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: later.append(unraisable.exc_value))
    files = sorted(p.relative_to(home) for p in (home / "checkpoints" / "7" / "params").rglob("*") if p.is_file())
    damaged = []
    for number, file in enumerate(files):
        copy = tmp_path / str(number)
        shutil.copytree(home, copy)
        data = (copy / file).read_bytes()
        (copy / file).unlink() if how == "gone" else (copy / file).write_bytes(data[: len(data) // 2 * (how == "half")])
        found = read(copy)
        damaged += [file.name] if isinstance(found, Exception) else []
    gc.collect()
    assert len(damaged) >= 2
    assert not [error for error in later if not is_leftover(error)]


def test_a_running_mean_is_the_mean():
    trees = [{"x": jnp.full(3, value)} for value in (1.0, 2.0, 6.0)]
    np.testing.assert_allclose(checkpoints.running_mean(iter(trees))["x"], 3.0, rtol=1e-6)


def test_an_unreadable_checkpoint_is_kept(tmp_path):
    for text in ("first", "second"):
        (tmp_path / "checkpoints" / "6").mkdir(parents=True)
        (tmp_path / "checkpoints" / "6" / "x").write_text(text)
        assert (checkpoints.put_aside(tmp_path, 6) / "x").read_text() == text
    assert len(list((tmp_path / "unreadable-checkpoints").iterdir())) == 2
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_certain_checkpoint_or_the_best_is_loaded(tiny_recipe, tmp_path, capsys, monkeypatch):
    home = tmp_path / "run"
    cfg = dataclasses.replace(tiny_recipe.train, steps=6, eval_every=2, save_every=2, max_to_keep=1)
    train(dataclasses.replace(tiny_recipe, train=cfg), home)
    with checkpoints.checkpoint_manager(home, read_only=True) as kept:
        steps = sorted(kept.all_steps())
        best = min(steps, key=lambda step: kept.metrics(step)["loss"])
    assert bothways.load(home).run.step == steps[-1]
    assert bothways.load(home, step="best").run.step == best
    assert bothways.load(home, step=steps[0]).run.step == steps[0]
    for wrong, message in (("5", "there is no checkpoint 5 in"), ("last", "--step is 'last'; it must be newest, best")):
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(b"the dog")))
        assert bothways.main(["score", str(home), "--step", wrong]) == 2
        assert message in capsys.readouterr().err.replace("\n", " ")


def test_what_a_run_was_tuned_for_has_a_format_version(tmp_path):
    task = rundir.TaskInfo("mood", "classify", ("glad", "sad"), 8, ("accuracy",))
    rundir.write_task(tmp_path, task)
    assert rundir.read_task(tmp_path) == task
    kept = json.loads((tmp_path / "task.json").read_text())
    assert kept.pop("format") == FORMAT
    (tmp_path / "task.json").write_text(json.dumps(kept))  # from before there were versions
    assert rundir.read_task(tmp_path) == task
    (tmp_path / "task.json").write_text(json.dumps({**kept, "format": FORMAT + 1}))
    with pytest.raises(InputError, match="install a newer one"):
        rundir.read_task(tmp_path)
