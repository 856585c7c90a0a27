"""How a checkpoint and a run fit together: which of its tensors are which of our parameters, coming in and going out."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from bothways import rundir
from bothways.config import ObjectiveConfig
from bothways.convert import check, heads, own
from bothways.convert.families import family_for, family_of
from bothways.convert.family import Config, Family
from bothways.convert.files import Checkpoint
from bothways.convert.layout import Layout, Shapes, shapes_of
from bothways.convert.stored import Stored
from bothways.errors import InputError
from bothways.recipes import Recipe
from bothways.rundir import TaskInfo

ORIGIN = "imported.json"
"""The family that a run was imported from, since several may compute the same: it goes out as what it came. And the type that
its matrices were kept in."""


@dataclasses.dataclass(frozen=True)
class Coming:
    """A checkpoint beside the run that it becomes."""

    name: str
    """Of the published family, or `bothways`."""
    recipe: Recipe
    """Family, model and objective; the rest is as it is by default."""
    task: TaskInfo | None
    layout: Layout
    shapes: Shapes
    absent: set[str]
    tensors: Mapping[str, Any]

    def params(self, allocate: Callable[[str, tuple[int, ...]], np.ndarray]) -> Any:
        """The run's parameters. Raises InputError where the tensors do not fit."""
        found = self.layout.from_checkpoint(self.tensors, self.shapes, self.absent, allocate)
        return heads.nested(found) if self.task is not None and self.name != own.NAME else found


def coming(found: Checkpoint, name: str) -> Coming:
    """What a checkpoint becomes.

    Args:
      name: of the run.

    Raises:
      InputError: it is of no family that is known here, or config.json makes no model of it.
    """
    if found.config.get("model_type") == own.NAME:
        recipe, task = own.recipe_of(found.config)
        shapes = shapes_of(rundir.param_shapes(recipe, task))
        layout = own.layout_of(shapes)
        return Coming(own.NAME, recipe, task, layout, shapes, own.absent(recipe, task, layout, shapes), found.tensors)
    family, task = family_of(found.config), None
    tensors = family.canonical_names(found.tensors, family.tied(found.config))
    suffix = heads.suffix_of(found.config)
    model = family.config(found.config, [family.prefix] if suffix else tensors)
    layout, absent = family.layout_for(model), family.absent(model)
    if suffix:
        task = heads.task_of(family, found.config, model, name)
        model = heads.body_config(family, suffix, model)
        tensors = heads.without_other_heads(family, suffix, tensors)
        layout, absent = heads.layout_of(family, suffix, model), heads.absent(family, suffix, model)
    model = dataclasses.replace(model, scan_layers=model.n_layers > 12)  # deep ones would compile for minutes
    kinds = {"gpt": family.objective or "causal", "bert": "masked", "seq2seq": "pairs"}
    objective = ObjectiveConfig(kinds[family.ours])
    recipe = Recipe(family=family.ours, model=model, objective=objective)
    shapes = rundir.param_shapes(recipe, task)
    shapes = shapes_of(heads.flat(shapes) if suffix else shapes)
    return Coming(family.name, recipe, task, layout, shapes, absent, tensors)


@dataclasses.dataclass(frozen=True)
class Going:
    """A run beside the checkpoint that it becomes."""

    family: Family | None
    """None: it leaves with a modelling file of ours."""
    recipe: Recipe
    params: Any
    config: Config
    tensors: dict[str, Stored]

    @property
    def name(self) -> str:
        return own.NAME if self.family is None else self.family.name

    def opened_by(self, task: TaskInfo | None) -> str:
        """The class of `transformers` that opens it."""
        if self.family is not None:
            return check.published_class(self.recipe, task)
        return own.AUTO[own.architectures(self.recipe, task)[0]]


def going(run: rundir.Run, params: Any, log: Callable[[str], None]) -> Going:
    """What a run leaves as."""
    recipe, task, roles = run.recipe, run.task, run.tokenizer.role_ids()
    recipe = dataclasses.replace(recipe, model=recipe.model.resolved())
    family = _published(run, log)
    if family is None:
        shapes = shapes_of(params)
        layout = own.layout_of(shapes)
        tensors = layout.stored(params, own.absent(recipe, task, layout, shapes))
        return Going(None, recipe, params, own.config_json(recipe, task, roles) | _opening(run), tensors)
    ids = {f"{role}_token_id": token for role, token in roles.items()} | _opening(run)
    if task is None:
        tensors = family.layout_for(recipe.model).stored(params, family.absent(recipe.model))
        return Going(family, recipe, params, ids | family.config_json(recipe.model), tensors)
    suffix = heads.suffix_for(task)
    config = ids | heads.config_json(family, task, recipe.model)
    absent = heads.absent(family, suffix, recipe.model)
    recipe = dataclasses.replace(recipe, model=heads.body_config(family, suffix, recipe.model))
    params = _only(params, shapes_of(heads.flat(rundir.param_shapes(recipe, task))))
    tensors = heads.layout_of(family, suffix, recipe.model).stored(heads.flat(params), absent)
    return Going(family, recipe, params, config, tensors)


def _opening(run: rundir.Run) -> Config:
    """The keys of config.json that say how an encoder-decoder's target begins."""
    if run.recipe.family != "seq2seq":
        return {}
    keys = ("decoder_start_token_id", "forced_bos_token_id")
    return dict(zip(keys, run.tokenizer.target_start, strict=False))


def origin_of(home: Path) -> Config:
    """What ORIGIN says; empty for a run that was trained here."""
    path = home / ORIGIN
    return json.loads(path.read_text()) if path.exists() else {}


def _only(params: Any, kept: Shapes) -> Any:
    """A fine-tuned run's parameters without what its head does not read."""
    found = {path: x for path, x in flatten_dict(heads.flat(params), sep="/").items() if path in kept}
    return heads.nested(unflatten_dict(found, sep="/"))


def _published(run: rundir.Run, log: Callable[[str], None]) -> Family | None:
    """The published family that a run leaves as; None where it leaves as one of its own."""
    recipe, differences = run.recipe, None
    if run.task is not None:
        bias = np.asarray(run.params["task_head"]["bias"])
        ends_in_pad = run.task.wrap == "task" and run.tokenizer.pad == run.tokenizer.eos

        def differences(family: Family) -> list[str]:
            return heads.differences(family, run.task, recipe.model.resolved(), bias, ends_in_pad)

    preferred = origin_of(run.home).get("family", "")
    try:
        return family_for(
            recipe.model.resolved(), recipe.family, run.tokenizer.pad, preferred, differences, recipe.objective
        )
    except InputError as e:
        log(f"{e}\nit leaves with a modelling file of its own: open it with trust_remote_code=True")
        return None
