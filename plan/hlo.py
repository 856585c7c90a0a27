"""A compiled program's text, read for what a roofline needs: what travels between chips, and what memory moves.

The text counts a loop's body once; here it counts as often as the loop turns.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "f64": 8, "s64": 8, "u64": 8, "c64": 8}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")

_SHAPE = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](\{[^{}]*\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota"}
_FREE |= {"after-all", "partition-id", "replica-id", "optimization-barrier", "opt-barrier"}


@dataclasses.dataclass(frozen=True)
class Shape:
    bytes: float
    fast: bool
    """It lies in a memory space other than 0: on a TPU, in VMEM, not in HBM."""


@dataclasses.dataclass
class Instruction:
    name: str
    shapes: list[Shape]
    kind: str
    operands: list[str]
    rest: str
    root: bool


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation, or several alike.

    Args:
      kind: as XLA names it.
      bytes: of its largest side on one device, once: the gathered, or the not yet scattered, or what is reduced.
      group: indices of the devices that take part together, one such group.
      times: how often it runs in a step.
    """

    kind: str
    bytes: float
    group: tuple[int, ...]
    times: int


@dataclasses.dataclass(frozen=True)
class Traffic:
    collectives: tuple[Collective, ...]
    memory: float
    """Bytes that one device reads from and writes to its main memory in a step."""
    cycles: float
    """The compiler's own estimate of the clock cycles that one device computes; 0 where it gives none."""
    endless: int
    """Loops whose number of turns could not be read."""
    kernels: tuple[tuple[str, int], ...] = ()
    """Calls of kernels of one's own: the scope that made each, and how often it runs."""


def shapes_of(text: str) -> list[Shape]:
    """The arrays that a type names, in order."""
    found = []
    for dtype, sizes, layout in _SHAPE.findall(text):
        width = BYTES.get(dtype) or (1 if dtype.startswith("f8") else int(re.sub(r"\D", "", dtype) or 0) / 8)
        count = math.prod(int(n) for n in sizes.split(",") if n)
        found.append(Shape(count * width, bool(re.search(r"S\(\d+\)", layout or ""))))
    return found


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Instructions by computation, and the name of the entry."""
    found: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            if head := _COMPUTATION.match(line):
                current = found.setdefault(head[2], [])
                entry = head[2] if head[1] else entry
        elif line.rstrip() == "}":
            current = None
        elif match := _INSTRUCTION.match(line):
            root, name, shape, kind, rest = match.groups()
            operands = re.findall(r"%([\w.\-]+)", rest.split(")", 1)[0])
            current.append(Instruction(name, shapes_of(shape), kind, operands, rest, bool(root)))
        elif current:
            current[-1].rest += line  # what describes a kernel of one's own goes over several lines
    return found, entry


def _turns(loop: Instruction, computations: dict[str, list[Instruction]]) -> int | None:
    """How often a loop turns: as XLA says, or as its condition `counter < constant` says."""
    if known := re.search(r"known_trip_count[^\d]*(\d+)", loop.rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
    body = computations.get(condition[1], []) if condition else []
    constants = {i.name: i.rest for i in body if i.kind == "constant"}
    for instruction in body:
        if instruction.root and instruction.kind == "compare" and "direction=LT" in instruction.rest:
            for operand in instruction.operands:
                if operand in constants:
                    return int(constants[operand].split(")")[0])
    return None


def runs(
    computations: dict[str, list[Instruction]], entry: str, unknown: int = 1
) -> tuple[dict[str, int], set[str], int]:
    """How often each computation runs; those inside a fusion, whose data stays on the chip; and the number of loops whose
    turns could not be read, each counted `unknown` times."""
    times: dict[str, int] = collections.defaultdict(int)
    inner: set[str] = set()
    endless = 0

    def visit(name: str, count: int, inside: bool) -> None:
        nonlocal endless
        times[name] += count
        if inside:
            inner.add(name)
        for i in computations.get(name, []):
            if i.kind == "while":
                turns = _turns(i, computations)
                endless += turns is None
                body = re.search(r"body=%?([\w.\-]+)", i.rest)
                if body:
                    visit(body[1], count * (unknown if turns is None else turns), inside)
                continue
            called = _CALLED.findall(i.rest)
            if branches := re.search(r"branch_computations=\{([^}]*)\}", i.rest):
                called += re.findall(r"%?([\w.\-]+)", branches[1])
            for other in called:
                visit(other, count, inside or i.kind not in ("call", "conditional", "async-start"))

    visit(entry, 1, False)
    return times, inner, endless


def is_kernel(i: Instruction) -> bool:
    """Whether it calls a kernel of one's own, written in Pallas."""
    return i.kind == "custom-call" and "tpu_custom_call" in i.rest


