"""What a compiled program needs: its memory, what travels between chips, and how long that takes at best."""

import contextlib
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from bothways.chips import Topology, quiet_stderr
from bothways.plan import hlo


@contextlib.contextmanager
def without_writing_to_cache() -> Iterator[None]:
    """JAX writes programs for absent devices into its persistent cache, and cannot read them back."""
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float("inf"))
    try:
        yield
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


def compile_quietly(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled | None, float, list[str]]:
    """The compiled program, or None and the bytes it would need on a device; and what there is to log."""
    try:
        with quiet_stderr(), without_writing_to_cache():
            return lowered.compile(), 0.0, []
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
        found = re.search(r"(?:Used|required [^(]*\()\s*([\d.]+)([KMGT]?)", str(e))
        used = float(found[1]) * units[found[2]] if found else 0.0
        return None, used, ["it does not fit, so nothing is known of what travels"]


def text_of(compiled: jax.stages.Compiled) -> tuple[str, list[str]]:
    """The text of a compiled program, or why there is none."""
    try:
        return compiled.as_text() or "", []
    except jax.errors.JaxRuntimeError as e:  # the largest programs do not fit into one message
        return "", [f"the program's text cannot be read ({str(e).splitlines()[0][:80]}): the roofline is of compute only"]


def endless_loops(traffic: hlo.Traffic) -> list[str]:
    return [f"{traffic.endless} loops of unknown length are counted once"] if traffic.endless else []


def bytes_per_device(shapes: Any, shardings: Any) -> float:
    leaves = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    return float(sum(math.prod(_shard(placed, leaf.shape)) * leaf.dtype.itemsize for leaf, placed in leaves))


def _shard(placed: NamedSharding, shape: tuple[int, ...]) -> tuple[int, ...]:
    return placed.shard_shape(shape)


def collective_seconds(collective: hlo.Collective, topology: Topology, devices: list) -> float:
    """How long a collective takes at best, once.

    Rings over every axis of the torus that the group spans, all at once; data goes both ways round where the axis
    is closed. Of a gathered array of V bytes each device receives V (1 - 1/g); a reduction sends it twice, a scatter
    once (jax-ml.github.io/scaling-book, "Sharded matrices"). Across slices a device's part of V goes through its share
    of the data-centre network.
    """
    chip = topology.chip
    group = [devices[i] for i in collective.group if i < len(devices)]
    slices = len({getattr(d, "slice_index", 0) or 0 for d in group})
    within = len(group) // slices
    rate = 0.0
    coords = np.array([list(getattr(d, "coords", (d.id,))) for d in group])
    for axis in range(min(coords.shape[1], len(topology.shape))):
        along = np.unique(coords[:, axis])
        if len(along) > 1:
            stride = int(np.min(np.diff(along)))  # others share the links between
            ring = topology.wraps(axis) and len(along) * stride == topology.shape[axis]
            rate += chip.link / chip.devices * (2 if ring else 1) / stride
    share = {"all-reduce": 2.0, "all-to-all": 0.5, "ragged-all-to-all": 0.5}.get(collective.kind, 1.0)
    size = collective.bytes
    if collective.kind == "collective-permute":
        return size / (chip.network / chip.devices if slices > 1 else rate or chip.link)
    # On one chip, between its two devices, nothing goes through a link.
    seconds = share * size * (1 - 1 / within) / rate if within > 1 and rate else 0.0
    if slices > 1:
        seconds += share * size / within * (1 - 1 / slices) / (chip.network / chip.devices)
    return seconds


def _mesh_axes(mesh: Mesh, group: tuple[int, ...]) -> str:
    """The axes of the mesh along which a group lies, such as data+fsdp."""
    coords = np.array(np.unravel_index(np.array(group) % mesh.size, mesh.devices.shape))
    return "+".join(name for name, along in zip(mesh.axis_names, coords, strict=True) if len(np.unique(along)) > 1)


def summed_collectives(traffic: hlo.Traffic, topology: Topology, mesh: Mesh) -> tuple[dict[str, Any], ...]:
    """Collectives by kind and mesh axes: bytes and seconds of a step, the slowest first."""
    devices, rows = list(mesh.devices.flat), {}
    for c in traffic.collectives:
        row = rows.setdefault((c.kind, _mesh_axes(mesh, c.group)), {"bytes": 0.0, "seconds": 0.0, "times": 0})
        row["bytes"] += c.bytes * c.times
        row["times"] += c.times
        row["seconds"] += c.times * collective_seconds(c, topology, devices)
    found = [{"kind": kind, "axes": axes, **row} for (kind, axes), row in rows.items()]
    return tuple(sorted(found, key=lambda row: -row["seconds"]))


def between_slices(topology: Topology, parameters: float) -> dict[str, Any]:
    """The gradients' way over the data-centre network, which a program for several slices does not spell out.

    Args:
      parameters: bytes of parameters, hence of float32 gradients, per chip.
    """
    share = 1 - 1 / topology.slices
    seconds = 2 * parameters * share / topology.chip.network
    return {"kind": "all-reduce", "axes": "data, slices", "bytes": parameters, "seconds": seconds, "times": 1}
