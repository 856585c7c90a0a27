"""Lines for whoever watches: that nobody does, ends nothing; and what it means that standard output has no reader."""

import contextlib
import os
import sys

import pytest

import bothways
from bothways import cli
from bothways.log import log
from bothways.train.report import Reporter


@pytest.fixture
def nobody():
    """A pipe whose reader has gone, as text, of line buffers as standard error has them."""
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w", buffering=1)
    yield stream
    with contextlib.suppress(BrokenPipeError):
        stream.close()


def test_training_goes_on_where_nobody_reads_its_log(nobody, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "stderr", nobody)
    reporter = Reporter(tmp_path, 2, 0, True, "none")
    for step in (1, 2):
        reporter.log(step, {"loss": 1.0}, "loss 1")
        log("something else")
    reporter.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    print("result")
    assert capfd.readouterr().out == "result\n"
    sys.stderr.write("what Python writes at its end")  # the place of the broken one was taken
    sys.stderr.flush()


def fails(_):
    raise BrokenPipeError(32, "Broken pipe")


def test_only_of_standard_output_a_broken_pipe_is_the_end(nobody, monkeypatch, capfd):
    monkeypatch.setattr(cli, "find_command", lambda _: fails)
    assert bothways.main(["train", "x"]) == 1  # the connection of a store, say: nothing is done
    assert "BrokenPipeError" in capfd.readouterr().err
    monkeypatch.setattr(sys, "stdout", nobody)
    assert bothways.main(["train", "x"]) == 0
