"""A run directory describes itself: recipe.json, tokenizer, checkpoints, metrics. Training writes it, all others read it.

It lies on a disk, or on a bucket: gs://bucket/runs/x (etils.epath, orbax and tensorboardX each go there themselves).

runs/x/recipe.json         the recipe, every derived value filled in
runs/x/tokenizer.model     sentencepiece; of an imported run tokenizer.json and tokenizer_config.json, or its family's own files
runs/x/corpus.json         of a run trained here: the fingerprint of its text
runs/x/checkpoints/STEP/   orbax: params, train (optimizer and counters), meta (step, data position)
runs/x/metrics.jsonl       a line per logged step and per evaluation
runs/x/task.json           of a fine-tuned run: kind, labels, length; beside it finetune.json and grid/ (train/finetune.py)
runs/x/adapters.json       of a run of adapters: the run, and its checkpoint, that they are for; checkpoints hold them alone,
                           and a task's head
runs/x/events/             TensorBoard
runs/x/loss.png            the curves
"""

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import SingleDeviceSharding

from bothways.checkpoints import (
    best_step,
    checkpoint_manager,
    is_transient,
    restore_latest_readable,
    restore_step,
    running_mean,
)
from bothways.data.tokenizer import Tokenizer
from bothways.errors import CheckpointUnavailable, InputError
from bothways.files import read_json, write_whole
from bothways.formats import FORMAT, version_of
from bothways.locks import locked
from bothways.model import adapters
from bothways.model.axes import path_names
from bothways.model.config import LoRAConfig, TransformerConfig
from bothways.model.stack import unstack_layers
from bothways.model.task import TaskModel
from bothways.one_by_one import Allocate, by_layer, kept_in, let_go, mean_of, one_by_one, typed, unallocated
from bothways.platform import without_grpc
from bothways.recipes import Recipe
from bothways.registry import make_module, traced_shapes

BASE = "adapters.json"
Log = Callable[[str], None]


def _named(home: str | os.PathLike) -> str:
    name = os.fspath(home)
    if not name:
        raise InputError(
            "the name of a directory is empty, as of a variable that is not set; give one, or . for this one"
        )
    return name


def directory(home: str | os.PathLike) -> Path:
    """A run directory by its name: a path on disk, or gs://, s3:// on a bucket, which has the same methods.

    Raises:
      InputError: an empty name, or a bucket that cannot be reached from here.
      CheckpointUnavailable: it does not answer now.
    """
    name = _named(home)
    if "://" not in name:
        return Path(name)
    if name.startswith(("gs://", "gcs://")):
        without_grpc()
    try:
        path = epath.Path(name)
        path.exists()
    except Exception as e:  # what is missing or refused differs from bucket to bucket
        if is_transient(e):
            raise CheckpointUnavailable(f"{name} does not answer ({e}); run the same command again later") from e
        raise InputError(
            f"cannot reach {name} ({type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}); "
            "for gs:// install gcsfs and google-cloud-storage, and log in with gcloud auth application-default login"
        ) from e
    return path


def on_disk(home: str | os.PathLike) -> Path:
    """A directory by its name that only a disk can hold.

    Raises:
      InputError: an empty name, or it is on a bucket.
    """
    if "://" in _named(home):
        raise InputError(
            f"{home} is on a bucket, and this is written to a disk only: give a directory, and copy it there"
        )
    return Path(home)


def one_writer(home: Path) -> contextlib.AbstractContextManager[None]:
    """Holds a run directory, so that no other process trains there meanwhile; a bucket has no locks, and nothing is held.

    Raises:
      Busy: another process trains there.
    """
    return contextlib.nullcontext() if on_bucket(home) else locked(home / ".lock", f"trains in {home}", wait=2)


def on_bucket(home: Path) -> bool:
    """Whether files here cannot be added to, only written whole."""
    return "://" in str(home)


