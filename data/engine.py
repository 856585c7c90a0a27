"""The parts of a long job, done one after another, by processes of this machine, or by Apache Beam; each is written down where
the work goes, and not done again by a call that comes after one that was cut off."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from bothways.data.config import DataConfig
from bothways.data.stores import AnyPath, Folder
from bothways.data.threads import one_thread
from bothways.errors import InputError

DONE = "parts"
"""The folder in which finished parts are written down until all are."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the work. Either files whose documents are dealt to splits by their number, from `first` on; or, without
    files, splits as the corpus has them."""

    number: int
    paths: tuple[AnyPath, ...] = ()
    first: int = 0
    splits: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Work:
    """What a worker must know."""

    cfg: DataConfig
    to: Folder
    key: str
    """Of the text and the tokenizer: what was done under another key is not used."""
    vocabulary: tuple[str, ...] = ()
    """The tokenizer's files, under DONE."""


Function = Callable[[Work, Part], dict[str, Any]]
Engine = Callable[[Function, Work, Sequence[Part]], list[dict[str, Any]]]
"""What a function gives for each part."""


@contextlib.contextmanager
def engine(workers: int = 1, beam: Sequence[str] = ()) -> Iterator[Engine]:
    """What does the parts of some jobs.

    Args:
      workers: processes; one: this one.
      beam: options of a runner of Apache Beam, which then does them, and says itself how many there are.

    Raises:
      InputError: where it is called: what is wrong with the text.
    """
    if beam:
        yield functools.partial(run, by=functools.partial(by_beam, options=beam))
    elif workers <= 1:
        yield functools.partial(run, by=lambda step, parts: list(map(step, parts)))
    else:  # spawned: a fork of a process whose libraries have threads may hang
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
            yield functools.partial(run, by=functools.partial(by_processes, pool=pool))


def by_processes(
    step: Callable[[Part], None], parts: Iterable[Part], *, pool: concurrent.futures.ProcessPoolExecutor
) -> None:
    try:
        list(pool.map(step, parts))
    except BrokenProcessPool as e:
        raise InputError(
            "a worker ended before its part was done, for want of memory perhaps: call it again with fewer --workers, and what is "
            "done stays; in a script of your own, call it below `if __name__ == '__main__':`"
        ) from e


def by_beam(step: Callable[[Part], None], parts: Iterable[Part], *, options: Sequence[str]) -> None:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
        _ = pipeline | beam.Create(list(parts)) | beam.Reshuffle() | beam.Map(step)


def check_beam() -> None:
    """Raises InputError where Apache Beam is not installed."""
    try:
        import apache_beam  # noqa: F401
    except ImportError as e:
        raise InputError("--beam needs Apache Beam: pip install 'bothways[prepare]'; --workers N does without") from e


def run(
    function: Function, work: Work, parts: Sequence[Part], *, by: Callable[[Callable[[Part], None], list[Part]], Any]
) -> list[dict[str, Any]]:
    """What a function gives for each part, by whoever does those that are not written down yet."""
    where = {part.number: f"{DONE}/{function.__name__}-{part.number:05d}.json" for part in parts}
    known = work.to.sizes(DONE)

    def is_done(part: Part) -> bool:
        name = where[part.number]
        return os.path.basename(name) in known and "result" in (finished(work, part, name) or {})

    if missing := [part for part in parts if not is_done(part)]:
        by(functools.partial(one, function, work), missing)
    done = []
    for part in parts:
        result = finished(work, part, where[part.number]) or {
            "error": f"part {part.number} was not finished; run it again"
        }
        if "error" in result:
            raise InputError(result["error"])
        done.append(result["result"])
    return done


def one(function: Function, work: Work, part: Part) -> None:
    """Does one part in a worker. What is wrong with the text is written down too, for the process that waits."""
    try:
        with one_thread():  # a worker is one core
            result = {"result": function(work, part)}
    except InputError as e:
        result = {"error": str(e)}
    name = f"{DONE}/{function.__name__}-{part.number:05d}.json"
    work.to.write(name, json.dumps({"key": key_of(work, part)} | result).encode())


def finished(work: Work, part: Part, name: str) -> dict | None:
    """What was written down of a part; None where it is of other work."""
    try:
        found = json.loads(work.to.read(name))
    except (InputError, json.JSONDecodeError):
        return None
    return found if found.get("key") == key_of(work, part) else None


def key_of(work: Work, part: Part) -> str:
    """What was done under another key is not used."""
    return f"{work.key} {part.number} {part.first} {','.join(part.splits)} {len(part.paths)}"
