"""Runs of adapters that are kept apart from their base, and share it: several runs of one base take its memory once."""

import dataclasses
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import SingleDeviceSharding

from bothways.data.tokenizer import Tokenizer
from bothways.model import adapters
from bothways.model.stack import unstack_layers
from bothways.rundir import (
    Base,
    Log,
    Run,
    base_of,
    base_params,
    compute_dtype_shapes,
    module_of,
    param_shapes,
    read_recipe,
    read_task,
    restored,
)

BASES: weakref.WeakValueDictionary[tuple, Base] = weakref.WeakValueDictionary()
"""What is in memory, by run, checkpoint, and the shapes, types and places of the parameters."""


def load_apart(
    home: Path,
    log: Log,
    place: Callable[[Any], Any] | None = None,
    *,
    step: int | Literal["newest", "best"] = "newest",
) -> Run:
    """A run of adapters, ready for inference, its adapters beside their base (y = W x + alpha / r B A x at every use) and
    not merged into it. The base is read once for all runs of this process that share it.

    Args:
      place, step: as of `load_run`.

    Raises:
      InputError: no checkpoint of the adapters, or of the base, that can be read; or another base than they were made for.
    """
    recipe, task = read_recipe(home), read_task(home)
    shapes = param_shapes(recipe, task)
    shapes, frozen = adapters.split(compute_dtype_shapes(shapes, recipe.model))
    one = SingleDeviceSharding(jax.local_devices()[0])
    place = place or (lambda tree: jax.tree.map(lambda _: one, tree))
    targets = jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), shapes, place(shapes))
    at, params = restored(home, targets, log, step, recipe.train.average_last_checkpoints if task is None else 1)
    places = place(frozen)
    key = (*map(str, base_of(home)), str(jax.tree.leaves_with_path((frozen, places))))
    base = BASES.get(key)
    if base is None:
        _, read = base_params(home, frozen if task is None else frozen["body"], log, place)
        read = read if task is None else {"body": read}
        base = Base(_laid_out(jax.tree.map(lambda x, s: x.astype(s.dtype, copy=False), read, frozen), recipe.family))
        BASES[key] = base
    used = recipe
    if any(len(d.device_set) > 1 for d in jax.tree.leaves(places)):  # as in `load_run`
        used = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, attention="xla"))
    params = adapters.join(_laid_out(params, recipe.family), base.params)
    return Run(home, recipe, Tokenizer.load(home), module_of(used, task), params, at, task, base)


def _laid_out(params: dict, family: str) -> dict:
    """Layer by layer where a family decodes, as `load_run` lays parameters out; projections not side by side, since each
    has adapters of its own."""
    return params if family == "bert" else jax.jit(unstack_layers)(params)
