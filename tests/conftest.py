"""Eight fake CPU devices, and a compilation cache between runs. Set before JAX is imported."""

import os
from pathlib import Path

CACHE = Path(__file__).parent.parent / ".jax_cache"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"

import dataclasses

import jax
import pytest

from model.config import TransformerConfig

# Every size another prime (or a product of one with what it must divide), so that a swapped axis cannot pass.
TINY = TransformerConfig(
    vocab_size=37,
    context=23,
    n_layers=3,
    d_model=22,
    n_heads=2,
    d_head=6,
    d_ff=26,
    init="fan_in",
    init_std=0.5,
    init_residual="same",
    dtype="float32",
).resolved()


@pytest.fixture(scope="session")
def tiny() -> TransformerConfig:
    """A transformer small enough to compile in a second."""
    return TINY


@pytest.fixture
def tiny_with(tiny):
    """The tiny configuration with some fields replaced."""
    return lambda **fields: dataclasses.replace(tiny, **fields).resolved()


@pytest.fixture(scope="session")
def eight_devices() -> list:
    devices = jax.devices()
    assert len(devices) == 8, "the tests need 8 fake CPU devices; conftest.py must be imported before jax"
    return devices
