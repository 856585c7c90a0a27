"""The arithmetic of the benchmarks, and that our own side of each runs. What they measure is no test's business."""

import functools
import itertools
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from benchmarks import embedding, generation, gpu, scoring, start, training
from benchmarks.harness import OURS, Apart, Row, Setting, alternate, keep, record, table, write_table


def test_sides_take_turns_and_the_first_round_is_not_counted():
    said, ticks = [], itertools.count()  # a clock that advances by one at every look
    sides = {name: types.SimpleNamespace(run=functools.partial(said.append, name)) for name in "ab"}
    sides["b"].warm = lambda: said.append("b is warm")
    seconds = alternate(sides, 2, lambda: next(ticks))
    assert said == ["a", "b is warm", "b"] * 3
    assert seconds == {"a": [1, 1], "b": [1, 1]}


def numbers(*given: int) -> dict:
    import os  # of the other process

    return {"run": lambda: sum(given), "where": os.getpid, "asked": lambda name: os.environ.get(name), "wrong": dict.pop}


def test_a_side_has_a_process_of_its_own(tmp_path):
    side = Apart(numbers, (2, 3), "glibc.malloc.hugetlb=1")
    assert side.run() == 5
    assert side.where() != os.getpid()
    assert side.asked("GLIBC_TUNABLES") == "glibc.malloc.hugetlb=1"
    assert os.environ.get("GLIBC_TUNABLES") != "glibc.malloc.hugetlb=1"
    with pytest.raises(RuntimeError, match="dict.pop"):
        side.wrong()
    side.close()
    here = Setting(tmp_path, tiny=True).side(numbers, 2, 3)
    assert (here.run(), here.where()) == (5, os.getpid())


ROW = Row("speed", "tokens/s", 12, {OURS: [2.0, 3.0, 6.0], "peer": [4.0, 3.0, 24.0]}, "2 x")


def test_figures_are_medians_and_ratios_are_taken_round_by_round():
    assert (ROW.figure(OURS), ROW.figure("peer")) == (4.0, 3.0)
    assert ROW.ratios("peer") == [2.0, 1.0, 4.0]
    assert record(ROW)["faster"] == {"peer": 2.0}
    assert Row("start", "s", 0, {OURS: [2.0, 5.0, 3.0]}).figure(OURS) == 3.0


def test_the_table_is_written_between_its_marks_and_rows_replace_their_like(tmp_path):
    page, results = tmp_path / "README.md", tmp_path / "results.json"
    page.write_text("before\n<!-- table: written by python -m benchmarks -->\nold\n<!-- end of table -->\nafter\n")
    keep(results, [record(ROW)])
    slower = Row("speed", "tokens/s", 12, {OURS: [4.0], "peer": [2.0]})
    other = Row("start", "s", 0, {OURS: [2.0]})
    records = keep(results, [record(slower), record(other)])
    assert [r["name"] for r in json.loads(results.read_text())] == ["speed", "start"]
    write_table(page, records)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| speed | 3 tokens/s | peer: 6 | **0.50** (0.50 to 0.50) |" in table(records)
    assert table(records) in text


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Setting:
    return Setting(tmp_path_factory.mktemp("benchmarks"), tiny=True, rounds=1, peers=False)


@pytest.mark.parametrize(
    "measure", [training.gpt2, training.bert_base, generation.one, scoring.pll, scoring.ragged, embedding.short]
)
def test_our_own_side_runs(tiny, measure):
    row = measure(tiny)
    assert row.amount > 0
    assert all(len(times) == 1 and times[0] > 0 for times in row.seconds.values())


def test_a_start_is_timed_until_the_first_loss(tmp_path):
    say = "import sys; print('compiling', file=sys.stderr); print({!r}, file=sys.stderr, flush=True)"
    assert start.seconds_until_loss([sys.executable, "-c", say.format("step 1: loss 3.0")], {}) > 0
    with pytest.raises(RuntimeError, match="printed no loss: compiling"):
        start.seconds_until_loss([sys.executable, "-c", say.format("done")], {})


def test_a_gpu_row_tells_figures_as_json(capsys):
    gpu.train_ours("gpt2", [(2, 16)], tiny=True, steps=1)
    output = json.loads(capsys.readouterr().out)
    assert output["what"] == "gpt2 training"
    assert output["tokens_per_second"] > 0
    assert output["mfu"] is None  # the peak of a CPU is not known
    gpu.tell_training("a side", "gpt2", "NVIDIA H200", 989e6, 4, 250, 2.0)
    assert json.loads(capsys.readouterr().out)["mfu"] == pytest.approx(0.0005)


def test_a_side_that_fails_is_told_with_its_code(tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "python").chmod(0o755)
    out, script = tmp_path / "gpu.jsonl", Path(gpu.__file__).with_name("gpu.sh")
    done = subprocess.run(
        ["bash", script, out], env=os.environ | {"PYTHON": str(tmp_path / "python")}, capture_output=True
    )
    assert done.returncode == 1
    output = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(output) == 5
    assert {side["failed"] for side in output} == {3}
