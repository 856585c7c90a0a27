"""GPT, BERT, what lies between, and their ancestor from one stack of blocks.

import bothways
recipe = bothways.recipe("shakespeare_gpt")
recipe.fit("runs/x")
run = bothways.load("runs/x")
run.sample(["ROMEO:"])

Importing this package imports neither JAX nor a model: each name below is loaded when it is first used.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any, Literal

__version__ = "0.2.0"

_EXPORTS = {
    "Recipe": "bothways.recipes",
    "TransformerConfig": "bothways.model.config",
    "DataConfig": "bothways.data.config",
    "ObjectiveConfig": "bothways.config",
    "OptimizerConfig": "bothways.config",
    "TrainConfig": "bothways.config",
    "MeshConfig": "bothways.config",
    "FinetuneConfig": "bothways.config",
    "InputError": "bothways.errors",
    "Stopped": "bothways.errors",
    "Diverged": "bothways.errors",
    "main": "bothways.cli",
}
"""Public names, by the module that defines them."""

__all__ = [*_EXPORTS, "__version__", "load", "recipe"]

if TYPE_CHECKING:
    from bothways.cli import main
    from bothways.config import FinetuneConfig, MeshConfig, ObjectiveConfig, OptimizerConfig, TrainConfig
    from bothways.data.config import DataConfig
    from bothways.errors import Diverged, InputError, Stopped
    from bothways.model.config import TransformerConfig
    from bothways.recipes import Recipe
    from bothways.sample.open import OpenModel


def recipe(name: str) -> "Recipe":
    """A recipe by its name in configs/, or by the path of a Python file or of a run's recipe.json.

    Raises:
      InputError: there is none; says which names come near.
    """
    from bothways.configs import find

    return find(name)


def load(
    run: str | os.PathLike,
    mesh: "MeshConfig | None" = None,
    step: "int | Literal['newest', 'best']" = "newest",
    merge_adapters: bool = True,
) -> "OpenModel":
    """A trained run, open for inference: `sample` and `score`; `fill`, `embed` and `predict` where its family can.

    Args:
      run: a run directory, on a disk or a bucket.
      mesh: how to spread its parameters over this host's devices. By default they lie on the first device or, where that
        cannot hold them, on all.
      step: which checkpoint: a step that is kept, the best on held-out text, or the newest.
      merge_adapters: False: of a run of adapters these stay beside their base, which is in memory once for all runs that
        are opened so; slower at every token. Other runs are opened as ever.

    Raises:
      InputError: no run, no checkpoint yet, not this one, none that can be read, or a mesh that cannot hold the parameters.
    """
    from bothways.sample.open import open_run

    return open_run(run, mesh, step, merge_adapters)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'bothways' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
