"""Weights that training starts from: those of another run, trained here or imported."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from bothways import rundir
from bothways.data.tokenizer import Tokenizer, vocabulary_file
from bothways.errors import InputError
from bothways.log import log
from bothways.recipes import Recipe
from bothways.registry import predicts

HEADS = ("masked_head", "masked_transform", "output_transform", "output_bias", "next_sentence", "pooler")
SAME_BODY = {"gpt": "decoder", "bert": "encoder"}
"""Families whose bodies are the same stack under another mask, and where it lies among their parameters."""
IGNORED_FIELDS = (
    *HEADS,
    "context_length",
    "lora",
    "init",
    "init_std",
    "init_residual",
    "dtype",
    "attention",
    "scan_layers",
    "remat",
    "predicts",
)
"""Fields of the model in which two runs may differ and still share their weights; so may every dropout."""


def check_start(recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Raises InputError if the run in train.init_from cannot be where this recipe starts, with what to change."""
    home = rundir.directory(recipe.train.init_from)
    other = rundir.read_recipe(home)
    mine, theirs = (dataclasses.asdict(m.resolved()) for m in (recipe.model, other.model))
    found = [
        f"model.{k} is {mine[k]}, and there {theirs[k]}"
        for k in mine
        if mine[k] != theirs[k] and k not in IGNORED_FIELDS and not k.startswith("dropout")
    ]
    if recipe.family != other.family and not {recipe.family, other.family} <= SAME_BODY.keys():
        found.append(f"family is {recipe.family}, and there {other.family}; only gpt and bert are one stack of blocks")
    if recipe.model.lora.rank and (recipe.family != other.family or rundir.read_task(home) is not None):
        found.append(f"adapters are for a {recipe.family} without a task head, and {home} is another")
    if Tokenizer.load(home).fingerprint != tokenizer.fingerprint:
        found.append(f"the tokenizer is another; set --data.tokenizer {vocabulary_file(home)}")
    if recipe.model.position_embedding == "learned" and recipe.model.context_length > other.model.context_length:
        found.append(
            f"model.context_length is {recipe.model.context_length}, and {home} has learned {other.model.context_length} positions"
        )
    if found:
        raise InputError(
            f"this recipe cannot start from {home}:\n"
            + "\n".join(f"  - {p}" for p in found)
            + f"\n`bothways train {home} --workdir DIR` takes model and tokenizer from there"
        )


def load_base(home: Path, shapes: Any, shardings: Any) -> Any:
    """The frozen parameters of a run of adapters, from the base that they are for.

    Args:
      home: the run of the adapters.
      shapes, shardings: of the frozen parameters.

    Raises:
      InputError: as `rundir.base_params`.
    """
    base, params = rundir.base_params(home, shapes, log, lambda theirs: placed_as(theirs, shardings))
    log(f"frozen weights from {base}")
    return jax.tree.map(lambda x, s, d: jax.device_put(x.astype(s.dtype), d), params, shapes, shardings)


def placed_as(theirs: Any, shardings: Any) -> Any:
    """Shardings for a base's parameters: those of the same names here; what is not used here is on every device."""
    known = flatten_dict(shardings, sep="/")
    copied = NamedSharding(next(iter(known.values())).mesh, PartitionSpec())
    return unflatten_dict({path: known.get(path, copied) for path in flatten_dict(theirs, sep="/")}, sep="/")


def start_from(home: Path, recipe: Recipe, fresh: Any, place: Callable[[Any], Any]) -> Any:
    """Parameters of another run in the place of fresh ones.

    Of learned positions the first `context` are taken. Heads that the other run lacks stay fresh; heads that this one
    lacks are left behind. Of a fine-tuned run the body is taken. A gpt's body becomes a bert's, and the other way round:
    the features are the same under the same mask. What is new and what is left behind is logged.

    Args:
      recipe: this run's.
      fresh: this run's parameters, where they belong on the mesh.
      place: shapes of the other run's parameters -> their shardings.
    """
    run = rundir.load_run(home, log, place)
    theirs = flatten_dict(run.params["body"] if run.task is not None else run.params, sep="/")
    mine, other = flatten_dict(fresh, sep="/"), run.recipe
    if other.family != recipe.family:
        was, now = (f"{SAME_BODY[family]}/" for family in (other.family, recipe.family))
        theirs = {now + path.removeprefix(was) if path.startswith(was) else path: leaf for path, leaf in theirs.items()}
    for path, leaf in mine.items():
        if path in theirs:
            found = theirs[path]
            found = found[: recipe.model.context_length] if path.endswith("embed/position/embedding") else found
            mine[path] = jax.device_put(found, leaf.sharding)

    def listed(paths: Iterable[str]) -> str:
        return ", ".join(sorted({path.rsplit("/", 1)[0] for path in paths}))

    notes = [f"weights from {home}"]
    if new := listed(mine.keys() - theirs.keys()):
        notes.append(f"new and random: {new}")
    if run.task is None and (left := listed(theirs.keys() - mine.keys())):
        notes.append(f"left behind: {left}")
    was, now = predicts(other.family, other.model), predicts(recipe.family, recipe.model)
    if was != now:
        words = {"next": "the next token", "own": "their own token"}
        notes.append(f"outputs predicted {words[was]} there, and are trained to predict {words[now]} here")
    log("; ".join(notes))
    return unflatten_dict(mine, sep="/")
