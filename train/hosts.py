"""Many processes as one run: JAX's multi-controller runtime, started by what the cluster, the environment or flags log.

Every process runs the same program on its own devices. Process 0 alone writes metrics, plots and the recipe; all take
part in checkpoints. The run directory is one that all of them see.
"""

import contextlib
import dataclasses
import itertools
import os
import signal
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from bothways.errors import InputError

A_DAY = 24 * 60 * 60
"""Longest wait, in seconds, for process 0 to prepare a corpus."""

_turns = itertools.count()


@dataclasses.dataclass(frozen=True)
class HostsConfig:
    """How processes find each other. Cloud TPU, GKE, Slurm and Open MPI say it themselves."""

    coordinator: str = ""
    """ADDRESS:PORT of process 0. Empty: JAX_COORDINATOR_ADDRESS, or what the cluster says, or a run of one process."""
    count: int = 0
    """Processes. 0: JAX_NUM_PROCESSES, or what the cluster says. 1: one process, whatever the cluster says."""
    index: int = -1
    """Number of this process, from 0. -1: JAX_PROCESS_ID, or what the cluster says."""
    heartbeat: int = 100
    """Seconds without a sign of life after which a process counts as lost and the run ends."""


def start(cfg: HostsConfig) -> None:
    """Join the other processes; does nothing where there are none, or where they are joined already.

    Raises:
      InputError: some of address, count and index are known, and not the others; or one is no such number.
    """
    if cfg.count < 0 or cfg.index < -1 or cfg.heartbeat < 1:
        raise InputError(
            f"hosts.count={cfg.count} must be 0 or more, hosts.index={cfg.index} -1 or more, and hosts.heartbeat="
            f"{cfg.heartbeat} at least 1 second"
        )
    if cfg.count == 1 or jax.distributed.is_initialized():
        return
    address = cfg.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    count = cfg.count or _number("JAX_NUM_PROCESSES", 0) or None
    index = cfg.index if cfg.index >= 0 else _number("JAX_PROCESS_ID", -1)
    given = {"coordinator_address": address or None, "num_processes": count, "process_id": index if index >= 0 else None}
    explicit = any(value is not None for value in given.values())
    try:
        with warnings.catch_warnings(action="ignore"):  # a pod without the package that finds its neighbours
            jax.distributed.initialize(
                **given, heartbeat_timeout_seconds=cfg.heartbeat, shutdown_timeout_seconds=cfg.heartbeat
            )
    except (ValueError, RuntimeError) as e:
        if explicit:
            raise InputError(
                f"cannot join the other processes with coordinator={address} count={count} index={index} ({e}); give "
                "--hosts.coordinator ADDRESS:PORT --hosts.count N --hosts.index I, the same but for I on every host"
            ) from e
        alone = isinstance(e, ValueError) or "before any JAX calls" in str(e)  # no cluster; or JAX runs already
        if not alone:
            raise


def _number(variable: str, otherwise: int) -> int:
    """What an environment variable says, if it is set to anything."""
    found = os.environ.get(variable) or str(otherwise)
    try:
        return int(found)
    except ValueError:
        raise InputError(f"{variable} is {found!r}; it must be a whole number") from None


NOISE = b"[Gloo]"
"""How each line begins that gloo writes of its peers, several per process, as if something were wrong."""


@contextlib.contextmanager
def stdout_for_results() -> Iterator[None]:
    """What libraries below Python write to file descriptor 1 meanwhile goes to standard error, gloo's lines nowhere."""
    sys.stdout.flush()
    kept, (out, into) = os.dup(1), os.pipe()
    os.dup2(into, 1)
    os.close(into)

    def forward() -> None:
        with open(out, "rb") as lines:
            for line in lines:
                if not line.startswith(NOISE):
                    os.write(2, line)

    thread = threading.Thread(target=forward, daemon=True)
    thread.start()
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)  # the last that writes to the pipe: the thread ends
        os.close(kept)
        thread.join(5)


