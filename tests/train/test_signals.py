"""What SIGTERM and Ctrl-C do to a run: it saves and stops, and the exit code says which of them came."""

import dataclasses
import os
import signal

import pytest

import bothways
from bothways import checkpoints, cli
from bothways.config import TrainConfig
from bothways.errors import Stopped
from bothways.train import hosts
from bothways.train.loop import train
from bothways.train.report import Reporter
from bothways.train.steps import run_steps
from tests.train.jobs import counting


@pytest.fixture(autouse=True)
def usual_handlers():
    """As at a terminal: under nohup, or in the background of a script, Python starts with some of them ignored."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_second_ctrl_c_ends_at_once(capfd):
    def twice():
        with hosts.preemption_requested() as stop_at:
            assert stop_at(1) == 0
            os.kill(os.getpid(), signal.SIGINT)
            assert stop_at(2) == signal.SIGINT
            assert "saves after this step" in capfd.readouterr().err
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        twice()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_of_several_processes_ctrl_c_becomes_the_notice_that_all_get(monkeypatch):
    """JAX's coordination service shares SIGTERM with the other processes."""
    monkeypatch.setattr(hosts.jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts.multihost_utils, "reached_preemption_sync_point", lambda step: step == 5)
    came = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append(1))
    try:
        with hosts.preemption_requested() as stop_at:
            os.kill(os.getpid(), signal.SIGINT)
            assert came == [1]
            assert [stop_at(step) for step in (4, 5)] == [0, signal.SIGINT]
    finally:
        signal.signal(signal.SIGTERM, before)


CUT = TrainConfig(steps=4, eval_every=2, save_every=100, tracker="none", max_to_keep=1)


def stopped_in_an_evaluation(home, number=signal.SIGTERM):
    """A run that a signal came to in its evaluation at step 2."""
    seen = []

    def held(step):
        seen.append(step)
        os.kill(os.getpid(), number)
        seen.append("the rest of the evaluation")

    with pytest.raises(Stopped, match="at step 2; saved in") as stopped:
        run_steps(counting(home, CUT, held=held))
    assert stopped.value.signal == number
    assert seen == [2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_does_not_wait_for_the_end_of_an_evaluation(tmp_path, number):
    stopped_in_an_evaluation(tmp_path, number)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["2"]


def test_a_checkpoint_that_lacks_its_evaluation_gets_it_and_is_not_written_again(tmp_path, monkeypatch):
    """It may be the only one: a run that is killed meanwhile must find it."""
    stopped_in_an_evaluation(tmp_path)
    kept = tmp_path / "checkpoints" / "2" / "params" / "manifest.ocdbt"
    before = kept.stat().st_ino
    monkeypatch.setattr(checkpoints.ocp.CheckpointManager, "delete", lambda *_: pytest.fail("deleted"))
    losses = {2: 1.0, 4: 2.0}
    assert run_steps(counting(tmp_path, CUT, held=losses.__getitem__)) == {"loss": 2.0}
    assert kept.stat().st_ino == before
    with checkpoints.checkpoint_manager(tmp_path, read_only=True) as manager:
        assert manager.metrics(2) == {"loss": 1.0}
        assert checkpoints.best_step(manager) == 2
    evaluations = [line for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if "eval_loss" in line]
    assert len(evaluations) == 2


def test_a_signal_in_the_evaluation_of_a_checkpoint_that_is_there(tmp_path):
    stopped_in_an_evaluation(tmp_path)
    stopped_in_an_evaluation(tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["2"]


def test_a_terminal_that_closes_stops_what_nohup_did_not_start():
    for handler, stops in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
        before = signal.signal(signal.SIGHUP, handler)
        try:
            with hosts.preemption_requested() as stop_at:
                os.kill(os.getpid(), signal.SIGHUP)
                assert bool(stop_at(1)) is stops
            assert signal.getsignal(signal.SIGHUP) == handler
        finally:
            signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("one_device")
def test_ctrl_c_saves(tiny_recipe, tmp_path, monkeypatch):
    rare = dataclasses.replace(tiny_recipe.train, steps=9, save_every=100, eval_every=100)
    write = Reporter.log

    def interrupted(self, step, *rest):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        write(self, step, *rest)

    monkeypatch.setattr(Reporter, "log", interrupted)
    with pytest.raises(Stopped, match="stopped by Ctrl-C at step 3; saved in") as stopped:
        train(dataclasses.replace(tiny_recipe, train=rare), tmp_path / "run")
    assert stopped.value.signal == signal.SIGINT
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["3"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_the_exit_code_says_which_signal_it_was(monkeypatch, number, code):
    def stopped(_):
        raise Stopped("saved", number)

    monkeypatch.setattr(cli, "find_command", lambda _: stopped)
    assert bothways.main(["train", "x"]) == code


def test_lines_of_gloo_are_left_out_of_standard_error(capfd):
    with hosts.stdout_for_results():
        os.write(1, b"[Gloo] Rank 0 is connected to 3 peer ranks.\nsomething else\n")
    os.write(1, b"result\n")
    out, err = capfd.readouterr()
    assert (out, err) == ("result\n", "something else\n")
