"""Which class asks a run, by what it was trained for."""

from common.rundir import Run
from sample.embed import Embedder
from sample.hybrid import HybridModel
from sample.masked import MaskedModel
from sample.predict import TaskPredictor
from sample.text import TextModel

Model = TextModel | MaskedModel | HybridModel
"""What is asked in tokens; the others answer with vectors and labels only."""


def ask(run: Run) -> Model | Embedder | TaskPredictor:
    """The run, ready to be asked."""
    if run.task is not None:
        return TaskPredictor(run)
    if run.recipe.objective.kind == "hybrid":
        return HybridModel(run)
    if run.recipe.family == "bert":
        return MaskedModel(run) if run.recipe.model.masked_head else Embedder(run)
    return TextModel(run)
