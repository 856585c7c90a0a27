"""How speed is measured: sides take turns, each in a process of its own; what is reported are medians over the rounds."""

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import time
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bothways.platform import memory_tunables

OURS = "bothways"
PACKAGES = ("jax", "flax", "torch", "transformers", "ctranslate2")
BEGIN, END = "<!-- table: written by python -m benchmarks -->", "<!-- end of table -->"
Maker = Callable[..., Mapping[str, Callable[..., Any]]]
"""Functions by name. "run" is what is timed; "warm", if there is one, goes before it."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One thing measured, on every side."""

    name: str
    unit: str
    amount: float
    """How many units one call of a side does; 0: the seconds themselves are reported."""
    seconds: dict[str, list[float]]
    """By side, round by round."""
    aim: str = ""
    note: str = ""

    def figure(self, side: str) -> float:
        """Median, in the row's unit."""
        return statistics.median(self.amount / s if self.amount else s for s in self.seconds[side])

    def ratios(self, side: str) -> list[float]:
        """How many times faster ours was than this side, round by round."""
        return [theirs / ours for ours, theirs in zip(self.seconds[OURS], self.seconds[side], strict=True)]


@dataclasses.dataclass(frozen=True)
class Setting:
    """How rows are to be measured."""

    home: Path
    """Where runs, published directories and caches are made, and found again."""
    tiny: bool = False
    """Sizes at which everything runs in seconds and no figure means anything."""
    rounds: int = 5
    peers: bool = True
    """False: our own sides only, which need no other package."""

    def side(self, make: Maker, *arguments: Any, ours: bool = False) -> Any:
        """An object with the functions that `make(*arguments)` returns; they run in a process of its own, unless `tiny`.

        Args:
          ours: the process has its memory as `bothways` on the command line has it.
        """
        if self.tiny:
            return types.SimpleNamespace(**make(*arguments), close=lambda: None)
        return Apart(make, arguments, memory_tunables() if ours else None)


class Apart:
    """Functions in another process. Calling one waits for its result; what it raises is raised here, as text."""

    def __init__(self, make: Maker, arguments: tuple = (), tunables: str | None = None):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        before = os.environ.get("GLIBC_TUNABLES")
        try:
            if tunables:
                os.environ["GLIBC_TUNABLES"] = tunables
            self._process.start()
        finally:
            os.environ.pop("GLIBC_TUNABLES", None)
            if before is not None:
                os.environ["GLIBC_TUNABLES"] = before
        theirs.close()
        for name in self._receive():
            setattr(self, name, functools.partial(self._call, name))

    def _call(self, name: str, *arguments: Any) -> Any:
        self._pipe.send((name, arguments))
        return self._receive()

    def _receive(self) -> Any:
        try:
            done, value = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"the process of a side ended with exit code {self._process.exitcode}") from None
        if not done:
            raise RuntimeError(f"in the process of a side:\n{value}")
        return value

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def _serve(pipe: Any, make: Maker, arguments: tuple) -> None:
    """Make the functions, then answer for them."""
    try:
        functions = make(*arguments)
        pipe.send((True, list(functions)))
        while True:
            name, given = pipe.recv()
            pipe.send((True, functions[name](*given)))
    except EOFError:
        pass  # who asked has gone
    except Exception:
        pipe.send((False, traceback.format_exc()))


def alternate(sides: Mapping[str, Any], rounds: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, list]:
    """Seconds of every side's `run`, round by round: A B C, A B C, ... A round before them, in which programs compile, is
    not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, side in sides.items():
            if hasattr(side, "warm"):
                side.warm()
            began = clock()
            side.run()
            if turn:
                seconds[name].append(clock() - began)
    return seconds


def threads() -> int:
    """Cores that this process may use; every side is given all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> str:
    """The processor by its name, and how many cores of it there are here."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{threads()} cores of {names[0] if names else platform.machine()}" if info.exists() else platform.processor()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


def record(row: Row) -> dict[str, Any]:
    """A row as JSON: what was measured, and where and when."""
    found = dataclasses.asdict(row) | {"figures": {side: row.figure(side) for side in row.seconds}}
    if OURS in row.seconds:
        found["faster"] = {side: statistics.median(row.ratios(side)) for side in row.seconds if side != OURS}
    return found | {"machine": machine(), "versions": versions(), "date": datetime.date.today().isoformat()}


def keep(path: Path, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add records to a file; one that is there under the same name is replaced. Returns all of them."""
    found = {r["name"]: r for r in (json.loads(path.read_text()) if path.exists() else [])}
    found |= {r["name"]: r for r in records}
    path.write_text(json.dumps(list(found.values()), indent=1) + "\n")
    return list(found.values())


def shown(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def table(records: Sequence[dict[str, Any]]) -> str:
    """Records as Markdown: a line for each peer of each row; and below, on what and when they were measured."""
    lines = ["| what | ours | beside it | how many times faster (each round) | aim |", "|---|---|---|---|---|"]
    for r in records:
        row = Row(**{f.name: r[f.name] for f in dataclasses.fields(Row)})
        ours = f"{shown(row.figure(OURS))} {row.unit}"
        for i, side in enumerate(s for s in row.seconds if s != OURS):
            ratios = row.ratios(side)
            spread = f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})"
            first = (row.name, ours) if i == 0 else ("", "")
            beside = f"{side}: {shown(row.figure(side))}"
            lines.append(f"| {' | '.join((*first, beside, spread, row.aim if i == 0 else ''))} |")
    notes = [f"{r['name']}: {r['note']}" for r in records if r["note"]]
    places: dict[str, list[str]] = {}
    for r in records:
        where = f"{r['machine']}; {', '.join(f'{k} {v}' for k, v in r['versions'].items())}; {r['date']}"
        places.setdefault(where, []).append(r["name"])
    devices = [where if len(places) == 1 else f"{where}: {', '.join(names)}" for where, names in places.items()]
    return "\n".join([*lines, "", *(f"- {text}." for text in [*notes, *devices])])


def write_table(page: Path, records: Sequence[dict[str, Any]]) -> None:
    """Put the table between its two marks in a page."""
    before, rest = page.read_text().split(BEGIN)
    after = rest.split(END)[1]
    page.write_text(f"{before}{BEGIN}\n{table(records)}\n{END}{after}")
