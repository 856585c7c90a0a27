"""With XLA's optimisations, which the other tests leave out for their compile time: what they prove holds for users too.

tests/test_kill.py runs so as well.
"""

import dataclasses

import jax
import numpy as np
import pytest

from bothways.config import MeshConfig
from bothways.sample.decode import Row
from bothways.sample.sampling_params import SamplingParams
from tests.sample.conftest import gpt  # noqa: F401  (a fixture)
from tests.train.test_step import close, run

pytestmark = pytest.mark.usefixtures("compiled_well")


@pytest.fixture(scope="module")
def wide(tiny):
    """Widths that 8 devices divide, of no compiled program of another test."""
    fields = {"vocab_size": 40, "d_model": 32, "n_heads": 8, "n_kv_heads": 8, "d_head": 5, "d_ff": 24, "n_layers": 2}
    return dataclasses.replace(tiny, **fields).resolved()


def test_sharded_equals_unsharded(wide, eight_devices):
    one = run(wide, MeshConfig(), eight_devices[:1])
    many = run(wide, MeshConfig(2, 2, 2, 1), eight_devices)
    for a, b in zip(many, one, strict=True):
        close(getattr(a, "params", a), getattr(b, "params", b))


def test_a_cache_continues_as_a_pass_over_everything_does(gpt):  # noqa: F811
    row = Row([3, 7, 5], jax.random.key(1))
    gpt.decoder.generate(gpt.params, [row], SamplingParams.make(greedy=True), 9)
    expected = gpt.logprobs([3, 7, 5, *row.tokens])[2:-1]
    np.testing.assert_array_equal(row.tokens, expected.argmax(axis=1))
    np.testing.assert_allclose(row.logprobs, expected.max(axis=1), atol=1e-4)
