"""The runs behind the server: what each can do is known without loading it; their parameters come on demand, within a limit."""

import collections
import dataclasses
import functools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from bothways.bases import base_key
from bothways.config import MeshConfig
from bothways.data.tokenizer import Tokenizer
from bothways.errors import InputError
from bothways.log import log
from bothways.model import adapters
from bothways.model.axes import platform
from bothways.model.products import transpose_kernels
from bothways.recipes import Recipe
from bothways.rundir import TaskInfo, compute_dtype_shapes, directory, param_shapes, read_recipe, read_task
from bothways.sample.open import OpenModel, open_model, open_run
from bothways.sample.text import TextModel, callbacks, never_drawn
from bothways.serve.prefix import PrefixCache
from bothways.serve.programs import Programs
from bothways.serve.slots import Pool

WANTS = {
    "complete": ("causal", "hybrid", "seq2seq", "masked", "diffusion"),
    "chat": ("causal", "hybrid", "diffusion"),
    "infill": ("masked", "hybrid", "diffusion"),
    "fill": ("masked", "hybrid", "diffusion"),
    "embed": ("causal", "hybrid", "seq2seq", "masked", "diffusion", "embedder"),
    "score": ("causal", "hybrid", "seq2seq", "masked", "diffusion"),
    "tokens": ("causal", "hybrid", "masked", "diffusion"),
    "classify": ("task",),
    "rerank": ("causal", "hybrid", "seq2seq", "masked", "diffusion", "embedder", "task"),
}
"""The kinds of run that can do each thing."""
WHY_NOT = {
    "task": "is fine-tuned for a task, and answers /classify; ask the run that it came from",
    "embedder": "is a body without a head that predicts tokens, and answers /v1/embeddings and /rerank",
    "causal": "reads forward only",
    "seq2seq": "is an encoder-decoder: it writes a target for a source",
    "masked": "reads both ways, and writes blocks of masked tokens",
    "diffusion": "writes blocks of masked tokens",
}
IN_SLOTS = ("causal", "hybrid", "seq2seq")
"""Kinds that write token by token, and share slots."""


@dataclasses.dataclass(frozen=True)
class Served:
    """One run, by what its directory says."""

    name: str
    home: Path
    recipe: Recipe
    tokenizer: Tokenizer
    task: TaskInfo | None
    created: int

    @classmethod
    def read(cls, name: str, home: Path) -> "Served":
        """Raises InputError where there is no run, or one without a checkpoint."""
        recipe, task = read_recipe(home), read_task(home)
        if not (home / "checkpoints").is_dir() or not any(p.name.isdigit() for p in (home / "checkpoints").iterdir()):
            raise InputError(f"{home} has no checkpoint yet; train it first")
        created = int(time.time())
        return cls(name, home, recipe, Tokenizer.load(home), task, created)

    @property
    def kind(self) -> str:
        if self.task is not None:
            return "task"
        if self.recipe.objective.kind == "contrastive":
            return "embedder"
        if self.recipe.family == "bert":
            return "masked" if self.recipe.model.masked_head else "embedder"
        if self.recipe.objective.kind in ("hybrid", "diffusion") and self.recipe.family == "gpt":
            return self.recipe.objective.kind
        return "seq2seq" if self.recipe.family == "seq2seq" else "causal"

    @property
    def context_length(self) -> int:
        return self.recipe.model.context_length

    def refusal(self, what: str) -> str:
        """Why the run cannot do this; empty where it can."""
        kind, objective = self.kind, self.recipe.objective
        if what == "classify" and self.task is None:
            return f"{self.name} is not fine-tuned for a task; `bothways finetune` makes a run that is"
        if kind not in WANTS[what]:
            return f"{self.name} {WHY_NOT[kind]}"
        if what in ("infill", "fill") and kind == "hybrid" and objective.causal_share == 1:
            return f"{self.name} was trained forward only"
        if what in ("infill", "fill") and kind == "diffusion" and 0 not in objective.block_sizes:
            return f"{self.name} was not trained on whole rows, and never saw what follows a block"
        if what == "chat" and not self.tokenizer.chat_template:
            return f"{self.name} has no chat template: its tokenizer_config.json holds no chat_template"
        if what == "rerank" and self.task is not None and self.task.kind not in ("regress", "classify"):
            return f"{self.name} is fine-tuned for {self.task.kind}, which gives a pair of texts no score"
        return ""

    @property
    def abilities(self) -> list[str]:
        return [what for what in WANTS if not self.refusal(what)]

    @functools.cached_property
    def bytes(self) -> int:
        """Of its parameters, as they are kept for inference."""
        return bytes_of(compute_dtype_shapes(param_shapes(self.recipe, self.task), self.recipe.model))

    @functools.cached_property
    def frozen(self) -> Any:
        """Shapes of what its adapters are for; of nothing where it has none."""
        shapes = compute_dtype_shapes(param_shapes(self.recipe, self.task), self.recipe.model)
        return adapters.split(shapes)[1] if self.recipe.model.lora.rank else {}

    @functools.cached_property
    def base_bytes(self) -> int:
        """Of `bytes`, those of `frozen`."""
        return bytes_of(self.frozen)

    def cache_bytes(self, slots: int, size: int) -> int:
        """Of the keys and values of so many slots, where the run writes token by token."""
        cfg = self.recipe.model.resolved()
        per_token = cfg.n_layers * cfg.n_kv_heads * (cfg.d_head + cfg.d_value) * jnp.dtype(cfg.compute_dtype).itemsize
        return slots * size * per_token * (2 if self.kind == "seq2seq" else 1) if self.kind in IN_SLOTS else 0


