"""Runs as models of mteb, the massive text embedding benchmark: `mteb.evaluate(BothwaysEncoder("runs/x"), tasks)`.

Needs the extra `mteb`.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import mteb
import numpy as np
from mteb.models.model_meta import ModelMeta

from bothways.errors import InputError
from bothways.sample.evaluate import Metric
from bothways.sample.open import open_run
from bothways.sample.search import embed_side, unit


class BothwaysEncoder:
    """A run that can `embed` as mteb wants its encoders (mteb's EncoderProtocol): vectors of length 1, compared by cosine.

    Queries and documents get the run's prompts for them; other texts get its default one.

    Args:
      run: a run directory, or a loaded model.

    Raises:
      InputError: the run makes no vectors.
    """

    def __init__(self, run: Any, revision: str | None = None, *, device: str | None = None, **_: Any):
        self.model = open_run(run) if isinstance(run, str) else run
        if not hasattr(self.model, "embed"):
            raise InputError(f"{self.model.run.home} makes no vectors: it is fine-tuned; use the run it came from")
        self.mteb_model_meta = ModelMeta.create_empty(
            {"name": f"bothways/{self.model.run.home.name}", "revision": str(self.model.run.step)}
        )

    def encode(
        self,
        inputs: Iterable[dict[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **_: Any,
    ) -> np.ndarray:
        """[texts, D] of batches {"text": texts}, in their order."""
        texts = [text for batch in inputs for text in batch["text"]]
        if prompt_type is None:
            return unit(self.model.embed(texts))
        return embed_side(self.model, texts, "query" if prompt_type.value == "query" else "document")

    def similarity(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """Cosines of each with each."""
        return unit(np.atleast_2d(embeddings1)) @ unit(np.atleast_2d(embeddings2)).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """Cosines of the two in each row."""
        return np.sum(unit(np.atleast_2d(embeddings1)) * unit(np.atleast_2d(embeddings2)), axis=-1)


def known_tasks(names: Sequence[str]) -> list[Any]:
    """Tasks of mteb by name. Raises InputError where there is no such task."""
    found = []
    for name in names:
        try:
            found.append(mteb.get_task(name))
        except KeyError as e:
            raise InputError(f"mteb has no task {name!r}; `mteb available-tasks` lists them") from e
    return found


def evaluate(model: Any, tasks: Sequence[str]) -> list[Metric]:
    """Tasks of mteb by name: the main score of each split and subset. mteb gives no intervals.

    Raises:
      InputError: no such task, or data that cannot be had here.
    """
    figures = []
    for task in known_tasks(tasks):
        try:
            figures += measured(model, task)
        except (ConnectionError, FileNotFoundError) as e:
            name = task.metadata.name
            raise InputError(f"the data of mteb's {name} cannot be had here: {' '.join(str(e).split())[:200]}") from e
    return figures


def measured(model: Any, task: Any) -> list[Metric]:
    """The main score of each split and subset of one task."""
    found = mteb.evaluate(BothwaysEncoder(model), [task], cache=None, show_progress_bar=False)
    name, figures = task.metadata.main_score, []
    for result in found.task_results:
        for split, subsets in result.scores.items():
            for of in subsets:
                suite = "/".join(["mteb:" + result.task_name, split, *([of["hf_subset"]] * (len(subsets) > 1))])
                figures.append(Metric(suite, name, float(of["main_score"]), (math.nan, math.nan), 0, "nothing"))
    return figures
