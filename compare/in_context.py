"""What the context changes: four tasks that can only be learned inside one document, each with its exact best answer."""

import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np

from bothways.compare import pictures
from bothways.compare.core import Experiment, ExperimentRunner, Measurement, Pilot, Result, Table, asked
from bothways.compare.stats import Estimate, difference, format_difference, mean, verdict
from bothways.sample.directions import FORWARD, directions
from bothways.sample.masked import MaskedModel

LETTERS = "abcdefghijklmnop"
ROW = 36
Asked = tuple[str, list[int], list[list[float]]]
"""A document, the positions that are asked, and for each the best possible probability of what stands there, as [p]."""


def induction(rng: random.Random) -> Asked:
    """A random string twice. First each letter is a surprise; then none is."""
    s = rng.choices(LETTERS, k=15)
    return "i" + "".join(s) + "|" + "".join(s), [*range(1, 16), *range(17, 32)], [[1 / 16]] * 15 + [[1.0]] * 15


def recall(rng: random.Random) -> Asked:
    """Pairs of a letter and a digit. What a letter's digit is, is drawn for each document."""
    keys = rng.sample(LETTERS, 5)
    value = {k: rng.choice("0123456789") for k in keys}
    seen: set[str] = set()
    text, positions, best = "k", [], []
    for _ in range(15):
        k = rng.choice(keys)
        text += k + value[k]
        positions.append(len(text) - 1)
        best.append([1.0 if k in seen else 0.1])
        seen.add(k)
    return text, positions, best


def posterior(rules: list[Callable[[str], str]], examples: list[tuple[str, str]]) -> list[list[float]]:
    """For each example, the probability of its answer to one who knows the rules, equally likely, and those before it."""
    alive, found = list(range(len(rules))), []
    for x, y in examples:
        agree = [r for r in alive if rules[r](x) == y]
        found.append([len(agree) / len(alive)])
        alive = agree
    return found


LINES = list(itertools.product((-2, -1, 1, 2), range(10)))
"""y = slope x + offset."""


def regression(rng: random.Random) -> Asked:
    """Points on a line of the document's own: x and y are digits, y taken modulo 10."""
    rules = [lambda x, a=a, b=b: str((a * int(x) + b) % 10) for a, b in LINES]
    rule = rng.choice(rules)
    examples = [(x, rule(x)) for x in rng.choices("0123456789", k=15)]
    text = "f" + "".join(x + y for x, y in examples)
    return text, list(range(2, 31, 2)), posterior(rules, examples)


CUTS = list(itertools.product(range(2, 15, 2), ("xy", "yx")))


def labels(rng: random.Random) -> Asked:
    """Few-shot labels: letters before a cut have one label and those behind it the other; cut and labels are the document's."""
    rules = [lambda x, cut=cut, names=names: names[LETTERS.index(x) >= cut] for cut, names in CUTS]
    rule = rng.choice(rules)
    examples = [(x, rule(x)) for x in rng.choices(LETTERS, k=15)]
    text = "l" + "".join(x + y for x, y in examples)
    return text, list(range(2, 31, 2)), posterior(rules, examples)


TASKS: dict[str, tuple[Callable[[random.Random], Asked], float]] = {
    "induction copy": (induction, 1 / 16),
    "associative recall": (recall, 0.1),
    "regression": (regression, 0.1),
    "few-shot labels": (labels, 0.5),
}
"""The task, and the probability that a guess among the possible answers is right."""


def texts(count: int = 24_000) -> tuple[list[str], list[str]]:
    rng = random.Random(0)
    found = [rng.choice(list(TASKS.values()))[0](rng)[0] for _ in range(count)]
    longest = ROW - 2
    found = [t.ljust(longest, ".") for t in found]  # one length, so that no row cuts a document
    return found[:-200], found[-200:]


def documents(task: str, count: int) -> list[Asked]:
    rng = random.Random(f"test {task}")
    return [TASKS[task][0](rng) for _ in range(count)]


def nats(model: MaskedModel, direction: str, items: list[Asked]) -> np.ndarray:
    """[documents, positions] -log p of what stands at each position, given what stands before it and nothing behind.

    Read both ways, the position and all behind it, to the length of a training document, are hidden:
    [CLS] ... [MASK] ... [MASK] [SEP].
    """
    t, rows, positions, targets = model.tokenizer, [], [], []
    for text, at, _ in items:
        ids = [t.bos, *t.encode(text)]
        if direction == FORWARD:
            rows.append(ids)
            positions.append([p + 1 for p in at])
            targets.append([ids[p + 1] for p in at])
        else:
            rows += [[*ids[: p + 1], *[t.mask] * (ROW - 2 - p), t.eos] for p in at]
            positions += [[p + 1] for p in at]
            targets += [[ids[p + 1]] for p in at]
    return -np.concatenate(asked(model, rows, positions, targets)).reshape(len(items), -1)


