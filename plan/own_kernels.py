"""Kernels of one's own, which the compiler gives no estimate of: what they take, by the products inside."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from bothways.flops import inner_programs, kernel_flops

LANES = 128
NARROW_SHARE = 0.25
"""Of the chip's peak, by the full square of scores, that attention of heads narrower than 128 is counted at: tokamax's
tuning file of v5p has 27 % for [16, 1024, 32, 64] causal forward and 106 % for [32, 4096, 32, 128]."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One device's mean call of the kernels of one name in a traced program."""

    flops: float
    narrow: bool
    """Heads are narrower than a matrix unit."""
    calls: float
    """In the trace. The compiled program may have fewer: those whose results are saved are not made again."""


def traced_kernels(jaxpr: Any) -> dict[str, Kernel]:
    """By the kernel's name."""
    found: dict[str, Kernel] = {}
    for name, times, eqn in _calls(jaxpr, 1):
        known = found.get(name, Kernel(0.0, False, 0.0))
        calls = known.calls + times
        flops = (known.flops * known.calls + times * kernel_flops(eqn)) / calls
        found[name] = Kernel(flops, known.narrow or _is_narrow(eqn), calls)
    return found


def _calls(jaxpr: Any, times: int) -> Iterator[tuple[str, int, Any]]:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            yield eqn.params["name"], times, eqn
            continue
        turns = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for inner in inner_programs(eqn):
            yield from _calls(inner, times * turns)


def _is_narrow(eqn: Any) -> bool:
    """Arrays of several axes whose last is a head's width."""
    return any(v.aval.ndim > 2 and 8 < v.aval.shape[-1] < LANES for v in eqn.invars if v.aval.dtype.kind in "fV")


def named(scope: str, known: dict[str, Kernel]) -> Kernel | None:
    """The kernel that a compiled call's scope names."""
    names = [name for name in known if name in scope]
    return known[max(names, key=len)] if names else None


def device_flops(calls: Iterable[tuple[str, int]], known: dict[str, Kernel]) -> tuple[float, float]:
    """FLOPs of one device in all calls that the compiled program makes; and the FLOPs that would take as long at peak."""
    done = as_if = 0.0
    for scope, times in calls:
        if kernel := named(scope, known):
            done += times * kernel.flops
            as_if += times * kernel.flops / (NARROW_SHARE if kernel.narrow else 1.0)
    return done, as_if
