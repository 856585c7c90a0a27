"""Where the compiler's clock cycles go: by part of the model, and the operations that take most, with their cause.

What XProf shows after a run is here before it: the estimate that a TPU's compiler writes beside every operation, summed by
the scope in which the model made it. Parts add up to the compiler's own total.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator

from bothways.plan import hlo

# The first that a scope's path matches names the part.
PARTS: tuple[tuple[str, str], ...] = (
    ("dropout", r"threefry|random_bits|dropout|keep_factor"),
    ("norms", r"norm"),
    ("projections", r"(attention|cross)[^/]*/(query|key|value|out|qkv)\b"),
    ("attention", r"(attention|cross)[^/]*/|splash|attend"),
    ("MLP", r"mlp/"),
    ("loss", r"loss|lm_head|mlm|\bnsp|pooler|logits|cross_entropy|unembed"),
    ("embedding", r"embed|token/|position/"),
    ("layers' stacks", r"(while/body|scan).*(dynamic_slice|dynamic_update_slice|squeeze|broadcast_in_dim)$"),
    ("blocks, the rest", r"blocks|stack/"),
)
COPIES = ("copy", "copy-start", "copy-done", "transpose", "bitcast-convert")


@dataclasses.dataclass(frozen=True)
class Operation:
    """One instruction of the compiled program of one device, as often as it runs in a step."""

    name: str
    part: str
    cycles: float
    """In all."""
    memory: float
    """Bytes read from and written to main memory in all."""
    times: int
    scope: str
    """What in the model, or in jax, made it; empty where only the compiler knows."""
    source: str
    """file:line of the innermost call; empty where only the compiler knows."""


def operations(
    text: str, unknown: int = 1, kernel_cycles: Callable[[str], float] = lambda scope: 0.0
) -> Iterator[Operation]:
    """Every operation that takes cycles, of a program's text (jax.stages.Compiled.as_text).

    Args:
      unknown: how often a loop turns whose text does not say it.
      kernel_cycles: of one call of a kernel of one's own, by its scope: the compiler gives no estimate of those.
    """
    frames, (computations, entry) = _frames(text), hlo.computations(text)
    times, fused, _ = hlo.runs(computations, entry, unknown)
    for name, instructions in computations.items():
        if name in fused or not times[name]:
            continue
        for i in instructions:
            found = re.search(r'"estimated_cycles":"(\d+)"', i.rest)
            scope, source = _cause(i, computations, frames)
            each = kernel_cycles(scope) if hlo.is_kernel(i) else float(found[1]) if found else 0.0
            if each:
                memory = times[name] * hlo.memory_of(i, instructions, computations)
                yield Operation(i.name, _part(i, scope), times[name] * each, memory, times[name], scope, source)


def _frames(text: str) -> dict[str, str]:
    """file:line by the number of a stack frame, of the tables at the head of a program's text."""
    files = dict(re.findall(r'^(\d+) "([^"]*\.py)"$', text, re.M))
    lines = {n: f"{_short(files.get(f, ''))}:{line}" for n, f, line in re.findall(_LOCATION, text, re.M)}
    return {n: lines[at] for n, at in re.findall(r"^(\d+) \{file_location_id=(\d+)", text, re.M) if at in lines}


_LOCATION = r"^(\d+) \{file_name_id=(\d+) function_name_id=\d+ line=(\d+)"


def _short(path: str) -> str:
    """Folder and file."""
    return "/".join(path.split("/")[-2:])


def _cause(i: hlo.Instruction, computations: dict[str, list[hlo.Instruction]], frames: dict[str, str]) -> tuple[str, str]:
    """Scope and file:line, its own, or those of the last operation inside a fusion that has some."""
    for k in (i, *reversed(hlo.fused(i, computations))):
        if found := re.search(r'op_name="([^"]*)"', k.rest):
            number = re.search(r"stack_frame_id=(\d+)", k.rest)
            return found[1], frames.get(number[1], "") if number else ""
    return "", ""


def _part(i: hlo.Instruction, scope: str) -> str:
    if i.kind.removesuffix("-start").removesuffix("-done") in hlo.KINDS:
        return "collectives"
    for part, pattern in PARTS:
        if re.search(pattern, scope.lower()):
            return part
    if i.kind in COPIES or not scope:
        return "copies"
    return "optimizer and the rest"


def by_part(found: list[Operation]) -> dict[str, float]:
    """Cycles of each part, the dearest first; their sum is that of all operations."""
    parts: dict[str, float] = {}
    for operation in found:
        parts[operation.part] = parts.get(operation.part, 0.0) + operation.cycles
    return dict(sorted(parts.items(), key=lambda pair: -pair[1]))
