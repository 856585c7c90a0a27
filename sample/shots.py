"""Few-shot prediction: a labelled task in the prompt, and no training (GPT-3, arXiv 2005.14165, sections 2 and 2.4)."""

import dataclasses
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bothways.data import metrics
from bothways.data.task_examples import softmax
from bothways.data.tasks import Item, Task
from bothways.errors import InputError
from bothways.log import log
from bothways.sample.continuations import Continuations
from bothways.sample.predict import Prediction

KINDS = ("classify", "choice")
AT_A_TIME = 64
"""Items whose prompts are made and scored together."""


@dataclasses.dataclass(frozen=True)
class FewShot:
    run: str
    task: str
    metric: str
    value: float
    interval: tuple[float, float]
    """95 %, by resampling items."""
    n: int
    shots: int
    rule: str
    tested_on: str
    metrics: dict[str, float]
    """Every metric on what is reported, and the calibration error."""


def verbaliser(task: Task, words: Sequence[str]) -> dict[str, str]:
    """What stands in the prompt for each label: its name, `_` as a space, or what LABEL=WORDS says.

    Raises:
      InputError: no such label, or two labels with the same words.
    """
    found = {label: label.replace("_", " ") for label in task.labels}
    for part in words:
        label, _, said = part.partition("=")
        if label not in found or not said.strip():
            raise InputError(f"--words {part!r}: wanted LABEL=WORDS with one of the labels {', '.join(task.labels[:10])}")
        found[label] = said.strip()
    if len(set(found.values())) < len(found):
        raise InputError(
            f"two labels have the same words in the prompt: {', '.join(found.values())}; set --words LABEL=WORDS"
        )
    return found


class FewShotPredictor:
    """Answers to a task's items, by how likely a run finds each answer behind `shots` training items with theirs.

    For every item the demonstrations are drawn anew, by the seed and its text, and the answers are compared by likelihood
    per token, as GPT-3 does. Demonstrations that do not fit into the context are left out, the last ones drawn first.

    Args:
      model: an open run that was not fine-tuned.
      rule: how an answer is scored; empty: as Continuations chooses.
      words: LABEL=WORDS, what stands for a label in the prompt.

    Raises:
      InputError: a task of another kind, too few items to draw from, or a run that cannot score continuations.
    """

    def __init__(self, model: Any, task: Task, shots: int, seed: int = 0, rule: str = "", words: Sequence[str] = ()):
        if task.kind not in KINDS:
            raise InputError(f"--shots compares labels or choices, and {task.name} is a {task.kind} task")
        if not 0 <= shots <= len(task.splits["train"]):
            raise InputError(f"shots is {shots}; {task.name} has {len(task.splits['train'])} training items to draw from")
        if words and task.kind != "classify":
            raise InputError("--words are for labels; choices are texts of their own")
        self.scores, self.task, self.shots, self.seed = Continuations(model, rule), task, shots, seed
        self.words = verbaliser(task, words)
        self.left_out = 0

    def question(self, item: Item) -> str:
        if self.task.kind == "choice":
            return f"{item['text']}\n"
        return (
            "".join(f"{name}: {item[key]}\n" for name, key in (("Text", "text"), ("And", "text_b")) if key in item)
            + "Label:"
        )

    def answers(self, item: Item) -> list[str]:
        """What may stand behind the question, each as it stands there."""
        if self.task.kind == "choice":
            return list(item["choices"])
        return [f" {self.words[label]}" for label in self.task.labels]

    def right(self, item: Item) -> str:
        """The right one of `answers`."""
        return item["choices"][item["label"]] if self.task.kind == "choice" else f" {self.words[item['label']]}"

    def prompt(self, item: Item) -> tuple[list[int], list[list[int]]]:
        """(the context, each answer) in tokens: a token over the border between the two belongs to the answer."""
        encode, question = self.scores.tokens.encode, self.question(item)
        drawn = random.Random(f"{self.seed} {question}").sample(self.task.splits["train"], self.shots)
        shown = [f"{self.question(other)}{self.right(other)}\n\n" for other in drawn]
        while True:
            before = encode("".join(shown) + question)
            whole = [encode("".join(shown) + question + answer) for answer in self.answers(item)]
            common = min(same(before, ids) for ids in whole)
            if not shown or common <= self.scores.room(max(len(ids) for ids in whole) - common):
                break
            shown.pop()
            self.left_out += 1
        if any(len(ids) == common for ids in whole):
            raise InputError(f"an answer of {str(item)[:80]} has no token of its own")
        return before[:common], [ids[common:] for ids in whole]

    def predict(self, items: Sequence[Item]) -> Iterator[tuple[Any, float]]:
        """(answer, its share of the likelihoods per token) of every item: a label, or a choice's number."""
        for begin in range(0, len(items), AT_A_TIME):
            made = [self.prompt(item) for item in items[begin : begin + AT_A_TIME]]
            nats = iter(self.scores.score([(context, answer) for context, answers in made for answer in answers]))
            for _, answers in made:
                p = softmax(np.array([next(nats)[0] / len(answer) for answer in answers]))
                best = int(p.argmax())
                yield self.task.labels[best] if self.task.kind == "classify" else best, float(p[best])

    def lines(self, lines: Sequence[str]) -> Iterator[Prediction]:
        """A prediction for each line: a text, or what a tab parts: two texts, or a question and its choices.

        Raises:
          InputError: a line without what the task wants.
        """
        items = []
        for line in lines:
            first, *rest = line.split("\t")
            fits = (
                len(rest) > 1 if self.task.kind == "choice" else len(rest) == ("text_b" in self.task.splits["train"][0])
            )
            if not fits or not all(part.strip() for part in (first, *rest)):
                wanted = (
                    "a question and its choices"
                    if self.task.kind == "choice"
                    else "as many texts as the task's items have"
                )
                raise InputError(f"{line[:60]!r}: wanted {wanted}, separated by tabs")
            if self.task.kind == "choice":
                items.append({"text": first, "choices": rest})
            else:
                items.append({"text": first} | ({"text_b": rest[0]} if rest else {}))
        for line, item, (answer, p) in zip(lines, items, self.predict(items), strict=True):
            yield Prediction(line, item["choices"][answer] if self.task.kind == "choice" else answer, round(p, 4))

    def measure(self) -> FewShot:
        """The task's metrics on what `finetune` reports on."""
        items = self.task.splits["test"]
        found, gold = list(self.predict(items)), [item["label"] for item in items]
        got, lead = [answer for answer, _ in found], self.task.metrics[0]
        each = {name: round(metrics.compute(name, gold, got), 4) for name in self.task.metrics}
        each["calibration_error"] = round(
            metrics.calibration_error(*metrics.decisions_of(self.task.kind, gold, found)), 4
        )
        rng = np.random.default_rng(0)
        drawn = (rng.integers(0, len(items), len(items)) for _ in range(500))
        again = [metrics.compute(lead, [gold[i] for i in chosen], [got[i] for i in chosen]) for chosen in drawn]
        low, high = (round(float(x), 4) for x in np.percentile(again, [2.5, 97.5]))
        if self.left_out:
            log(
                f"{self.left_out / len(items):.1f} of {self.shots} demonstrations did not fit into the context, on average"
            )
        return FewShot(
            str(self.scores.model.run.home),
            self.task.name,
            lead,
            each[lead],
            (low, high),
            len(items),
            self.shots,
            self.scores.rule,
            self.task.tested_on,
            each,
        )


def same(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the beginning that two lists share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
