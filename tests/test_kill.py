"""A run killed at any moment goes on from its last whole checkpoint, and ends as if nothing had happened."""

import os
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np

from bothways import rundir

ARGS = (
    "--model.n-layers 1 --model.d-model 16 --model.n-heads 2 --model.context-length 16 --data.vocab-size 320 --train.batch-size 8 "
    "--train.steps 120 --train.eval-every 60 --train.save-every 5 --train.eval-rows 8 --optimizer.warmup-steps 1"
).split()


def start(text_file, cache_dir, home):
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # one device
    argv = [sys.executable, "-m", "bothways", "train", "shakespeare_gpt", "--data.corpus", str(text_file)]
    argv += ["--data.cache", str(cache_dir), "--workdir", str(home), *ARGS]
    return subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_sigkill_three_times(text_file, cache_dir, tmp_path):
    whole = start(text_file, cache_dir, tmp_path / "whole")
    assert whole.wait() == 0, whole.stderr.read()
    home, rng, kills = tmp_path / "killed", random.Random(), 0
    while kills < 3:
        run = start(text_file, cache_dir, home)
        had = len(list((home / "checkpoints").glob("*"))) if home.exists() else 0
        while run.poll() is None and len(list(home.glob("checkpoints/*"))) <= had and not _moved(home, run):
            time.sleep(0.05)
        time.sleep(rng.random() / 2)
        if run.poll() is not None:
            break  # it was faster than we were: fewer kills, the same end
        run.send_signal(signal.SIGKILL)
        run.wait()
        kills += 1
    assert kills > 0
    last = start(text_file, cache_dir, home)
    assert last.wait() == 0, last.stderr.read()
    a, b = (jax.device_get(rundir.load_run(h, print).params) for h in (home, tmp_path / "whole"))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def _moved(home, run) -> bool:
    """Whether this attempt has written a metric yet."""
    return (home / "metrics.jsonl").exists() and (home / "metrics.jsonl").stat().st_mtime > time.time() - 0.5
