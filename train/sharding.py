"""Where everything lives: two tables from logical axes to mesh axes, one for parameters, one for activations."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from common.config import MeshConfig
from common.errors import InputError
from model.axes import logical_axes, path_names

MeshAxes = str | tuple[str, ...]

# Parameters and optimizer state. Axes that are not named are copied to every device.
PARAMETERS: dict[str, MeshAxes] = {
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "ff": "tensor",
    "vocab": "tensor",
}
# Activations.
ACTIVATIONS: dict[str, MeshAxes] = {
    "batch": ("data", "fsdp"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "ff": "tensor",
    "vocab": "tensor",
}


def make_mesh(cfg: MeshConfig, devices: list | None = None) -> Mesh:
    """The mesh of a configuration over all devices; on one device it is 1x1x1 and the code is the same."""
    devices = jax.devices() if devices is None else devices
    sizes = cfg.sizes(len(devices))
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), devices=devices, axis_types=(jax.sharding.AxisType.Auto,) * len(sizes)
    )


def spec(table: dict[str, MeshAxes], axes: tuple[str | None, ...]) -> PartitionSpec:
    """Mesh axes for logical axes."""
    return PartitionSpec(*(table.get(axis) if axis else None for axis in axes))


def parameter_shardings(mesh: Mesh, shapes: Any) -> Any:
    """A sharding for every parameter.

    Args:
      shapes: tree of arrays or shapes, as from jax.eval_shape.

    Raises:
      InputError: an axis does not divide; names the parameter and the division, before anything is compiled.
    """
    problems = []

    def place(path: tuple, leaf: Any) -> NamedSharding:
        names = path_names(path)
        partition = spec(PARAMETERS, logical_axes(names))
        for size, axis, logical in zip(leaf.shape, partition, logical_axes(names), strict=True):
            parts = mesh.shape[axis] if axis else 1
            if size % parts:
                problems.append(
                    f"{'/'.join(names)} {leaf.shape}: {logical}={size} is not divisible by mesh.{axis}={parts}"
                )
        return NamedSharding(mesh, partition)

    shardings = jax.tree_util.tree_map_with_path(place, shapes)
    if problems:
        shown = "\n".join(f"  - {p}" for p in problems[:8])
        raise InputError(f"this mesh cannot hold the model; change the mesh or the widths:\n{shown}")
    return shardings


def optimizer_shardings(mesh: Mesh, state_shapes: Any, param_shapes: Any, param_shardings: Any) -> Any:
    """Optimizer state lives with the parameter that it belongs to; what has another shape is copied.

    A leaf belongs to the parameter whose path its own path ends with.
    """
    shapes = jax.tree_util.tree_flatten_with_path(param_shapes)[0]
    known = {
        path_names(p): (leaf.shape, s) for (p, leaf), s in zip(shapes, jax.tree.leaves(param_shardings), strict=True)
    }
    copied = NamedSharding(mesh, PartitionSpec())

    def place(path: tuple, leaf: Any) -> NamedSharding:
        names = path_names(path)
        for start in range(len(names)):
            shape, sharding = known.get(names[start:], (None, None))
            if shape is not None:
                return sharding if shape == leaf.shape else copied
        return copied

    return jax.tree_util.tree_map_with_path(place, state_shapes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, spec(ACTIVATIONS, ("batch",)))


def to_global(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This host's rows [B / hosts, ...] as part of global arrays [B, ...] over the mesh."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()}


def constrain(mesh: Mesh):
    """For model.axes.activations_constrained_by: pins activations to the mesh by the table above."""

    def apply(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        partition = spec(ACTIVATIONS, axes)
        fits = [
            axis if axis is not None and size % math.prod(mesh.shape[a] for a in np.atleast_1d(axis)) == 0 else None
            for size, axis in zip(x.shape, partition, strict=True)
        ]
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*fits)))

    return apply
