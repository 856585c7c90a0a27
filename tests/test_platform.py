"""libtpu may be installed to plan with: where no TPU is attached, JAX is kept from looking for one. And large pages."""

import glob
import importlib.util
import os
import subprocess
import sys

import jax
import pytest

from bothways import platform
from bothways.platform import leave_absent_tpu_alone, memory_tunables, multiplies_bfloat16, with_memory_tuned


@pytest.fixture
def chosen(monkeypatch):
    """What is chosen on a machine with libtpu and these files; None where nothing is."""

    def on(*files: str, libtpu: bool = True, platforms: str | None = None) -> str | None:
        found: list[str] = []
        monkeypatch.setattr(jax.config, "update", lambda name, value: found.append(value))
        monkeypatch.setattr(type(jax.config), "jax_platforms", platforms, raising=False)
        monkeypatch.setattr(glob, "glob", lambda pattern: [f for f in files if f.startswith(pattern.split("[")[0])])
        monkeypatch.setattr(os.path, "exists", lambda path: path in files)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: libtpu or None)
        for name in ("TPU_NAME", "TPU_WORKER_ID", "TPU_ACCELERATOR_TYPE"):
            monkeypatch.delenv(name, raising=False)
        leave_absent_tpu_alone()
        return found[0] if found else None

    return on


def test_without_a_tpu_jax_does_not_look_for_one(chosen):
    assert chosen() == "cpu"
    assert chosen("/dev/nvidiactl") == "cuda,cpu"


def test_a_tpu_and_a_choice_are_left_alone(chosen):
    assert chosen("/dev/accel0") is None
    assert chosen("/dev/vfio/0") is None
    assert chosen(libtpu=False) is None
    assert chosen(platforms="cpu") is None


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install '.[plan]'")
def test_nothing_is_said_on_standard_error():
    quiet = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_PLATFORMS", "TPU_"))}
    code = "import jax; from bothways.platform import leave_absent_tpu_alone as quiet; quiet(); print(jax.devices()[0].platform)"
    done = subprocess.run([sys.executable, "-c", code], env=quiet, capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("cpu", "gpu", "tpu")
    assert done.stderr == ""


def test_the_command_line_begins_anew_with_memory_tuned_once(monkeypatch, tmp_path):
    begun = []
    monkeypatch.setattr(os, "execv", lambda program, argv: begun.append((program, argv)))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "bothways", "sample"])
    monkeypatch.setattr(sys, "argv", ["bothways", "sample"])
    monkeypatch.setattr(platform, "KERNEL", tmp_path / "enabled")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    with_memory_tuned()  # a kernel without them
    for unasked in ("[always] madvise never", "always madvise [never]"):
        platform.KERNEL.write_text(unasked + "\n")
        with_memory_tuned()
    assert not begun
    platform.KERNEL.write_text("always [madvise] never\n")
    with_memory_tuned()
    assert begun == [(sys.executable, [sys.executable, "-m", "bothways", "sample"])]
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.check=0:glibc.malloc.hugetlb=1"
    monkeypatch.delenv("GLIBC_TUNABLES")
    assert memory_tunables(trains=True).split(":") == ["glibc.malloc.hugetlb=1", *platform.KEEPING]
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    with_memory_tuned()
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")  # somebody has decided
    with_memory_tuned()
    assert len(begun) == 1


def test_freed_memory_is_used_again_where_it_is_kept():
    """By a process with those settings: arrays freed and made again touch no new pages."""
    if platform.memory_tunables() is None and "hugetlb" not in os.environ.get("GLIBC_TUNABLES", ""):
        pytest.skip("Linux gives no large pages to those that ask")
    code = (
        "import resource, numpy as np\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "np.ones(2**25)\n"
        "before = faults()\n"
        "for _ in range(5): np.ones(2**25)\n"
        "print(faults() - before)"
    )
    new_pages = {}
    for kept in (False, True):
        tunables = ":".join(("glibc.malloc.hugetlb=1", *(platform.KEEPING if kept else ())))
        env = os.environ | {"GLIBC_TUNABLES": tunables}
        new_pages[kept] = int(
            subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True).stdout
        )
    assert new_pages[False] > 500, "of 256 MiB, five times, in pages of 2 MiB"
    assert new_pages[True] < 20


def test_a_cpu_multiplies_bfloat16_if_it_can_and_may(monkeypatch, tmp_path):
    monkeypatch.setattr(platform, "CPU", tmp_path / "cpuinfo")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    assert not multiplies_bfloat16()  # no such file: not Linux
    platform.CPU.write_text("flags : fpu avx2 avx512f\n")
    assert not multiplies_bfloat16()
    platform.CPU.write_text("flags : fpu avx2 avx512f avx512_bf16\n")
    assert multiplies_bfloat16()
    for most, may in (("AVX512", False), ("avx2", False), ("AMX", True), ("AVX512_BF16", True)):
        monkeypatch.setenv("XLA_FLAGS", f"--xla_cpu_max_isa={most} --xla_force_host_platform_device_count=8")
        assert multiplies_bfloat16() == may
