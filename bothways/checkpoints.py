"""Checkpoints of a run, through orbax: kept, read by all processes together, put aside where they cannot be read.

Nothing is deleted because it could not be read. A read that fails is one of three things:

cut short    a part is missing or altered, which no second try heals: the checkpoint before is read instead
transient    the store does not answer: tried again, and again later by whoever started the run
the rest     no memory, no permission, another version of a library: the run stops and says what to do
"""

import contextlib
import functools
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from bothways.errors import CheckpointUnavailable, InputError
from bothways.files import write_whole

T = TypeVar("T")

WAITS = (1.0, 5.0, 25.0)
"""Seconds before each further try, where a store does not answer."""
NEWEST = 64
"""So many checkpoints are looked at, from the newest on."""

_TRANSIENT = re.compile(
    r"^(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED)\b|HTTP\D{0,20}(429|50[0234])\b"
    r"|\b(429 Too Many|500 Internal|502 Bad|503 Service|504 Gateway)"
)
# tensorstore's words for a file that ends early, is gone or fails its checksum, and orbax's for an item that is gone.
_CUT_SHORT = re.compile(
    r"^(DATA_LOSS|NOT_FOUND|OUT_OF_RANGE|FAILED_PRECONDITION: Error reading)\b|was not found in the checkpoint|CRC-32C"
)


def selection(held_out: dict[str, float]) -> float:
    """What the best checkpoint has least of: `selection` where an evaluation says it, else the held-out loss."""
    return held_out.get("selection", held_out["loss"])


def checkpoint_manager(home: Path, *, keep: int | None = None, read_only: bool = False) -> ocp.CheckpointManager:
    """Orbax's manager of a run's checkpoints: the newest `keep` and the best on held-out items.

    One that is read-only reads for this process alone and waits for no other, so that one process may fail to read while
    the others do not hang; `restore_latest_readable` brings them together.
    """
    policy, mine = None, jax.process_index()
    if keep is not None:
        policies = ocp.checkpoint_managers
        best = policies.BestN(get_metric_fn=selection, reverse=True, n=1, keep_checkpoints_without_metrics=False)
        policy = policies.AnyPreservationPolicy([policies.LatestN(keep), best])
    alone = ocp.options.MultiprocessingOptions(
        primary_host=mine, active_processes={mine}, barrier_sync_key_prefix=f"process {mine}"
    )
    options = ocp.CheckpointManagerOptions(
        best_fn=selection,  # or orbax does not write the metrics down, and a resumed run has forgotten its best
        best_mode="min",
        preservation_policy=policy,
        read_only=read_only,
        create=not read_only,
        step_prefix=None,
        save_root_metadata=False,
        multiprocessing_options=alone if read_only else ocp.options.MultiprocessingOptions(),
    )
    home = home if "://" in str(home) else home.absolute()
    with _without_warnings():
        return ocp.CheckpointManager(home / "checkpoints", options=options, item_names=("params", "train", "meta"))


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Orbax warns, when a manager is made, of options that are set on purpose."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def best_step(manager: ocp.CheckpointManager) -> int | None:
    """The step whose evaluation was best, of those that are kept; None where none was evaluated."""
    known = {step: selection(held) for step in manager.all_steps() if (held := manager.metrics(step))}
    return min(known, key=known.__getitem__, default=None)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what caused it: orbax wraps the errors of tensorstore in bare exceptions."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def is_transient(error: BaseException) -> bool:
    """Whether a retry may help."""

    def may_heal(e: BaseException) -> bool:
        code = getattr(e, "code", None)
        answered = isinstance(code, int) and (code == 429 or code >= 500)
        return answered or isinstance(e, ConnectionError | TimeoutError) or bool(_TRANSIENT.search(str(e)))

    return any(may_heal(e) for e in _chain(error))


def is_cut_short(error: BaseException) -> bool:
    """Whether a restore failed because part of the checkpoint is missing or altered, which no second try heals."""
    kinds = (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError, EOFError)
    return any(isinstance(e, kinds) or bool(_CUT_SHORT.search(str(e.args[0] if e.args else ""))) for e in _chain(error))


def _lacks_memory(error: BaseException) -> bool:
    return any(isinstance(e, MemoryError) or "RESOURCE_EXHAUSTED" in str(e) for e in _chain(error))


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"


