"""Inference with a fine-tuned run: labels, numbers, tags, spans, choices."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bothways.data.task_examples import Example, decisions, encode
from bothways.errors import InputError
from bothways.rundir import Run

BATCH = 32
COLUMNS = {
    "classify": "a text, or two texts separated by a tab",
    "regress": "a text, or two texts separated by a tab",
    "tag": "words separated by spaces",
    "span": "a question and a document separated by a tab",
    "choice": "a text and its choices, separated by tabs",
}


@dataclasses.dataclass(frozen=True)
class Prediction:
    """`label` is a name, a number, a list of tags, an answer or a choice; `p` its probability (tags: one each)."""

    text: str
    label: Any
    p: Any


class TaskPredictor:
    """A fine-tuned run ready for inference: `predict`. Made by `bothways.load`."""

    def __init__(self, run: Run):
        if run.task is None:
            raise InputError(f"{run.home} is not fine-tuned; `bothways finetune` makes a run that predicts")
        self.run, self.recipe, self.task = run, run.recipe, run.task
        self.tokenizer = run.tokenizer.framing_as_published() if run.task.wrap == "vocabulary" else run.tokenizer
        module = run.module

        def scores(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
            out = module.apply({"params": params}, batch["tokens"], batch["segments"], batch["types"])
            if self.task.kind == "span":
                allowed = (batch["begin_char"] >= 0) | (jnp.arange(out.shape[1]) == 0)
                out = jnp.where(allowed[..., None], out, -1e30)
            return out

        self._scores = jax.jit(scores)

    def parse(self, line: str) -> dict[str, Any]:
        """An item from a line. Raises InputError if it lacks columns."""
        parts = line.split("\t")
        kind = self.task.kind
        least, most = {"span": (2, 2), "choice": (3, 99), "tag": (1, 1)}.get(kind, (1, 2))
        if not least <= len(parts) <= most or any(not part.strip() for part in parts):
            raise InputError(f"{line[:60]!r}: wanted {COLUMNS[kind]}")
        if kind == "tag":
            return {"words": parts[0].split()}
        if kind == "choice":
            return {"text": parts[0], "choices": parts[1:]}
        return {"text": parts[0]} | ({"text_b": parts[1]} if len(parts) > 1 else {})

    def predict(self, lines: Sequence[str]) -> list[Prediction]:
        """One prediction per line; see COLUMNS for what a line holds.

        Raises:
          InputError: a line without the columns that the task wants.
        """
        found = []
        for line in lines:
            item = self.parse(line)
            examples = encode(item, self.task.kind, self.task.labels, self.tokenizer, self.task.length)
            raw = np.concatenate([self._run(examples[i : i + BATCH]) for i in range(0, len(examples), BATCH)])
            label, p = decisions(self.task, raw, examples, [0] * len(examples), [item])[0]
            label = item["choices"][label] if self.task.kind == "choice" else label
            rounded = [round(x, 4) for x in p] if isinstance(p, list) else None if p is None else round(p, 4)
            found.append(Prediction(line, label, rounded))
        return found

    def _run(self, examples: list[Example]) -> np.ndarray:
        batch = {k: np.stack([e[k] for e in examples]) for k in examples[0]}
        if self.task.kind == "choice":
            batch = {k: v.reshape(-1, v.shape[-1]) for k, v in batch.items() if v.ndim == 3}
        return np.asarray(self._scores(self.run.params, batch))
