"""One process at a time: the second is refused, or waits; one that is killed lets go."""

import dataclasses
import signal
import subprocess
import sys

import pytest

from bothways.errors import Busy
from bothways.locks import locked
from bothways.train.loop import train

HOLDER = (
    "import sys, time; from pathlib import Path; from bothways.locks import locked\n"
    "with locked(Path(sys.argv[1]), 'holds'):\n    print('held', flush=True); time.sleep(60)"
)


@pytest.fixture
def holder():
    """Starts another process that holds a lock."""
    started = []

    def start(path):
        process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_the_second_is_refused_until_the_first_is_gone(tmp_path, holder):
    first = holder(tmp_path / "lock")
    refused = pytest.raises(Busy, match=rf"another process \(pid {first.pid} on .*\) writes here; wait until it ends")
    with refused, locked(tmp_path / "lock", "writes here", wait=0.1):
        raise AssertionError("two hold it")
    first.send_signal(signal.SIGKILL)
    with locked(tmp_path / "lock", "writes here", wait=10):
        pass


def test_two_runs_in_one_directory_are_refused(tiny_recipe, tmp_path, holder):
    recipe = dataclasses.replace(tiny_recipe, train=dataclasses.replace(tiny_recipe.train, steps=3))
    (tmp_path / "run").mkdir()
    first = holder(tmp_path / "run" / ".lock")
    with pytest.raises(Busy, match=rf"pid {first.pid} .* trains in {tmp_path}/run"):
        train(recipe, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]


def test_two_that_prepare_one_corpus_at_once_both_have_it(tmp_path):
    """Each begins with an empty cache; the one that comes second waits and finds what the first has made."""
    (tmp_path / "tale.txt").write_text("the dog sees the cat.\n" * 90)
    program = (
        "import sys; from bothways.data import corpora; from bothways.data.config import DataConfig\n"
        "corpus = corpora.load(DataConfig(corpus=sys.argv[1], cache=sys.argv[2]))\n"
        "print(sum(len(text) for _, text in corpus.documents('train')))"
    )
    for attempt in range(2):
        argv = [sys.executable, "-c", program, str(tmp_path / "tale.txt"), str(tmp_path / f"cache{attempt}")]
        both = [subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
        outs = [process.communicate() for process in both]
        assert [process.returncode for process in both] == [0, 0], outs
        assert outs[0][0] == outs[1][0]