def _restored(restore: Callable[[int], T], step: int, where: Any) -> T | Exception:
    """What `restore` makes of a step, or the error of a checkpoint that was cut short.

    Raises:
      CheckpointUnavailable: the store does not answer, there is no memory or no permission; nothing was changed.
    """
    for wait in (*WAITS, None):
        try:
            return restore(step)
        except InputError:
            raise
        except Exception as e:  # orbax raises bare exceptions; what is not known below is raised again
            if is_transient(e) and wait is not None:
                time.sleep(wait)
                continue
            if is_cut_short(e) and not is_transient(e) and not _lacks_memory(e):
                return e
            found = f"checkpoint {step} in {where} cannot be read ({_first_line(e)}); nothing was deleted. "
            if is_transient(e):
                raise CheckpointUnavailable(found + "Run the same command again when the store answers") from e
            if _lacks_memory(e):
                raise CheckpointUnavailable(
                    found + "Free some memory, take a machine with more, or spread the run with --mesh.fsdp"
                ) from e
            if isinstance(e, OSError):
                raise CheckpointUnavailable(
                    found + "Make its files readable, or move that checkpoint away, and run the same command again"
                ) from e
            e.add_note(
                found + "If other versions of jax or orbax wrote it, install those; else move that checkpoint away to go "
                "on from the one before, and run the same command again"
            )
            raise
    raise AssertionError("the last try returns or raises")


def _gathered(values: np.ndarray) -> np.ndarray:
    """The values of every process: [...] int32 -> [processes, ...]."""
    return values[None] if jax.process_count() == 1 else np.asarray(multihost_utils.process_allgather(values))


def restore_latest_readable(
    manager: ocp.CheckpointManager, restore: Callable[[int], T], log: Callable[[str], None]
) -> tuple[int, T] | None:
    """The newest checkpoint that every process can read. One that was cut short is passed over, with a warning.

    All processes try the same steps in the same order, and take what all of them could read.

    Args:
      restore: reads a step on this process, waiting for no other.

    Returns:
      its step and what `restore` made of it; None if there is no checkpoint at all.

    Raises:
      InputError: there are checkpoints, and all were cut short.
      CheckpointUnavailable: one cannot be read now.
    """
    mine = sorted(manager.all_steps(), reverse=True)[:NEWEST]
    steps = sorted(set(_gathered(np.array(mine + [-1] * (NEWEST - len(mine)), np.int32)).flatten().tolist()) - {-1})[::-1]
    for step in steps:
        missing = FileNotFoundError("it is not there")
        found = _restored(restore, step, manager.directory) if step in mine else missing
        votes = _gathered(np.array([not isinstance(found, Exception)], np.int32))[:, 0]
        if votes.all():
            return step, found  # type: ignore[return-value]
        reason = _first_line(found) if isinstance(found, Exception) else f"on process {int(votes.argmin())}"
        log(f"checkpoint {step} is damaged ({reason}); falling back to the one before")
        del found
    if steps:
        raise InputError(
            f"none of the checkpoints {steps} in {manager.directory} can be read"
            + (" by all processes; they must share its disk" if jax.process_count() > 1 else "")
        )
    return None


def restore_step(manager: ocp.CheckpointManager, restore: Callable[[int], T], step: int | None) -> tuple[int, T]:
    """A certain checkpoint: its step and what `restore` made of it.

    Raises:
      InputError: it is not kept, or was cut short; says which are there.
      CheckpointUnavailable: it cannot be read now.
    """
    kept = sorted(manager.all_steps())
    if step is None and kept:
        raise InputError(f"no checkpoint in {manager.directory} was evaluated, so none is the best; name one of {kept}")
    if step not in kept:
        raise InputError(f"there is no checkpoint {step} in {manager.directory}; there are {kept}")
    found = _restored(restore, step, manager.directory)
    if isinstance(found, Exception):
        raise InputError(f"checkpoint {step} in {manager.directory} is damaged ({_first_line(found)}); there are {kept}")
    return step, found


def add_metrics(home: Path, step: int, metrics: dict[str, float]) -> None:
    """Give a checkpoint that was written without an evaluation its metrics, where orbax has them; managers see them after
    `reload`. All else stays as it is: the checkpoint may be the only one."""
    into = home / "checkpoints" / str(step) / "metrics"
    into.mkdir(exist_ok=True)
    write_whole(into / "metrics", json.dumps(metrics))


def put_aside(home: Path, step: int) -> Path:
    """Move a checkpoint that cannot be read out of the way of the run, which writes that step again."""
    target = home / "unreadable-checkpoints" / str(step)
    while target.exists():
        target = target.with_name(f"{target.name}-again")
    target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):  # another process saw it, and this one does not
        (home / "checkpoints" / str(step)).rename(target)
    return target


@functools.partial(jax.jit, donate_argnums=0)
def _towards(mean: Any, tree: Any, share: float) -> Any:
    return jax.tree.map(lambda m, x: m + share * (x - m), mean, tree)


def running_mean(trees: Iterator[Any]) -> Any:
    """The mean of trees of arrays; two are held at a time."""
    mean = next(trees)
    for count, tree in enumerate(trees, 2):
        mean = _towards(mean, tree, 1 / count)
    return mean
