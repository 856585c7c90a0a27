"""Tiny programs run once: compiling them well takes ten times as long as running them badly."""

import jax
import pytest


@pytest.fixture(scope="package", autouse=True)
def compiled_without_optimization():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
