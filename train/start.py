"""Weights that training starts from: those of another run, trained here or imported."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from bothways import rundir
from bothways.data.tokenizer import Tokenizer
from bothways.errors import InputError
from bothways.log import log
from bothways.model.config import TransformerConfig
from bothways.recipes import Recipe

HEADS = ("masked_head", "next_sentence", "pooler")
IGNORED_FIELDS = (
    *HEADS,
    "context_length",
    "init",
    "init_std",
    "init_residual",
    "dtype",
    "attention",
    "scan_layers",
    "remat",
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
    if recipe.family != other.family:
        found.append(f"family is {recipe.family}, and there {other.family}")
    if Tokenizer.load(home).fingerprint != tokenizer.fingerprint:
        kept = next(p for p in ("tokenizer.json", "tokenizer.model") if (home / p).exists())
        found.append(f"the tokenizer is another; set --data.tokenizer {home / kept}")
    if recipe.model.position_embedding == "learned" and recipe.model.context_length > other.model.context_length:
        found.append(
            f"model.context_length is {recipe.model.context_length}, and {home} has learnt {other.model.context_length} positions"
        )
    if found:
        raise InputError(
            f"this recipe cannot start from {home}:\n"
            + "\n".join(f"  - {p}" for p in found)
            + f"\n`bothways train {home} --workdir DIR` takes model and tokenizer from there"
        )


def start_from(home: Path, cfg: TransformerConfig, fresh: Any, place: Callable[[Any], Any]) -> Any:
    """Parameters of another run in the place of fresh ones.

    Of learnt positions the first `context` are taken. Heads that the other run lacks stay fresh; heads that this one
    lacks are left behind. Of a fine-tuned run the body is taken.

    Args:
      fresh: this run's parameters, where they belong on the mesh.
      place: shapes of the other run's parameters -> their shardings.
    """
    run = rundir.load_run(home, log, place)
    theirs = flatten_dict(run.params["body"] if run.task is not None else run.params, sep="/")
    mine = flatten_dict(fresh, sep="/")
    for path, leaf in mine.items():
        if path in theirs:
            found = theirs[path]
            found = found[: cfg.context_length] if path.endswith("embed/position/embedding") else found
            mine[path] = jax.device_put(found, leaf.sharding)
    new = sorted({path.rsplit("/", 1)[0] for path in mine.keys() - theirs.keys()})
    log(f"weights from {home}" + (f"; new and random: {', '.join(new)}" if new else ""))
    return unflatten_dict(mine, sep="/")