def run(lab: ExperimentRunner) -> Result:
    n = max(8, lab.size.items // 4)

    def measured(arm: str, seed: int) -> dict[str, list[list[float]]]:
        model = lab.toy("in-context", arm, seed, texts, row=4 * ROW, mask_rate=0.5, batch_size=8, longer=2)
        (direction, asks), *_ = directions(model).items()
        return {task: nats(asks, direction, documents(task, n)).tolist() for task in TASKS}

    arms = lab.arms("causal", "masked")
    found = {a: [lab.part(f"in-context-{a}-{s}", lambda a=a, s=s: measured(a, s)) for s in lab.seeds] for a in arms}
    best = {t: (-np.log([[p[0] for p in ps] for *_, ps in documents(t, n)])).mean(axis=0).tolist() for t in TASKS}
    return conclude(found, best)


def parts(curves: Any) -> tuple[np.ndarray, np.ndarray]:
    """(early, late): the mean over the first and the last third of the answers, the last axis."""
    curves = np.asarray(curves, float)
    third = max(1, curves.shape[-1] // 3)
    return curves[..., :third].mean(axis=-1), curves[..., -third:].mean(axis=-1)


def conclude(found: dict[str, list[dict[str, Any]]], best: dict[str, list[float]]) -> Result:
    """`found` has nats [documents][answers] of each seed's model, by task; `best` the mean over documents of the best reader."""
    figures, rows, gains = [], [], {}
    rule = "nats per answer in the first third of a document minus the last third; what stands behind is not shown"
    for task, (_, guess) in TASKS.items():
        early, late = parts(best[task])
        for arm, runs in found.items():
            begins, ends = parts([r[task] for r in runs])
            gain = gains[arm, task] = begins - ends
            last = mean(ends)
            figures.append(
                Measurement(f"{task}, {arm}: early minus late", mean(gain), rule, expected=early - late, baseline=0.0)
            )
            figures.append(
                Measurement(f"{task}, {arm}: late", last, "nats per answer", expected=late, baseline=-np.log(guess))
            )
            first = mean(begins)
            rows.append(
                [
                    task,
                    arm,
                    str(first),
                    str(last),
                    format_difference(mean(gain)),
                    f"{early:.3f}",
                    f"{late:.3f}",
                    f"{-np.log(guess):.3f}",
                ]
            )
    used = {arm: mean(np.mean([gains[arm, t] for t in TASKS], axis=0)) for arm in found}
    pictured = []
    for task in ("few-shot labels", "regression"):
        series = {
            a: [(i + 1, mean([[d[i] for d in r[task]] for r in runs])) for i in range(len(best[task]))]
            for a, runs in found.items()
        }
        series["best possible"] = [(i + 1, Estimate(v, v, v, 1)) for i, v in enumerate(best[task])]
        guess = float(-np.log(TASKS[task][1]))
        picture = pictures.curves(series, "example in the document", "loss, nats", a_guess=guess)
        pictured.append((picture, f"{task.capitalize()}: loss on the n-th answer."))
    finding = f"The loss of the causal model falls by {format_difference(used['causal'], ' nats', sign='')} along a document (mean of four tasks"
    share = used["causal"].value / np.mean([np.subtract(*parts(best[t])) for t in TASKS])
    finding += f", {share:.0%} of what the best possible predictor achieves)"
    if "masked" in found:
        late_of = {a: np.mean([parts([r[t] for r in found[a]])[1] for t in TASKS], axis=0) for a in ("causal", "masked")}
        at, other = (str(mean(late_of[a])) for a in ("causal", "masked"))
        finding += f". Late in a document its loss is {at} nats per answer, that of the masked model on the same answers {other} "
        finding += f"(difference {format_difference(difference(late_of['masked'], late_of['causal']))})"
    return Result(
        verdict(used["causal"]),
        finding + ".",
        f"{len(found['causal'])} seeds, the same documents for all; intervals account for both. The weights cannot hold the answers, "
        "which are drawn anew for each document. The best possible predictor knows the rules and computes the exact posterior.",
        figures,
        [
            Table(
                "Nats per answer in the first and the last third of a document",
                ("task", "model", "early", "late", "gain", "best early", "best late", "guess"),
                rows,
            )
        ],
        pictured,
        f"{format_difference(used['causal'], ' nats', sign='')} less loss along a document",
    )


EXPERIMENT = Experiment(
    "in-context",
    "The context changes what a GPT says next",
    "It is really the ability of GPTv3 to act on contextualized input so well, meaningfully changing next word probabilities "
    "based on contextual information.",
    "Documents whose answers follow from what stands before them in the same document, and from nothing else: a string repeated, "
    "pairs to recall, points on a line, labels to infer. The loss on the answers is measured along the document, beside that of "
    "the best possible predictor.",
    "Induction heads form early in training and carry in-context learning (Olsson et al. 2022); transformers learn linear "
    "functions in context as well as least squares (arXiv 2208.01066).",
    run,
    pilots=(
        Pilot(0.007, "nats gained along a document"),
        Pilot(0.028, "nats late in a document between masked and causal"),
    ),
)
