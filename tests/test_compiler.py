"""Compiler options by chip and width."""

import types

import jax
import numpy as np
import pytest

from bothways.compiler import compiler_options, once_options


def mesh(kind: str, platform: str = "tpu"):
    """As much of a mesh as the options ask of it."""
    device = types.SimpleNamespace(platform=platform, device_kind=kind)
    return types.SimpleNamespace(devices=np.array([[device]]))


@pytest.mark.parametrize(
    ("kind", "width", "given", "vmem"),
    [
        ("TPU v5", 5120, 0, "65536"),
        ("TPU v5 lite", 4096, 0, "65536"),
        ("TPU v5 lite", 1600, 0, None),
        ("TPU v4", 5120, 0, None),
        ("TPU v9", 5120, 0, None),
        ("TPU v5", 5120, 98304, "98304"),
        ("TPU v5 lite", 1600, 32768, "32768"),
    ],
)
def test_wide_models_get_more_vmem_where_there_is_some(kind, width, given, vmem):
    options = compiler_options(mesh(kind), width, given)
    assert options.pop("xla_jf_spmd_threshold_for_windowed_einsum_mib") == "1000000"
    assert options == ({"xla_tpu_scoped_vmem_limit_kib": vmem} if vmem else {})


def test_other_devices_get_no_options():
    assert compiler_options(mesh("cpu", "cpu"), 5120, 98304) is None


def test_a_cpu_compiles_what_runs_once_in_less_time():
    assert once_options(mesh("cpu", "cpu")) == {"xla_backend_optimization_level": 1}
    assert once_options(mesh("TPU v5")) is None
    y = jax.jit(lambda key: jax.random.normal(key, (7,)), compiler_options=once_options(mesh("cpu", "cpu")))
    np.testing.assert_array_equal(
        y(jax.random.key(0)), jax.jit(lambda key: jax.random.normal(key, (7,)))(jax.random.key(0))
    )