@dataclasses.dataclass(frozen=True)
class TaskInfo:
    """What a fine-tuned run was tuned for; task.json."""

    name: str
    kind: str
    labels: tuple[str, ...]
    length: int
    metrics: tuple[str, ...]
    pool: str = "token"
    hidden: str = ""
    """Activation of a dense layer before the output layer, of imported heads that have one."""
    hidden_norm: bool = False
    hidden_bias: bool | None = None
    """Whether that dense layer has a bias; None: as the body's projections."""
    wrap: str = "task"
    """What stands around texts: `task`, as fine-tuning wraps them here; `vocabulary`, as the imported one does."""
    no_answer: bool = True
    """span: whether the empty text may be the answer."""
    null_position: Literal["first", "last"] = "first"
    """span: where a window says that it has no answer; runs of before there was a choice have it at their first token."""
    both_ways: bool | None = None
    """Whether every token of a text sees all others; None, in runs of before there was a choice: of a GPT that was trained
    by the hybrid objective."""

    @property
    def outputs(self) -> int:
        return len(self.labels) or {"span": 2}.get(self.kind, 1)


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model, ready for inference."""

    home: Path
    recipe: Recipe
    tokenizer: Tokenizer
    module: nn.Module
    params: Any
    step: int
    task: TaskInfo | None = None
    """What it was fine-tuned for, if it was."""
    base: "Base | None" = None
    """What its adapters are for, where they are kept apart (bases.py)."""


@dataclasses.dataclass(eq=False)
class Base:
    """Frozen parameters that runs of adapters share; in memory for as long as one of them holds it."""

    params: Any


def read_recipe(home: Path) -> Recipe:
    """Raises InputError if the directory is no run."""
    path = home / "recipe.json"
    if not path.exists():
        what = "is not a run directory: it has no recipe.json" if home.exists() else "does not exist"
        raise InputError(f"{home} {what}; give the directory that `bothways train` wrote, such as runs/shakespeare_gpt")
    return Recipe.from_values(read_json(path), f"{path}: recipe")


def trained_on(home: Path, *fingerprints: str) -> bool:
    """Whether text with one of these fingerprints is what a run was trained on; of imported runs nobody knows: yes."""
    path = home / "corpus.json"
    return not path.exists() or read_json(path).get("fingerprint") in fingerprints


def newest_step(home: Path) -> int:
    """The step of the newest checkpoint; 0 where there is none."""
    kept = home / "checkpoints"
    return max((int(p.name) for p in kept.iterdir() if p.name.isdigit()), default=0) if kept.is_dir() else 0


def read_task(home: Path) -> TaskInfo | None:
    """What the run was fine-tuned for; None if it was not."""
    path = home / "task.json"
    if not path.exists():
        return None
    found = read_json(path)
    version_of(found, str(path))
    found.pop("format", None)
    try:
        return TaskInfo(**found | {name: tuple(found[name]) for name in ("labels", "metrics")})
    except (KeyError, TypeError) as e:
        raise InputError(f"{path} does not say what the run was fine-tuned for ({e}); put back a copy of it") from e


def write_task(home: Path, task: TaskInfo) -> None:
    write_whole(home / "task.json", json.dumps({"format": FORMAT, **dataclasses.asdict(task)}, indent=2))


def write_base(home: Path, base: Path, step: int | None = None) -> None:
    """Note which run, and which checkpoint of it (None: the newest), adapters are for."""
    where = base if on_bucket(base) else base.absolute()  # opened from any working directory
    step = newest_step(base) if step is None else step
    write_whole(home / BASE, json.dumps({"format": FORMAT, "base": str(where), "step": step}))


def base_of(home: Path) -> tuple[Path, int]:
    """The run, and the step of its checkpoint, that a run of adapters is for. Raises InputError where it is not there."""
    found = read_json(home / BASE)
    version_of(found, str(home / BASE))
    if not isinstance(found.get("base"), str) or not isinstance(found.get("step"), int):
        raise InputError(f"{home / BASE} does not say which run, and which step of it, adapters are for; put back a copy")
    base = directory(found["base"])
    if not (base / "recipe.json").exists():
        raise InputError(
            f"{home} holds adapters for {base}, which is not there; put it back, or change base in {home / BASE}"
        )
    return base, found["step"]


def base_params(
    home: Path,
    shapes: Any,
    log: Log,
    place: Callable[[Any], Any] | None = None,
    dtype: str = "",
    into: Allocate | None = None,
) -> tuple[Path, Any]:
    """The base that a run of adapters is for, and its parameters of these names and shapes.

    Raises:
      InputError: the base, or the checkpoint that the adapters are for, is not there, or has other parameters.
    """
    base, step = base_of(home)
    run = load_run(base, log, place, step=step, dtype=dtype, into=into)
    try:
        return base, adapters.of_base(run.params["body"] if run.task is not None else run.params, shapes)
    except KeyError as e:
        raise InputError(f"{home} holds adapters for another model than {base}: there is no {e.args[0]} in it") from e


def module_of(recipe: Recipe, task: TaskInfo | None = None) -> nn.Module:
    """The module whose parameters a run holds: a family's, or that under a task's head."""
    if task is None:
        return make_module(recipe.family, recipe.model)
    both_ways = recipe.objective.kind == "hybrid" if task.both_ways is None else task.both_ways
    head = {name: getattr(task, name) for name in ("pool", "hidden", "hidden_bias", "hidden_norm")}
    return TaskModel(recipe.model.resolved(), recipe.family, task.kind, task.outputs, both_ways=both_ways, **head)


def param_shapes(recipe: Recipe, task: TaskInfo | None = None) -> Any:
    """Shapes of a run's parameters, with nothing allocated."""
    found = traced_shapes(module_of(recipe, task), recipe.family, task is not None)
    return jax.tree.map(lambda shape: shape, found)  # dictionaries of the caller's own


def compute_dtype_shapes(params: Any, cfg: TransformerConfig) -> Any:
    """Shapes of parameters in the types that they are multiplied in: what the model would turn into activations' type at
    every use, matrices and tables, is of that type already. A task's head and T5's table of distances stay float32."""

    def narrow(path: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
        names = path_names(path)
        wide = names[-1] not in ("kernel", "embedding") or "task_head" in names or names[-2] == "relative"
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype if wide else cfg.compute_dtype)

    return jax.tree_util.tree_map_with_path(narrow, params)


