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
"""What is in memory, by `base_key` and the places of the parameters."""


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
    whole = compute_dtype_shapes(param_shapes(recipe, task), recipe.model)
    one = SingleDeviceSharding(jax.local_devices()[0])
    # Where all of it lies is decided by the size of all of it: adapters alone would fit anywhere.
    places = place(whole) if place else jax.tree.map(lambda _: one, whole)
    (shapes, frozen), (beside, below) = adapters.split(whole), adapters.split(places)
    targets = jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), shapes, beside)
    at, params = restored(home, targets, log, step, recipe.train.average_last_checkpoints if task is None else 1)
    key = (base_key(home, frozen), str(jax.tree.leaves_with_path(below)))
    base = BASES.get(key)
    if base is None:
        wanted = frozen if task is None else frozen["body"]
        _, read = base_params(home, wanted, log, place, recipe.model.dtype)
        read = read if task is None else {"body": read}
        read = jax.tree.map(lambda x, s, d: jax.device_put(x.astype(s.dtype), d), read, frozen, below)
        BASES[key] = base = Base(_laid_out(read, recipe.family))
    used = recipe
    if any(len(d.device_set) > 1 for d in jax.tree.leaves(places)):  # as in `load_run`
        used = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, attention="xla"))
    params = adapters.join(_laid_out(params, recipe.family), base.params)
    return Run(home, recipe, Tokenizer.load(home), module_of(used, task), params, at, task, base)


def base_key(home: Path, frozen: Any) -> tuple:
    """What says whether two runs of adapters share a base: its run and checkpoint, and which of its parameters they use, in
    what shapes and types."""
    return (*map(str, base_of(home)), str(jax.tree.leaves_with_path(frozen)))


def _laid_out(params: dict, family: str) -> dict:
    """Layer by layer where a family decodes, as `load_run` lays parameters out; projections not side by side, since each
    has adapters of its own."""
    return params if family == "bert" else jax.jit(unstack_layers)(params)
