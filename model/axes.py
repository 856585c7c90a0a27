"""Logical names for the axes of parameters and activations. What they map to on a mesh is not the model's business."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator

import jax

# (module, leaf) -> axis names. A parameter under "blocks" has one more axis in front, "layers".
PARAMETER_AXES: dict[tuple[str, str], tuple[str, ...]] = {
    ("token", "embedding"): ("vocab", "embed"),
    ("position", "embedding"): ("position", "embed"),
    ("segment", "embedding"): ("segment", "embed"),
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
    axes = PARAMETER_AXES.get((module, leaf)) or (NORM_AXES.get(leaf) if module.endswith("norm") else None)
    if axes is None:
        raise KeyError(f"parameter {'/'.join(names)} has no entry in model/axes.py: PARAMETER_AXES")
    return (("layers",) if "blocks" in names else ()) + axes


Constrain = Callable[[jax.Array, tuple[str | None, ...]], jax.Array]
_constrain: contextvars.ContextVar[Constrain | None] = contextvars.ContextVar("constrain", default=None)
_devices: contextvars.ContextVar[int | None] = contextvars.ContextVar("devices", default=None)


@contextlib.contextmanager
def activations_constrained_by(constrain: Constrain, devices: int | None = None) -> Iterator[None]:
    """While tracing inside, `constrain_activation` calls this. Outside it does nothing.

    Args:
      devices: how many share the computation, which need not be those of this process; None: all that are here.
    """
    token, count = _constrain.set(constrain), _devices.set(devices)
    try:
        yield
    finally:
        _constrain.reset(token)
        _devices.reset(count)


def devices_in_use() -> int:
    """How many devices share the computation that is being traced."""
    return _devices.get() or jax.device_count()


def constrain_activation(x: jax.Array, *axes: str | None) -> jax.Array:
    """Tell whoever shards the computation which logical axes x has."""
    constrain = _constrain.get()
    return x if constrain is None else constrain(x, axes)