def read(text: str, devices: int, unknown: int = 1) -> Traffic:
    """What the compiled program of one device moves in one run.

    Args:
      text: as jax.stages.Compiled.as_text gives it.
      devices: all that take part.
      unknown: how often a loop turns whose text does not say it.
    """
    program, entry = computations(text)
    times, inner, endless = runs(program, entry, unknown)
    collectives: dict[tuple, Collective] = {}
    kernels: list[tuple[str, int]] = []
    memory = cycles = 0.0
    for name, instructions in program.items():
        if not times[name]:
            continue
        for i in instructions:
            kind = i.kind.removesuffix("-start")
            if kind in KINDS:
                if kind == "all-reduce" and "all-reduce-scatter" in name:
                    kind = "reduce-scatter"  # as a TPU's compiler writes it
                group, key = _group(i.rest, devices)
                if len(group) > 1:
                    channel = re.search(r"channel_id=(\d+)", i.rest)
                    size = _moved(i, kind)
                    # A TPU's compiler repeats an asynchronous collective in each fusion that it overlaps with.
                    unique = (kind, channel[1] if channel else (name, i.name), key, size)
                    known = collectives.get(unique)
                    count = max(times[name], known.times if known else 0)
                    collectives[unique] = Collective(kind, size, group, count)
            if name not in inner:
                memory += times[name] * memory_of(i, instructions, program)
                if is_kernel(i):
                    scope = re.search(r'op_name="([^"]*)"', i.rest)
                    kernels.append((scope[1] if scope else i.rest, times[name]))
                if estimate := re.search(r'"estimated_cycles":"(\d+)"', i.rest):
                    cycles += times[name] * int(estimate[1])
    return Traffic(tuple(collectives.values()), memory, cycles, endless, tuple(kernels))


def _moved(i: Instruction, kind: str) -> float:
    sizes = [s.bytes for s in i.shapes]
    if i.kind == "all-reduce":  # also where it is the inner half of a reduce-scatter
        return sum(sizes)
    if kind == "reduce-scatter":
        return max(sizes) * (len(_group(i.rest, 0)[0]) or 1) if i.kind == "reduce-scatter" else max(sizes)
    return max(sizes) if i.kind.endswith("-start") else sum(sizes)


def _group(rest: str, devices: int) -> tuple[tuple[int, ...], str]:
    """One group of devices that take part together, and the text that says so."""
    if found := re.search(r"source_target_pairs=\{(\{[\d,{} ]*\})\}", rest):
        pairs = [tuple(int(n) for n in pair.split(",")) for pair in re.findall(r"\{([\d, ]+)\}", found[1])]
        moving = [pair for pair in pairs if pair[0] != pair[1]]
        return (moving[0] if moving else ()), found[1]
    if found := re.search(r"replica_groups=\{\{([\d, ]+)\}", rest):
        return tuple(int(n) for n in found[1].split(",")), found[1]
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        order = _iota(found[2], found[3])
        return tuple(order.reshape(_numbers(found[1]))[0].tolist()), found[0]
    axes = r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
    if found := re.search(axes, rest):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", found[1])}
        order = _iota(found[2] or str(math.prod(sizes.values())), found[3]).reshape(tuple(sizes.values()))
        among = re.findall(r"'(\w+)'", found[4])
        return tuple(order[tuple(slice(None) if name in among else 0 for name in sizes)].ravel().tolist()), found[0]
    return tuple(range(devices)), ""


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))


