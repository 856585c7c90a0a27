"""Where everything lives: two tables from logical axes to mesh axes, one for parameters, one for activations."""

import contextlib
import math
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from bothways.config import MeshConfig
from bothways.errors import InputError
from bothways.model.axes import ShardingFn, logical_axes, path_names

MeshAxes = str | tuple[str, ...]

# Parameters and optimizer state. Axes that are not named are copied to every device.
PARAMETERS: dict[str, MeshAxes] = {
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "ff": "tensor",
    "vocab": "tensor",
}
# Activations. `keys`, the positions of keys and values, is not named: every device of `context` holds them all. `stream`
# are the positions of the residual stream between sub-layers: what is done there element by element would else be done
# again on every device of `tensor` (sequence parallelism, arXiv 2205.05198, section 4.2.2).
ACTIVATIONS: dict[str, MeshAxes] = {
    "batch": ("data", "fsdp"),
    "length": "context",
    "stream": ("context", "tensor"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "ff": "tensor",
    "vocab": "tensor",
}


def make_mesh(cfg: MeshConfig, devices: list | None = None) -> Mesh:
    """The mesh of a configuration over all devices; on one device it is 1x1x1x1 and the code is the same."""
    devices = jax.devices() if devices is None else devices
    sizes = cfg.sizes(len(devices))
    return Mesh(device_grid(sizes, devices), tuple(sizes), axis_types=(jax.sharding.AxisType.Auto,) * len(sizes))


def device_grid(sizes: dict[str, int], devices: list) -> np.ndarray:
    """Devices in the shape of the mesh, neighbours close together; of several TPU slices, each has its part of `data`.

    Raises:
      InputError: `data` does not divide among the slices.
    """
    # Nodes of GPUs count as slices too, but all of their network is fit for fsdp.
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if sizes["data"] % slices:
        raise InputError(
            f"mesh.data={sizes['data']} is not divisible by the {slices} slices that are here; between slices only "
            f"gradients may travel: set --mesh.data to a multiple of {slices}"
        )
    if slices == 1:
        return mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    within = sizes | {"data": sizes["data"] // slices}
    across = {name: slices if name == "data" else 1 for name in sizes}
    return mesh_utils.create_hybrid_device_mesh(
        tuple(within.values()), tuple(across.values()), devices, allow_split_physical_axes=True
    )


def spec(table: dict[str, MeshAxes], axes: tuple[str | None, ...]) -> PartitionSpec:
    """Mesh axes for logical axes."""
    return PartitionSpec(*(table.get(axis) if axis else None for axis in axes))


def parameter_shardings(mesh: Mesh, shapes: Any, max_replicated_fraction: float = 1.0) -> Any:
    """A sharding for every parameter.

    Args:
      shapes: tree of arrays or shapes, as from jax.eval_shape.
      max_replicated_fraction: as in MeshConfig.

    Raises:
      InputError: an axis does not divide, or too much would be copied; names the parameters with the numbers,
        before anything is compiled.
    """
    problems = []

    def place(path: tuple, leaf: Any) -> NamedSharding:
        names = path_names(path)
        partition = spec(PARAMETERS, logical_axes(names))
        for size, axis, logical in zip(leaf.shape, partition, logical_axes(names), strict=True):
            parts = mesh.shape[axis] if axis else 1
            if size % parts:
                problems.append(
                    f"{'/'.join(names)} {leaf.shape}: {logical}={size} is not divisible by mesh.{axis}={parts}; "
                    f"{-(-size // parts) * parts} would be"
                )
        return NamedSharding(mesh, partition)

    shardings = jax.tree_util.tree_map_with_path(place, shapes)
    if problems:
        shown = "\n".join(f"  - {p}" for p in problems[:8])
        raise InputError(f"this mesh cannot hold the model; change the mesh or the widths:\n{shown}")
    _refuse_copies(mesh, shapes, shardings, max_replicated_fraction)
    return shardings


def _refuse_copies(mesh: Mesh, shapes: Any, shardings: Any, limit: float) -> None:
    """Raises InputError where each device would hold much more than its part of fsdp * tensor."""
    parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
    beyond, total = {}, 0
    for (path, leaf), placed in zip(jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(shardings), strict=True):
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        total += size
        held = math.prod(placed.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        beyond[f"{'/'.join(path_names(path))} {leaf.shape}"] = held - size / parts
    share = sum(beyond.values()) / total
    if share > limit:
        worst = sorted(beyond, key=beyond.get, reverse=True)[:4]
        shown = "\n".join(f"  - {name}: {beyond[name] / total:.1%}" for name in worst)
        raise InputError(
            f"beyond its part of fsdp*tensor={parts}, each device would hold copies of {share:.1%} of the parameter "
            f"bytes, and mesh.max_replicated_fraction is {limit:.1%}; spread with fsdp rather than tensor, or raise it; "
            f"most:\n{shown}"
        )


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


def spread_over_data(shardings: Any, shapes: Any) -> Any:
    """The same shardings with each array cut over `data` too, along the axis of which a device holds most, if one divides:
    where optimizer state lies, and where the update is computed (ZeRO stage 1, arXiv 1910.02054, section 5.1).
    """

    def place(at: NamedSharding, leaf: Any) -> NamedSharding:
        mesh, data = at.mesh, at.mesh.shape["data"]
        held = at.shard_shape(leaf.shape)
        fitting = [i for i, n in enumerate(held) if n % data == 0]
        if data == 1 or not fitting:
            return at
        widest = max(fitting, key=lambda i: held[i])
        parts = [*at.spec, *(None,) * (len(held) - len(at.spec))]
        before = parts[widest] or ()
        parts[widest] = (*((before,) if isinstance(before, str) else before), "data")
        return NamedSharding(mesh, PartitionSpec(*parts))

    return jax.tree.map(place, shardings, shapes)


def shardings_for_inference(shapes: Any, cfg: MeshConfig) -> Any:
    """Where a trained model's parameters lie for inference, on this host's devices.

    With all axes 1 that is the first device, if they take less than half of its memory; else all, each with its part of
    the heads as far as those divide.

    Raises:
      InputError: as parameter_shardings does.
    """
    devices = jax.local_devices()
    sizes = cfg.sizes(len(devices))
    wanted = math.prod(sizes.values())
    if wanted <= len(devices) and (problems := cfg.problems(wanted)):
        raise InputError("; ".join(problems))
    if wanted > len(devices):
        raise InputError(f"mesh {sizes} wants {wanted} devices, and this host has {len(devices)}")
    if wanted > 1:
        return parameter_shardings(make_mesh(cfg, devices[:wanted]), shapes)
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    memory = (devices[0].memory_stats() or {}).get("bytes_limit", math.inf)
    if size > memory / 2:
        for tensor in (n for n in range(len(devices), 0, -1) if len(devices) % n == 0):
            with contextlib.suppress(InputError):
                return parameter_shardings(make_mesh(MeshConfig(1, len(devices) // tensor, tensor), devices), shapes)
    return jax.tree.map(lambda _: SingleDeviceSharding(devices[0]), shapes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, spec(ACTIVATIONS, ("batch",)))


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of a global batch this host's devices hold, in order: [rows] indices.

    Hosts that share a row (`tensor` or `context` reaches over both) each hold it.
    """
    slices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[rows] for rows in slices]))


def to_global(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This host's rows, those of `local_rows`, as part of global arrays [B, ...] over the mesh."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()}


def activation_sharding_fn(mesh: Mesh) -> ShardingFn:
    """For model.axes.activation_shardings: the table above. An axis is spread as far as its size divides."""

    def fitting(size: int, axes: MeshAxes | None) -> MeshAxes | None:
        """As many of these mesh axes, from the first on, as divide an axis of this size."""
        names = (axes,) if isinstance(axes, str) else axes or ()
        while names and size % math.prod(mesh.shape[a] for a in names):
            names = names[:-1]
        return names if len(names) > 1 else (names[0] if names else None)

    def place(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> NamedSharding:
        partition = spec(ACTIVATIONS, axes)
        return NamedSharding(mesh, PartitionSpec(*(fitting(*pair) for pair in zip(shape, partition, strict=True))))

    return place
