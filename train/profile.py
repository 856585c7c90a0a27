"""A trace of some training steps, for XProf and Perfetto."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
from etils import epath

from bothways.log import log

FIRST = 3
"""Steps before the trace begins: the first compiles, and those after it may wait for that."""


class Trace:
    """What the devices did in `steps` steps of this process, in RUN/profile.

    Written where process 0 is, of the devices that it has. `xprof --logdir RUN/profile` opens it, and ui.perfetto.dev its
    file perfetto_trace.json.gz.
    """

    def __init__(self, home: Path, steps: int, start: int, active: bool):
        self.home, self.first, self.last = home / "profile", start + FIRST, start + FIRST + steps
        self.wanted, self.into, self.done = active and steps > 0, "", start

    def begin(self, step: int, state: Any) -> None:
        """Before a step."""
        if self.wanted and step == self.first:
            jax.block_until_ready(state)
            self.into = tempfile.mkdtemp(prefix="bothways-profile-")
            jax.profiler.start_trace(self.into, create_perfetto_trace=True)

    def end(self, done: int, state: Any) -> None:
        """After so many steps."""
        self.done = done
        if self.into and done == self.last:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Writes what there is: also where the run ends before all steps are traced."""
        if self.wanted and self.done <= self.first:
            log(f"no trace: it begins after step {self.first}, and the run ended at step {self.done}")
        if not self.into:
            return
        jax.profiler.stop_trace()
        for file in Path(self.into).rglob("*"):
            if file.is_file():
                to = epath.Path(self.home) / file.relative_to(self.into)
                to.parent.mkdir(parents=True, exist_ok=True)
                to.write_bytes(file.read_bytes())
        shutil.rmtree(self.into)
        self.into, self.wanted = "", False
        log(f"a trace of steps {self.first + 1} to {self.done} is in {self.home}: xprof --logdir {self.home}")
