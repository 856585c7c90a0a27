"""Inference with a fine-tuned run: labels, numbers, tags, spans, choices."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bothways.data.task_examples import Example, collated, decisions, encode
from bothways.errors import InputError
from bothways.rundir import Run
from bothways.sample.batching import batched, rows_that_fit
from bothways.sample.decode import bucket, close_bucket

COLUMNS = {
    "classify": "a text, or two texts separated by a tab",
    "multilabel": "a text, or two texts separated by a tab",
    "regress": "a text, or two texts separated by a tab",
    "tag": "words separated by spaces",
    "span": "a question and a document separated by a tab",
    "choice": "a text and its choices, separated by tabs",
}


@dataclasses.dataclass(frozen=True)
class Prediction:
    """`label` is a name, a list of names, a number, a list of tags, an answer or a choice; `p` its probability (tags: one
    each; several labels: {label: probability} of all that there are)."""

    text: str
    label: Any
    p: Any


def rounded(p: Any) -> Any:
    """A probability, or each of several, to four digits."""
    if isinstance(p, dict):
        return {name: round(x, 4) for name, x in p.items()}
    return [round(x, 4) for x in p] if isinstance(p, list) else None if p is None else round(p, 4)


RIGHT = ("1", "yes", "true", "right", "relevant", "positive", "match", "duplicate", "equivalent", "entailment")
"""Labels of pairs that say that the texts belong together, in any case of letters."""


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
                allowed = (batch["begin_char"] >= 0) | (jnp.arange(out.shape[1]) == batch["null"][:, None])
                out = jnp.where(allowed[..., None], out, -1e30)
            return out

        self._scores, self._rows = jax.jit(scores), rows_that_fit(run.recipe.model)

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
        """One prediction per line, read together in batches of about the same length; see COLUMNS for what a line holds.

        Raises:
          InputError: a line without the columns that the task wants.
        """
        return [Prediction(line, label, rounded(p)) for line, label, p in self._decide(lines)]

    def check_pair_scores(self) -> None:
        """Raises InputError where a pair of texts has no score: the run is not fine-tuned for numbers, or for two labels of
        which one is in RIGHT."""
        kind, labels = self.task.kind, self.task.labels
        if kind not in ("regress", "classify") or (kind == "classify" and len(labels) != 2):
            what = f"tells {len(labels)} labels apart" if kind == "classify" else f"is fine-tuned for {kind}"
            raise InputError(f"{self.run.home} {what}; the score of a pair of texts is a number, or one of two labels")
        if kind == "classify" and sum(label.lower() in RIGHT for label in labels) != 1:
            raise InputError(
                f"{self.run.home} tells {labels[0]!r} and {labels[1]!r} apart, and which of them says that the texts belong "
                f"together is not known; call it one of {', '.join(RIGHT)} in the file, and fine-tune again"
            )

    def pair_scores(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """How well the second text of each pair answers the first: the number, or the probability of the label that is in
        RIGHT.

        Raises:
          InputError: as `check_pair_scores`.
        """
        self.check_pair_scores()
        kind = self.task.kind
        found = self._decide(["\t".join(text.replace("\t", " ") for text in pair) for pair in pairs])
        if kind == "regress":
            return [float(label) for _, label, _ in found]
        return [float(p if label.lower() in RIGHT else 1 - p) for _, label, p in found]

    def _decide(self, lines: Sequence[str]) -> list[tuple[str, Any, Any]]:
        """(line, label, probability) of every line."""
        task, items = self.task, [self.parse(line) for line in lines]
        examples: list[Example] = []
        item_of: list[int] = []
        for i, item in enumerate(items):
            made = encode(item, task.kind, task.labels, self.tokenizer, task.length, task.null_position)
            examples += made
            item_of += [i] * len(made)
        found = []
        answers = decisions(task, self._read(examples), examples, item_of, items)
        for line, item, (label, p) in zip(lines, items, answers, strict=True):
            label = item["choices"][label] if task.kind == "choice" else label
            found.append((line, label, p))
        return found

    def _read(self, examples: list[Example]) -> list[np.ndarray]:
        """The head's scores of every example, as `decisions` wants them."""
        names = ("tokens", "segments", "types") + (("begin_char", "null") if self.task.kind == "span" else ())
        texts: list[Example] = []  # what the body reads at a time: an example, or one choice of it
        for example in examples:
            inputs = {name: example[name] for name in names}
            if self.task.kind == "choice":
                texts += [{name: values[c] for name, values in inputs.items()} for c in range(len(inputs["tokens"]))]
            else:
                texts.append(inputs)
        size = lambda i: (len(texts[i]["tokens"]),)  # noqa: E731
        scores: list[Any] = [None] * len(texts)
        for chosen in batched(range(len(texts)), size, self._rows):
            length = min(close_bucket(max(size(i)[0] for i in chosen)), self.recipe.model.context_length)
            filled = [texts[i] for i in chosen] + [texts[chosen[0]]] * (bucket(len(chosen), 1) - len(chosen))
            batch = collated(filled, length, self.tokenizer.pad)
            for i, row in zip(chosen, np.asarray(self._scores(self.run.params, batch)), strict=False):
                scores[i] = row[: size(i)[0]] if self.task.kind in ("tag", "span") else row
        if self.task.kind != "choice" or not scores:
            return scores
        ends = np.cumsum([len(example["tokens"]) for example in examples])
        return np.split(np.concatenate(scores), ends[:-1])
