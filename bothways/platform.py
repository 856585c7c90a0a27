"""What this process runs on, and how it asks for memory."""

import glob
import importlib
import importlib.util
import os
import re
import sys
from pathlib import Path

LARGE_PAGES = "glibc.malloc.hugetlb"
KEEPING = ("glibc.malloc.mmap_max=0", f"glibc.malloc.trim_threshold={2**40}", "glibc.malloc.arena_max=1")
"""All memory lies in one heap, from which nothing goes back to the system before the process ends."""
TRAINING = ("train", "finetune", "compare")
KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")

CPU = Path("/proc/cpuinfo")
WITH_BFLOAT16 = ("AVX512_BF16", "AMX", "AMX_FP16")
"""Values of XLA's flag xla_cpu_max_isa that leave those instructions in."""


def memory_tunables(trains: bool = True) -> str | None:
    """GLIBC_TUNABLES for a process that takes its memory in pages of 2 MiB and, if it trains, keeps what it frees; None where the
    variable says something of pages already, or Linux does not give them to those that ask.

    A step's scratch memory, a gigabyte and more, is handed out anew for each step. If it comes from the system each time, Linux
    first writes zeros over it: in pages of 4 KiB that can take a third of a step, in large ones still a tenth.
    """
    asked = os.environ.get("GLIBC_TUNABLES", "")
    if LARGE_PAGES in asked or not KERNEL.exists() or "[madvise]" not in KERNEL.read_text():
        return None
    return ":".join(filter(None, (asked, f"{LARGE_PAGES}=1", *(KEEPING if trains else ()))))


def with_memory_tuned() -> None:
    """Begin this process anew, as it was called, with `memory_tunables`. Whoever has set large pages on or off has decided."""
    if tunables := memory_tunables(any(verb in TRAINING for verb in sys.argv[1:2])):
        os.environ["GLIBC_TUNABLES"] = tunables
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def multiplies_bfloat16() -> bool:
    """Whether this machine's CPU has instructions for products of bfloat16 (AVX512-BF16), and XLA may use them."""
    most = re.search(r"--xla_cpu_max_isa=(\w+)", os.environ.get("XLA_FLAGS", ""))
    if most and most[1].upper() not in WITH_BFLOAT16:
        return False
    return CPU.exists() and "avx512_bf16" in CPU.read_text()


def leave_absent_tpu_alone() -> None:
    """Keep JAX from looking for a TPU where libtpu is installed (to plan with) and none is attached.

    libtpu would write warnings to standard error. Where JAX_PLATFORMS is set, it stays.
    """
    attached = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    named = [name for name in ("TPU_NAME", "TPU_WORKER_ID", "TPU_ACCELERATOR_TYPE") if name in os.environ]
    if attached or named or importlib.util.find_spec("libtpu") is None:
        return
    import jax  # a second of start-up, which `bothways --help` can do without

    if jax.config.jax_platforms:
        return
    gpu = os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/dxg")
    jax.config.update("jax_platforms", "cuda,cpu" if gpu else "cpu")


def without_grpc() -> None:
    """Import gcsfs, where it is installed, so that it does not find out over gRPC what kind of bucket it has before it: that
    waits for a minute where nobody is logged in. It reads the variable that says so when it is imported, and only then."""
    name = "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"
    if "gcsfs" in sys.modules or name in os.environ or importlib.util.find_spec("gcsfs") is None:
        return
    os.environ[name] = "false"
    try:
        importlib.import_module("gcsfs")
    finally:
        del os.environ[name]
