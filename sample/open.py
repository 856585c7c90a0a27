"""Opening a run for inference: the class that answers for it follows from what it was trained for."""

import os
from typing import Literal

from bothways.bases import load_apart
from bothways.config import MeshConfig
from bothways.log import log
from bothways.rundir import Run, directory, load_run, read_recipe
from bothways.sample.diffusion import DiffusionModel
from bothways.sample.embed import Embedder
from bothways.sample.hybrid import HybridModel
from bothways.sample.masked import MaskedModel
from bothways.sample.predict import TaskPredictor
from bothways.sample.text import TextModel
from bothways.sharding import shardings_for_inference

Model = TextModel | MaskedModel | HybridModel | DiffusionModel
"""Models that answer in tokens; the others answer with vectors and labels only."""
OpenModel = Model | Embedder | TaskPredictor


def open_model(run: Run) -> OpenModel:
    """A loaded run as the class that can answer for it."""
    if run.task is not None:
        return TaskPredictor(run)
    if run.recipe.objective.kind == "contrastive":
        return Embedder(run)
    if run.recipe.objective.kind == "hybrid":
        return HybridModel(run)
    if run.recipe.objective.kind == "diffusion" and run.recipe.family == "gpt":
        return DiffusionModel(run)
    if run.recipe.family == "bert":
        return MaskedModel(run) if run.recipe.model.masked_head else Embedder(run)
    return TextModel(run)


def open_run(
    home: str | os.PathLike,
    mesh: MeshConfig | None = None,
    step: int | Literal["newest", "best"] = "newest",
    merge_adapters: bool = True,
) -> OpenModel:
    """As `bothways.load`."""
    mesh, path = mesh or MeshConfig(data=1), directory(home)
    shardings = lambda shapes: shardings_for_inference(shapes, mesh)  # noqa: E731
    if not merge_adapters and read_recipe(path).model.lora.rank:
        return open_model(load_apart(path, log, shardings, step=step))
    return open_model(load_run(path, log, shardings, for_inference=True, step=step))