def _iota(shape: str, permutation: str | None) -> np.ndarray:
    order = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return order.transpose(_numbers(permutation)) if permutation else order


def memory_of(i: Instruction, around: list[Instruction], computations: dict[str, list[Instruction]]) -> float:
    """Bytes of main memory that an instruction reads and writes."""
    if i.kind in _FREE or i.kind.endswith(("-done", "-update")):
        return 0.0
    if i.kind == "slice-start":
        return sum(i.shapes[1].bytes for s in i.shapes[:2] if not s.fast) if len(i.shapes) > 1 else 0.0
    if i.kind.endswith("-start"):
        return sum(s.bytes for s in i.shapes[:2] if not s.fast)
    if i.kind in ("dynamic-slice", "gather", "slice"):
        return 2 * _slow(i.shapes)
    known = {other.name: other for other in around}
    inputs = [known[name].shapes if name in known else [] for name in i.operands]
    written, read = _slow(i.shapes), [_slow(shapes) for shapes in inputs]
    if i.kind == "dynamic-update-slice":
        return 2 * (read[1] if len(read) > 1 else 0.0)
    if i.kind == "custom-call" and '"AllocateBuffer"' in i.rest:
        return 0.0
    inner = fused(i, computations)
    for number, j in enumerate(_parameters(inner)):
        if number < len(read) and read[number] and (part := _cut(j, inner, computations)) is not None:
            read[number] = part
    for part in _nested(inner, computations):
        sizes = {k.name: sum(s.bytes for s in k.shapes) for k in part}
        for k in part:
            if k.kind == "dynamic-update-slice" and len(k.operands) > 1 and written >= sizes[k.name]:
                written -= sizes[k.name] - sizes.get(k.operands[1], 0.0)
    return written + sum(read)


def fused(i: Instruction, computations: dict[str, list[Instruction]]) -> list[Instruction]:
    called = _CALLED.search(i.rest) if i.kind == "fusion" else None
    return computations.get(called[1], []) if called else []


def _nested(inner: list[Instruction], computations: dict[str, list[Instruction]]) -> Iterator[list[Instruction]]:
    """A fused computation, and those that its own fusions call."""
    yield inner
    for k in inner:
        yield from _nested(within, computations) if (within := fused(k, computations)) else ()


def _parameters(inner: list[Instruction]) -> list[str]:
    """Names, by their numbers."""
    found = {int(j.rest.split(")")[0]): j.name for j in inner if j.kind == "parameter"}
    return [found.get(number, "") for number in range(max(found, default=-1) + 1)]


def _cut(name: str, inner: list[Instruction], computations: dict[str, list[Instruction]]) -> float | None:
    """Bytes read of a fusion's parameter, where it is only cut from, or changed in place; None: all of it."""
    users = [k for k in inner if name in k.operands]
    total = 0.0 if users else None
    for k in users:
        if k.kind in ("dynamic-slice", "gather", "slice"):
            parts = [float(sum(s.bytes for s in k.shapes))]
        elif k.kind == "dynamic-update-slice" and k.operands[0] == name:
            parts = [0.0]  # what it writes is counted there
        elif k.kind == "bitcast":
            parts = [_cut(k.name, inner, computations)]
        else:
            within = fused(k, computations)
            names = _parameters(within)
            parts = [
                _cut(names[n], within, computations) for n, o in enumerate(k.operands) if o == name and n < len(names)
            ]
        if not parts or None in parts:
            return None
        total += sum(parts)
    return total


def _slow(shapes: list[Shape]) -> float:
    return sum(s.bytes for s in shapes if not s.fast)
