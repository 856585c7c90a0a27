"""The one thread that owns the device. Requests wait for it in a bounded queue.

Texts that are written token by token share the slots of their run's pool (serve/slots.py). Everything else is a call: a
function of a loaded run and a list of items. Calls of one run that ask for the same are computed together, if they come
within a few milliseconds; where a call writes block by block, slots and other calls go on between its blocks.
"""

import collections
import dataclasses
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from bothways.errors import CheckpointUnavailable, InputError
from bothways.log import log
from bothways.sample.open import OpenModel
from bothways.serve.runs import Runs
from bothways.serve.slots import Generation

GATHER = 0.004
"""Seconds that a call waits for others like it, where the device is idle."""
MOST_ITEMS = 512
"""Items of calls that are computed together."""


class QueueFull(Exception):
    """More wait than the queue holds."""


class Gone(Exception):
    """Nobody waits for this call any more."""


class Unavailable(Exception):
    """A run cannot be loaded now; the message says why."""


@dataclasses.dataclass(eq=False)
class Call:
    """Items to compute with a run.

    `compute` is (model, items, between) -> results, one for each item. It may call `between()` now and then: others go on,
    and Gone is raised where nobody waits any more. Calls with the same `alike` (None: none) may be computed as one. Those
    that are not `short` write block by block, and short ones go on between their blocks.
    """

    run: str
    compute: Callable[[OpenModel, list[Any], Callable[[], None]], list[Any]]
    items: list[Any]
    alike: Any = None
    short: bool = True
    gone: Callable[[], bool] = lambda: False
    future: "Future[list[Any]]" = dataclasses.field(default_factory=Future)
    since: float = dataclasses.field(default_factory=time.monotonic)


@dataclasses.dataclass(eq=False)
class Writing:
    """A text to be written in a slot. `failed` is called where it cannot be, with the reason."""

    run: str
    generation: Generation
    failed: Callable[[Exception], None]


class Engine:
    """Owns the device.

    Args:
      queue: most requests that wait for a slot or for their call.
    """

    def __init__(self, runs: Runs, queue: int = 256):
        self.runs, self.queue = runs, queue
        self.tokens = 0
        self._waiting: collections.deque[Call | Writing] = collections.deque()
        self._writing: dict[int, Writing] = {}
        self._changed = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its present step."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join(timeout=30)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def busy_slots(self) -> int:
        return sum(one.pool.busy for one in list(self.runs.loaded.values()) if one.pool)

    def submit(self, *jobs: Call | Writing) -> None:
        """All of them, or none.

        Raises:
          QueueFull: others wait; later there is room.
          InputError: there is never room for so many.
        """
        if len(jobs) > self.queue:
            raise InputError(f"the request has {len(jobs)} texts, and the queue holds {self.queue}; send fewer at a time")
        with self._changed:
            if len(self._waiting) + len(jobs) > self.queue:
                raise QueueFull
            self._waiting.extend(jobs)
            self._changed.notify()

    # ---- the engine's thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._ended and not self._waiting and not self.busy_slots:
                    self._changed.wait()
                if self._ended:
                    return
            self._admit()
            working = self._step()
            self._compute(self._next_call(hurry=working))

    def _take(self, job: Call | Writing) -> None:
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def _admit(self) -> None:
        """Texts into free slots, first come first served within a run."""
        full: set[str] = set()
        with self._changed:
            texts = [job for job in self._waiting if isinstance(job, Writing)]
        for job in texts:
            if job.generation.gone():
                self._take(job)
                continue
            if job.run in full:
                continue
            try:
                pool = self.runs.get(job.run).pool
                assert pool is not None
                if not pool.free:
                    full.add(job.run)
                    continue
                self._take(job)
                self._writing[id(job.generation)] = job
                pool.add(job.generation)
            except Exception as e:  # the thread must outlive whatever a run does, such as running out of memory
                self._take(job)
                self._fail_pool(job.run, e)
                job.failed(self._reason(job.run, e))

    def _step(self) -> bool:
        """One step of every pool that has rows; whether there is one."""
        working = False
        for name, loaded in list(self.runs.loaded.items()):
            pool = loaded.pool
            if pool is None or not pool.busy:
                continue
            working = True
            try:
                pool.prefill(pool.piece)
                self.tokens += pool.step()
            except Exception as e:
                self._fail_pool(name, e)
            alive = {id(row) for row in pool.rows if row is not None}
            self._writing = {k: job for k, job in self._writing.items() if k in alive or job.run != name}
        return working

    def _fail_pool(self, name: str, error: Exception) -> None:
        loaded = self.runs.loaded.get(name)
        if loaded is None or loaded.pool is None:
            return
        for row in loaded.pool.reset():
            if (job := self._writing.pop(id(row), None)) is not None:
                job.failed(self._reason(name, error))

    def _reason(self, name: str, error: Exception) -> Exception:
        if isinstance(error, InputError | CheckpointUnavailable):
            return Unavailable(str(error))
        log(f"{name}: {type(error).__name__}: {error}")
        if "RESOURCE_EXHAUSTED" in str(error) or isinstance(error, MemoryError):
            return Unavailable(f"{name} ran out of memory; ask for less, or give the server fewer --slots")
        return error

    def _next_call(self, hurry: bool) -> list[Call]:
        """The call that has waited longest, with those like it; empty where there is none."""
        with self._changed:
            first = next((job for job in self._waiting if isinstance(job, Call)), None)
            if first is None:
                return []
            wait = first.since + GATHER - time.monotonic()
            if not hurry and first.alike is not None and wait > 0:
                self._changed.release()
                time.sleep(wait)
                self._changed.acquire()
            chosen, count = [first], len(first.items)
            for job in self._waiting:
                alike = isinstance(job, Call) and job is not first and first.alike is not None
                if alike and (job.run, job.alike) == (first.run, first.alike) and count + len(job.items) <= MOST_ITEMS:
                    chosen.append(job)
                    count += len(job.items)
            for job in chosen:
                self._waiting.remove(job)
        return chosen

    def _between(self, calls: list[Call]) -> Callable[[], None]:
        def between() -> None:
            if all(call.gone() for call in calls):
                raise Gone
            self._admit()
            self._step()
            if not calls[0].short:
                with self._changed:
                    quick = next((job for job in self._waiting if isinstance(job, Call) and job.short), None)
                if quick is not None:
                    self._take(quick)
                    self._compute([quick])

        return between

    def _compute(self, calls: list[Call]) -> None:
        # From here on a future cannot be cancelled: its client may go away at any time, and it must still take a result.
        calls = [
            call
            for call in calls
            if not call.gone() and (call.future.running() or call.future.set_running_or_notify_cancel())
        ]
        if not calls:
            return
        items = [item for call in calls for item in call.items]
        try:
            loaded = self.runs.get(calls[0].run)
        except Exception as e:
            for call in calls:
                call.future.set_exception(self._reason(call.run, e))
            return
        loaded.calls += 1
        try:
            found = calls[0].compute(loaded.model, items, self._between(calls))
        except Gone as e:
            for call in calls:
                call.future.set_exception(e)
        except Exception as e:
            if len(calls) > 1:  # the fault of one is not that of the others
                for call in calls:
                    self._compute([call])
            else:
                bad_input = isinstance(e, InputError)
                calls[0].future.set_exception(e if bad_input else self._reason(calls[0].run, e))
        else:
            for call in calls:
                call.future.set_result(found[: len(call.items)])
                found = found[len(call.items) :]
        finally:
            loaded.calls -= 1
