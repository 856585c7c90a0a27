"""What SIGTERM and Ctrl-C do to a run: it saves and stops, and the exit code says which of them came."""

import dataclasses
import os
import signal

import pytest

import bothways
from bothways import cli
from bothways.errors import Stopped
from bothways.train import hosts
from bothways.train.loop import train
from bothways.train.report import Reporter


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


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
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