def bytes_of(shapes: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes))


def reads_transposed(params: Any, slots: int) -> bool:
    """Whether matrices are turned over: where several slots share one CPU."""
    return slots > 1 and platform() == "cpu" and len(jax.tree.leaves(params)[0].sharding.device_set) == 1


def named(homes: Sequence[str]) -> dict[str, Served]:
    """Runs by name: the last part of a directory, or NAME of NAME=DIRECTORY. A directory that is there is one, whatever its name holds.

    Raises:
      InputError: two of one name, or a directory that is no run.
    """
    found: dict[str, Served] = {}
    for given in homes:
        name, equals, home = (given, "", "") if Path(given).expanduser().is_dir() else given.partition("=")
        path = directory(home if equals else given)
        name = name if equals else Path(str(path)).resolve().name
        if name in found:
            raise InputError(f"two runs are called {name}; give one of them as NAME={home or given}")
        found[name] = Served.read(name, path)
    return found


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the engine may take.

    `memory` bounds parameters, caches of slots and kept prompts together, in bytes; 0: nothing is evicted.
    """

    slots: int = 16
    context: int = 2048
    piece: int = 128
    memory: int = 0
    prefix_cache: int = 64 * 2**20
    merge_adapters: bool = True
    """False: adapters stay beside their base, which is in memory once for all runs that have it."""


@dataclasses.dataclass
class Loaded:
    model: OpenModel
    pool: Pool | None
    bytes: int
    """Of parameters, slots, and as many kept prompts as there may be; without a base that others may share."""
    base: tuple | None = None
    """Which base that is (`base_key`)."""
    base_bytes: int = 0
    calls: int = 0
    """That are being computed."""

    @property
    def idle(self) -> bool:
        return not self.calls and (self.pool is None or not self.pool.busy)


class Runs:
    """Runs whose parameters are loaded when they are first wanted; the least recently used go where memory is short. Only
    the engine's thread calls `get`."""

    def __init__(self, served: dict[str, Served], limits: Limits, mesh: MeshConfig | None = None):
        self.served, self.limits, self.mesh = served, limits, mesh
        self.loaded: collections.OrderedDict[str, Loaded] = collections.OrderedDict()
        apart = () if limits.merge_adapters else [run for run in served.values() if run.recipe.model.lora.rank]
        self.bases = {run.name: base_key(run.home, run.frozen) for run in apart}
        if limits.memory:
            for run in served.values():
                if run.bytes > limits.memory:
                    raise InputError(
                        f"{run.name} needs {run.bytes / 2**20:,.0f} MiB for its parameters alone, and --memory allows "
                        f"{limits.memory / 2**20:,.0f} MiB"
                    )

    @property
    def bytes(self) -> int:
        loaded = list(self.loaded.values())
        return sum(one.bytes for one in loaded) + sum({one.base: one.base_bytes for one in loaded}.values())

    def _still_needs(self, run: Served, more: int) -> int:
        """Bytes of a run's parameters that are not in memory, and `more` for its slots."""
        shared = run.name in self.bases and any(one.base == self.bases[run.name] for one in self.loaded.values())
        return run.bytes - (run.base_bytes if shared else 0) + more

    def get(self, name: str) -> Loaded:
        """A run, ready to compute.

        Raises:
          InputError: its checkpoint cannot be read, or it does not fit beside the runs that are busy.
        """
        if name in self.loaded:
            self.loaded.move_to_end(name)
            return self.loaded[name]
        run = self.served[name]
        self._make_room(run, 0)
        model = open_run(run.home, self.mesh, merge_adapters=self.limits.merge_adapters)
        pool = None
        if isinstance(model, TextModel) and run.kind in IN_SLOTS:
            if model.run.base is None and reads_transposed(model.run.params, self.limits.slots):
                params = jax.jit(transpose_kernels, donate_argnums=0)(model.run.params)
                model = open_model(dataclasses.replace(model.run, params=params))
            pool = self._pool(run, model)
        kept = self.limits.prefix_cache if pool and pool.prefixes is not None else 0
        more = pool.bytes + kept if pool else 0
        self._make_room(run, more)
        size, base = self._still_needs(run, more), self.bases.get(name)
        shared = run.base_bytes if base else 0
        self.loaded[name] = Loaded(model, pool, run.bytes - shared + more, base, shared)
        log(
            f"{name} is loaded: {size / 2**20:,.0f} MiB" + (f", {pool.slots} slots of {pool.size} tokens" if pool else "")
        )
        return self.loaded[name]

    def context_of(self, run: Served) -> int:
        """Most tokens of a prompt and of what is written for it; in slots, what a slot has room for."""
        return min(run.context_length, self.limits.context) if run.kind in IN_SLOTS else run.context_length

    def _make_room(self, run: Served, more: int) -> None:
        while self.limits.memory and self.loaded and self.bytes + self._still_needs(run, more) > self.limits.memory:
            idle = next((n for n, one in self.loaded.items() if one.idle), None)
            if idle is None:
                break
            del self.loaded[idle]
            log(f"{idle} is unloaded: {run.name} needs the memory")
        size = self._still_needs(run, more)
        if self.limits.memory and self.bytes + size > self.limits.memory:
            raise InputError(
                f"{run.name} needs {size / 2**20:,.0f} MiB with its slots, and --memory leaves "
                f"{(self.limits.memory - self.bytes) / 2**20:,.0f} MiB; ask again later, or give fewer --slots"
            )

    def _pool(self, run: Served, model: TextModel) -> Pool:
        size = self.context_of(run)
        prefixes = None if model.has_source else PrefixCache(self.limits.prefix_cache)
        known = len(run.tokenizer)
        programs = Programs(
            callbacks(model.run.module, run.recipe, known),
            model.run.params,
            slots=self.limits.slots,
            size=size,
            piece=min(self.limits.piece, size),
            vocabulary=known,
            has_source=model.has_source,
            never=never_drawn(run.tokenizer),
        )
        return Pool(programs, model.run.params, prefixes=prefixes)