def restored(
    home: Path, targets: Any, log: Log, step: int | Literal["newest", "best"], count: int, into: Allocate | None = None
) -> tuple[int, Any]:
    """A checkpoint's step and parameters; of the newest the mean with those before it, `count` in all.

    Args:
      into: as of `load_run`; `targets` are numpy arrays then.

    Raises:
      InputError: no checkpoint yet, not this one, or none that can be read.
    """
    if not (home / "checkpoints").is_dir():
        raise InputError(f"{home} has no checkpoint yet; train it first")
    with checkpoint_manager(home, read_only=True) as manager:

        def restore(step: int) -> Any:
            return manager.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(targets)))["params"]

        def average(step: int) -> Any:
            steps = [s for s in sorted(manager.all_steps()) if s <= step][-count:]
            if into is not None and count > 1:
                return mean_of(restore, steps, into)
            return running_mean(restore(s) for s in steps)

        with contextlib.nullcontext() if into is None else one_by_one(kept_in(into)):
            if step == "newest":
                found = restore_latest_readable(manager, average, log)
            else:
                found = restore_step(manager, restore, best_step(manager) if step == "best" else step)
    if found is None:
        raise InputError(f"{home} has no checkpoint yet; train it first")
    return found


def load_adapters(home: Path, log: Log) -> tuple[Recipe, Any]:
    """The recipe and the newest adapters of a run, of a fine-tuned one with its head, on the first device, not merged.

    Raises:
      InputError: a run without adapters, or without a checkpoint that can be read.
    """
    recipe, one = read_recipe(home), SingleDeviceSharding(jax.local_devices()[0])
    if not recipe.model.lora.rank:
        raise InputError(f"{home} has no adapters: it was trained whole; leave --adapters out")
    shapes = adapters.split(param_shapes(recipe, read_task(home)))[0]
    targets = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=one), shapes)
    return recipe, restored(home, targets, log, "newest", recipe.train.average_last_checkpoints)[1]


def load_run(
    home: Path,
    log: Log,
    place: Callable[[Any], Any] | None = None,
    *,
    for_inference: bool = False,
    step: int | Literal["newest", "best"] = "newest",
    dtype: str = "",
    into: Allocate | None = None,
) -> Run:
    """Restore a run's parameters, on today's devices. Adapters are merged into their base: the recipe is that of the plain
    model that comes of it.

    Args:
      place: shapes of the parameters -> their shardings; None puts everything on the first device.
      step: which checkpoint: a step that is kept, the best on held-out text, or the newest (where the recipe says so, the
        mean of the newest ones).
      dtype: of matrices and tables, such as bfloat16; empty: float32.
      into: parameters are numpy arrays, each read into what this gives, or computed there, one at a time; `place` is not asked.
      for_inference: not to be trained on: weights in the types of `compute_dtype_shapes`, of what decodes `unstack_layers`.

    Raises:
      InputError: no run, no checkpoint yet, not this one, or none that can be read.
    """
    recipe = read_recipe(home)
    tokenizer = Tokenizer.load(home)
    task = read_task(home)
    shapes = param_shapes(recipe, task)
    kept = shapes
    adapted = bool(recipe.model.lora.rank)
    one = SingleDeviceSharding(jax.local_devices()[0])
    place = place or (lambda tree: jax.tree.map(lambda _: one, tree))
    if adapted:
        plain = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, lora=LoRAConfig()))
        # Where all of it lies is decided by the size of all of it: adapters alone would fit anywhere.
        shardings, below = adapters.split(place(shapes))
        (shapes, frozen), kept = adapters.split(shapes), param_shapes(plain, task)
    if for_inference or dtype:
        kept = compute_dtype_shapes(kept, dataclasses.replace(recipe.model, dtype=dtype or recipe.model.dtype))
    if not adapted and (recipe.train.average_last_checkpoints == 1 or task is not None):
        shapes = kept  # a mean is taken of what was saved
    shardings = shardings if adapted else place(shapes)
    count = recipe.train.average_last_checkpoints if task is None else 1
    if into and not adapted:
        found = restored(home, unallocated(shapes), log, step, count, into)
    else:
        targets = jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), shapes, shardings)
        found = restored(home, targets, log, step, count)
    params = found[1]
    if adapted:
        of_base = into and (lambda path, shape: into(f"{path}/base", shape))
        _, base = base_params(home, frozen if task is None else frozen["body"], log, place, into=of_base)
        base = base if task is None else {"body": base}
        base = base if into else jax.device_put(base, below)
        made = (by_layer(into),) if into else ()
        params, recipe = adapters.merge(adapters.join(params, base), recipe.model, *made), plain
        jax.tree.map(let_go, base)
    params = typed(params, kept, into)
    alone = all(len(at.device_set) == 1 for at in jax.tree.leaves(shardings))
    if for_inference and recipe.family != "bert":
        params = jax.jit(functools.partial(unstack_layers, join=alone))(params)
    used = recipe
    if not alone:
        # The compiler spreads what it can see into; a custom kernel needs explicit shard_map specs.
        used = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, attention="xla"))
    return Run(home, recipe, tokenizer, module_of(used, task), params, found[0], task)
