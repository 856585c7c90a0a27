"""Which kind of device this process runs on."""

import glob
import importlib
import importlib.util
import os
import sys
from pathlib import Path

LARGE_PAGES = "glibc.malloc.hugetlb"
KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def asking_for_large_pages() -> str | None:
    """GLIBC_TUNABLES for a process that takes its memory in pages of 2 MiB; None where they are on or not to be had.

    Linux may give such pages only to those that ask, and glibc asks if this variable says so when the process starts. A
    step's scratch memory is handed out anew for each step: in pages of 4 KiB that can take a third of the step.
    """
    asked = os.environ.get("GLIBC_TUNABLES", "")
    if LARGE_PAGES in asked or not KERNEL.exists() or "[madvise]" not in KERNEL.read_text():
        return None
    return ":".join(filter(None, (asked, f"{LARGE_PAGES}=1")))


def with_large_pages() -> None:
    """Begin this process anew, as it was called, where it then gets large pages. Whoever has set the variable has decided."""
    if tunables := asking_for_large_pages():
        os.environ["GLIBC_TUNABLES"] = tunables
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


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
