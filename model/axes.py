"""Logical names for the axes of parameters and activations. What they map to on a mesh is not the model's business."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import NamedSharding

# (module, leaf) -> axis names. A parameter under "blocks" has one more axis in front, "layers".
PARAMETER_AXES: dict[tuple[str, str], tuple[str, ...]] = {
    ("token", "embedding"): ("vocab", "embed"),
    ("position", "embedding"): ("position", "embed"),
    ("segment", "embedding"): ("segment", "embed"),
    ("relative", "embedding"): ("bucket", "heads"),
    ("widen", "kernel"): ("narrow", "embed"),
    ("widen", "bias"): ("norm",),
    ("query", "kernel"): ("embed", "heads", "head"),
    ("query", "bias"): ("heads", "head"),
    ("key", "kernel"): ("embed", "kv_heads", "head"),
    ("key", "bias"): ("kv_heads", "head"),
    ("value", "kernel"): ("embed", "kv_heads", "head"),
    ("value", "bias"): ("kv_heads", "head"),
    ("out", "kernel"): ("heads", "head", "embed"),
    ("out", "bias"): ("norm",),
    ("gate", "kernel"): ("embed", "ff"),
    ("gate", "bias"): ("ff",),
    ("up", "kernel"): ("embed", "ff"),
    ("up", "bias"): ("ff",),
    ("down", "kernel"): ("ff", "embed"),
    ("down", "bias"): ("norm",),
    ("lm_head", "embedding"): ("vocab", "embed"),
    ("lm_head", "bias"): ("vocab",),
    ("mlm", "bias"): ("vocab",),
    ("dense", "kernel"): ("embed", "pooled"),
    ("dense", "bias"): ("norm",),
    ("pooler", "kernel"): ("embed", "pooled"),
    ("pooler", "bias"): ("norm",),
    ("classes", "kernel"): ("embed", "classes"),
    ("classes", "bias"): ("classes",),
    ("task_head", "kernel"): ("embed", "classes"),
    ("task_head", "bias"): ("classes",),
}
NORM_AXES = {"scale": ("norm",), "bias": ("norm",)}


def path_names(path: tuple) -> tuple[str, ...]:
    """A jax key path as plain names: ('blocks', 'attention', 'query', 'kernel')."""
    return tuple(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)


def logical_axes(names: tuple[str, ...]) -> tuple[str, ...]:
    """Axis names of the parameter at this path.

    Raises:
      KeyError: the parameter has no entry in PARAMETER_AXES; whoever adds a parameter names its axes.
    """
    module, leaf = names[-2:]
    if module == "lora":  # as the kernel beside it, with the rank in the place of its outputs or inputs
        kernel = PARAMETER_AXES[names[-3], "kernel"]
        cut = 2 if names[-3] == "out" else 1
        axes = (*kernel[:cut], "rank") if leaf == "a" else ("rank", *kernel[cut:])
        return (("layers",) if "blocks" in names else ()) + axes
    axes = PARAMETER_AXES.get((module, leaf)) or (NORM_AXES.get(leaf) if module.endswith("norm") else None)
    if axes is None:
        raise KeyError(f"parameter {'/'.join(names)} has no entry in model/axes.py: PARAMETER_AXES")
    return (("layers",) if "blocks" in names else ()) + axes


# (shape, logical axes) -> where an activation of this shape lies
ShardingFn = Callable[[tuple[int, ...], tuple[str | None, ...]], NamedSharding]
_place: contextvars.ContextVar[ShardingFn | None] = contextvars.ContextVar("place", default=None)
_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


@contextlib.contextmanager
def _set(variable: contextvars.ContextVar, value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def activation_shardings(place: ShardingFn) -> contextlib.AbstractContextManager[None]:
    """While tracing inside, `constrain_activation` and `activation_sharding` use this. Outside they do nothing."""
    return _set(_place, place)


def traced_for(platform: str) -> contextlib.AbstractContextManager[None]:
    """While tracing inside, `platform` returns this: for a computation that is compiled for a target topology."""
    return _set(_platform, platform)


def activation_sharding(shape: tuple[int, ...], *axes: str | None) -> NamedSharding | None:
    """Where an activation with these logical axes lies; None where nothing is spread."""
    place = _place.get()
    return place(shape, axes) if place else None


def devices_in_use() -> int:
    """How many devices the activations being traced are spread over, which need not be those of this process; 1 where
    nothing is spread."""
    placed = activation_sharding(())
    return placed.mesh.size if placed else 1


def platform() -> str:
    """Where the computation that is being traced will run: cpu, gpu or tpu."""
    placed = activation_sharding(())
    return placed.mesh.devices.flat[0].platform if placed else _platform.get() or jax.default_backend()


def constrain_activation(x: jax.Array, *axes: str | None) -> jax.Array:
    """Tell whoever shards the computation which logical axes x has."""
    sharding = activation_sharding(x.shape, *axes)
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)


def constrain_kernel(kernel: jax.Array, *axes: str) -> jax.Array:
    """On a mesh with `tensor`: a kernel as it is multiplied by, gathered over `fsdp` and still cut over `tensor`, and so is its gradient.
    Left to itself, XLA computed gradients of the MLP's kernels whole on every device of `tensor`."""
    sharding = activation_sharding(kernel.shape, *axes)
    if sharding is None or sharding.is_fully_replicated:
        return kernel
    return jax.lax.with_sharding_constraint(kernel, sharding)
