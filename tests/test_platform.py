"""libtpu may be installed to plan with: where no TPU is attached, JAX is kept from looking for one. And large pages."""

import glob
import importlib.util
import os
import subprocess
import sys

import jax
import pytest

from bothways import platform
from bothways.platform import leave_absent_tpu_alone, with_large_pages


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


def test_the_command_line_begins_anew_with_large_pages_once(monkeypatch, tmp_path):
    begun = []
    monkeypatch.setattr(os, "execv", lambda program, argv: begun.append((program, argv)))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "bothways", "train"])
    monkeypatch.setattr(platform, "KERNEL", tmp_path / "enabled")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    with_large_pages()  # a kernel without them
    for unasked in ("[always] madvise never", "always madvise [never]"):
        platform.KERNEL.write_text(unasked + "\n")
        with_large_pages()
    assert not begun
    platform.KERNEL.write_text("always [madvise] never\n")
    with_large_pages()
    assert begun == [(sys.executable, [sys.executable, "-m", "bothways", "train"])]
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.check=0:glibc.malloc.hugetlb=1"
    with_large_pages()
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")  # somebody has decided
    with_large_pages()
    assert len(begun) == 1
