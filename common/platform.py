"""Which kind of device this process runs on."""

import glob
import importlib.util
import os


def leave_absent_tpu_alone() -> None:
    """Keep JAX from looking for a TPU where libtpu is installed (to plan with) and none is attached.

    libtpu would write warnings to standard error. Where JAX_PLATFORMS is set, it stays.
    """
    attached = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    told = [name for name in ("TPU_NAME", "TPU_WORKER_ID", "TPU_ACCELERATOR_TYPE") if name in os.environ]
    if attached or told or importlib.util.find_spec("libtpu") is None:
        return
    import jax  # a second of start-up, which `bothways --help` can do without

    if jax.config.jax_platforms:
        return
    gpu = os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/dxg")
    jax.config.update("jax_platforms", "cuda,cpu" if gpu else "cpu")