@contextlib.contextmanager
def process_zero_first() -> Iterator[None]:
    """Process 0 goes through this block first: what it prepares on a shared disk the others find there."""
    turn = f"bothways first {next(_turns)}"  # every process comes here equally often
    if jax.process_index() > 0:
        _wait(turn)
    try:
        yield
    finally:
        if jax.process_index() == 0:
            _wait(turn)


def _wait(name: str) -> None:
    if jax.process_count() > 1:
        multihost.sync_global_processes(name, timeout=A_DAY, processes=set(range(jax.process_count())))


def assert_equal_across_hosts(values: dict[str, str]) -> None:
    """Raises InputError, on all processes, where they do not have the same values."""
    if jax.process_count() == 1:
        return
    mine = np.array([zlib.crc32(value.encode()) for value in values.values()], np.uint32)
    everyone = multihost_utils.process_allgather(mine)
    differ = [name for name, column in zip(values, everyone.T, strict=True) if len(set(column.tolist())) > 1]
    if differ:
        raise InputError(
            f"the {jax.process_count()} processes differ in {', '.join(differ)}; start all with the same arguments and "
            "the same files, on a disk that they share, or with --data.tokenizer FILE"
        )


def time_to_save(minutes: int, every: int) -> Callable[[int], bool]:
    """A function (step) -> whether `minutes` have gone by since it last returned True, or since now; 0: never.

    Of several processes the clock of process 0 counts, so that all save at the same step; they call it every `every` steps
    only, since each time is a small collective.
    """
    last = time.monotonic()

    def due(step: int) -> bool:
        nonlocal last
        if not minutes or (jax.process_count() > 1 and step % every):
            return False
        late = time.monotonic() - last >= 60 * minutes
        if jax.process_count() > 1:
            late = bool(multihost_utils.broadcast_one_to_all(np.array(late)))
        if late:
            last = time.monotonic()
        return late

    return due


class Abandoned(Exception):
    """A signal came while something was done that can be done again."""

    def __init__(self, number: int):
        super().__init__(f"signal {number}")
        self.number = number


@dataclasses.dataclass
class Preemption:
    """Whether to save and stop: called once a step by every process, (step) -> the signal that came, or 0."""

    several: bool = False
    came: int = 0
    _abandons: bool = False

    def __call__(self, step: int) -> int:
        if not self.several:
            return self.came
        return (self.came or signal.SIGTERM) if multihost_utils.reached_preemption_sync_point(step) else 0

    @contextlib.contextmanager
    def abandons(self) -> Iterator[None]:
        """What is done inside is left at once when a signal comes: a notice gives 30 s, and an evaluation may take longer.

        Several processes go on to its end, since all must leave together.

        Raises:
          Abandoned: a signal came.
        """
        self._abandons = not self.several
        try:
            yield
        finally:
            self._abandons = False

    def notice(self, number: int, _: Any) -> None:
        """What a signal does."""
        if number == signal.SIGINT:
            if self.came == signal.SIGINT:
                raise KeyboardInterrupt
            # Not through the console, which the signal may have interrupted.
            os.write(2, b"Ctrl-C: saves after this step and stops; once more ends it at once, unsaved\n")
        if self.several and number != signal.SIGTERM:
            os.kill(os.getpid(), signal.SIGTERM)  # which JAX shares with the other processes
        self.came = number
        if self._abandons:
            raise Abandoned(number)


@contextlib.contextmanager
def preemption_requested() -> Iterator[Preemption]:
    """Says at each step whether a signal came after which to save and stop.

    SIGTERM, Ctrl-C and a terminal that closes no longer end the process; a second Ctrl-C does. Of several processes any may
    get the signal; JAX's coordination service tells the others, and all stop at the same step.
    """
    found = Preemption(jax.process_count() > 1)
    numbers = [signal.SIGINT] if found.several else [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # else nohup, which ignores it, or whoever handles it
        numbers.append(signal.SIGHUP)
    try:
        before = {number: signal.signal(number, found.notice) for number in numbers}
    except ValueError:  # not in the main thread: whoever runs the thread handles signals
        yield found
        return
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
