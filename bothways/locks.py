"""Locks on files: one process at a time, until it ends, however it ends."""

import contextlib
import errno
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from bothways.errors import Busy

UNSUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
"""Errors of file systems that have no locks; there nothing is locked."""


@contextlib.contextmanager
def locked(path: Path, what: str, *, wait: float = math.inf) -> Iterator[None]:
    """Holds the lock on a file, which is made if need be and stays.

    Args:
      what: what another process that has the lock is doing, for the error.
      wait: seconds to wait for it.

    Raises:
      Busy: another process has it, still.
    """
    if fcntl is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        until = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                if time.monotonic() >= until:
                    file.seek(0)
                    raise Busy(
                        f"another process ({file.read().strip() or 'unknown'}) {what}; wait until it ends, or stop it"
                    ) from e
                time.sleep(min(0.2, max(0.0, until - time.monotonic())))
            except OSError as e:
                if e.errno not in UNSUPPORTED:
                    raise
                break
            else:
                file.seek(0)
                file.truncate()
                file.write(f"pid {os.getpid()} on {os.uname().nodename}\n")
                file.flush()
                break
        yield
