"""With XLA's optimisations, which the other tests leave out for their compile time: what they prove holds for users too."""

import dataclasses
import json
import os
import random
import subprocess
import sys

import jax
import numpy as np
import pytest

from bothways import rundir
from bothways.config import MeshConfig
from bothways.sample.decode import Row
from bothways.sample.sampling_params import SamplingParams
from tests.sample.conftest import gpt  # noqa: F401  (a fixture)
from tests.train.test_step import close, run


@pytest.fixture(scope="module")
def wide(tiny):
    """Widths that the devices divide, of no compiled program of another test."""
    fields = {"vocab_size": 40, "d_model": 32, "n_heads": 4, "n_kv_heads": 4, "d_head": 5, "d_ff": 24, "n_layers": 1}
    return dataclasses.replace(tiny, dropout_residual=0.2, **fields).resolved()


def test_sharded_equals_unsharded(wide, eight_devices, compiled_well):
    one = run(wide, MeshConfig(), eight_devices[:1])
    many = run(wide, MeshConfig(2, 2, 2, 1), eight_devices)
    close(many[0].params, one[0].params)
    close(many[1], one[1])


def test_a_cache_continues_as_a_pass_over_everything_does(gpt, compiled_well):  # noqa: F811
    row = Row([3, 7, 5], jax.random.key(1))
    gpt.decoder.generate(gpt.params, [row], SamplingParams.make(greedy=True), 9)
    expected = gpt.logprobs([3, 7, 5, *row.tokens])[2:-1]
    np.testing.assert_array_equal(row.tokens, expected.argmax(axis=1))
    np.testing.assert_allclose(row.logprobs, expected.max(axis=1), atol=1e-4)


ATTEMPTS = """
import json, os, signal, sys, threading
import bothways.train.loop as loop
from bothways.recipes import Recipe
from bothways.train import steps

recipe, attempts = Recipe.from_json(sys.argv[1]), json.loads(sys.argv[2])

def attempt(home, step, seconds):
    report = steps._report
    def reporting(reporter, meter, done, *rest):
        if done == step:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return report(reporter, meter, done, *rest)
    steps._report = reporting
    loop.train(recipe, home)

for home, step, seconds in attempts:  # each in a process of its own, which has all imports
    child = os.fork()
    if not child:
        attempt(home, step, seconds)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_run_killed_at_three_moments_ends_as_if_nothing_had_happened(tiny_recipe, tmp_path):
    """At any of them a checkpoint may be half written. Weights are the same bit for bit."""
    cfg = {"steps": 60, "eval_every": 30, "save_every": 5, "eval_rows": 8, "max_to_keep": 2, "tracker": "none"}
    recipe = dataclasses.replace(
        tiny_recipe,
        model=dataclasses.replace(tiny_recipe.model, n_layers=1),
        train=dataclasses.replace(tiny_recipe.train, **cfg),
    )
    rng, whole, killed = random.Random(7), str(tmp_path / "whole"), str(tmp_path / "killed")
    moments = [(killed, step, rng.random() / 20) for step in sorted(rng.sample(range(11, 50), 3))]
    attempts = json.dumps([(whole, 0, 0), *moments, (killed, 0, 0)])
    as_users = ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    done = subprocess.run(
        [sys.executable, "-c", ATTEMPTS, recipe.to_json(), attempts],
        env={name: value for name, value in os.environ.items() if name not in as_users},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["0", "-9", "-9", "-9", "0"], done.stderr
    assert done.stderr.count("resumed at step") == 3
    a, b = (jax.device_get(rundir.load_run(tmp_path / home, print).params) for home in ("killed", "whole"))
    jax.tree.map(np.testing.assert_array_equal, a, b)
