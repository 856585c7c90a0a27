"""Tasks in the input against heads: how many examples a prompt is worth, and what is shared between tasks."""

import itertools
from typing import Any

import numpy as np

from bothways.compare import pictures
from bothways.compare.core import Experiment, ExperimentRunner, Measurement, Pilot, Result, Table
from bothways.compare.labelled import TASKS, Item, Tuned, splits, tuned_accuracy
from bothways.compare.stats import (
    OPEN,
    all_of,
    format_difference,
    mean,
    mean_share,
    ranked,
    share_difference,
    verdict,
    within,
)

TASK = "denied"
COUNTS = (16, 64, 256)
SHARED, LEFT_OUT, FEW = 64, "number", 32
RULES = {
    "prompt": "the task's name and the text are the input, the answer is a word at a mask; the likelier of the two words",
    "head": "a linear head on the last token (BERT: the first); the higher of two outputs",
}


def shared(lab: ExperimentRunner, arm: str, rates: dict[str, float]) -> dict[str, list[list[int]]]:
    """[seeds][items of all tasks] right, of one model with prompts, one body with many heads, and a model for each task.

    All see the same items for the same number of steps: each of the separate models has its share of the steps.
    """
    found: dict[str, list[list[int]]] = {
        "one model, named tasks": [],
        "one body, many heads": [],
        "a model for each task": [],
    }
    steps, model = lab.size.tune_steps * 2, lab.text(arm, 0)
    ways = {
        "one model, named tasks": Tuned(model, "prompt", steps),
        "one body, many heads": Tuned(model, "head", steps, heads=len(TASKS)),
        "a model for each task": Tuned(model, "head", max(2, steps // len(TASKS))),
    }
    for seed, (name, tuned) in itertools.product(lab.seeds, ways.items()):
        tuned.model = lab.text(arm, seed)
        train, test = named_items(lab, list(TASKS), SHARED, seed)
        fresh, rate = tuned.fresh(seed), rates[tuned.how]
        if name == "a model for each task":
            right = [tuned.right(tuned.fit(fresh, {t: train[t]}, rate, seed), {t: test[t]}) for t in TASKS]
            found[name].append([int(r) for part in right for r in part])
        else:
            found[name].append(list(map(int, tuned.right(tuned.fit(fresh, train, rate, seed), test))))
    return found


def transferred(lab: ExperimentRunner, arm: str, rates: dict[str, float]) -> dict[str, list[list[int]]]:
    """[seeds][items] of the task left out, tuned on few examples: 1 where it is right only after having been tuned on the
    other tasks before, -1 where only without."""
    others = [t for t in TASKS if t != LEFT_OUT]
    found: dict[str, list[list[int]]] = {}
    for how in ("prompt", "head"):
        model = lab.text(arm, 0)
        before = Tuned(model, how, lab.size.tune_steps * 2, heads=len(others) if how == "head" else 1)
        after = Tuned(model, how, lab.size.tune_steps)
        found[how] = []
        for seed in lab.seeds:
            before.model = after.model = lab.text(arm, seed)
            train, _ = named_items(lab, others, SHARED, seed)
            few, test = named_items(lab, [LEFT_OUT], FEW, seed)
            fresh = after.fresh(seed)
            learned = before.fit(before.fresh(seed), train, rates[how], seed)
            body = learned if how == "prompt" else fresh | {"body": learned["body"]}
            with_, without = (after.right(after.fit(p, few, rates[how], seed), test) for p in (body, fresh))
            found[how].append([a - b for a, b in zip(with_, without, strict=True)])
    return found


def named_items(
    lab: ExperimentRunner, tasks: list[str], count: int, seed: int
) -> tuple[dict[str, list[Item]], dict[str, list[Item]]]:
    made = {t: splits(lab, t, count, seed) for t in tasks}
    return {t: m[0] for t, m in made.items()}, {t: m[2] for t, m in made.items()}


def worth(prompt: list[float], head: list[float], counts: tuple[int, ...]) -> float:
    """How many examples more the head needs to be as good as the prompt at the middle count; interpolated on log2 counts.

    As Le Scao and Rush (arXiv 2103.08493) count what a prompt is worth. Not a number where the head never gets there.

    >>> round(worth([0.5, 0.7, 0.9], [0.5, 0.5, 0.7], (16, 64, 256)))
    192
    """
    middle = len(counts) // 2
    level, best = prompt[middle], np.maximum.accumulate(head)
    if best[-1] < level:
        return float("nan")
    return float(2 ** np.interp(level, best, np.log2(counts)) - counts[middle])


def run(lab: ExperimentRunner) -> Result:
    arms = lab.arms("causal", "masked")
    curves = {
        (arm, how, n): tuned_accuracy(lab, arm, how, TASK, n)
        for arm in arms
        for how in ("prompt", "head")
        for n in COUNTS
    }
    rates = {arm: {how: curves[arm, how, SHARED]["rate"] for how in ("prompt", "head")} for arm in arms}
    many = {arm: lab.part(f"shared-{arm}", lambda a=arm: shared(lab, a, rates[a])) for arm in arms}
    moved = {arm: lab.part(f"transferred-{arm}", lambda a=arm: transferred(lab, a, rates[a])) for arm in arms}
    return conclude({k: v["test"] for k, v in curves.items()}, many, moved)


def conclude(curves: dict[tuple[str, str, int], list[list[int]]], many: dict[str, Any], moved: dict[str, Any]) -> Result:
    shown = {key: mean_share(values) for key, values in curves.items()}
    figures = [
        Measurement(f"{TASK}, {a}, {h}, {n} examples", e, RULES[h], baseline=0.5) for (a, h, n), e in shown.items()
    ]
    rows, series, gains = [], {}, []
    for arm, how in dict.fromkeys((a, h) for a, h, _ in curves):
        line = [shown[arm, how, n] for n in COUNTS]
        series[f"{arm}, {how}"] = list(zip(COUNTS, line, strict=True))
        rows.append([arm, how, *map(str, line)])
    for arm in many:
        prompt, head = ([shown[arm, how, n].value for n in COUNTS] for how in ("prompt", "head"))
        gain = share_difference(*(np.mean([curves[arm, h, n] for n in COUNTS], axis=0) for h in ("prompt", "head")))
        gains.append(gain)
        w = worth(prompt, head, COUNTS)
        worth_it = "not clear" if verdict(gain) == OPEN else f"{w:.0f}" if np.isfinite(w) else "head never as good"
        rows.append([arm, "prompt minus head, mean", format_difference(gain), "worth in examples", worth_it])
        figures.append(
            Measurement(
                f"prompt minus head, {arm}, mean of {len(COUNTS)} sizes",
                gain,
                "difference of accuracies, paired by seed",
                baseline=0.0,
            )
        )
    shared_rows, sharing = [], []
    for arm, ways in many.items():
        named, heads, _ = ways.values()
        apart = share_difference(named, heads)
        sharing.append(apart)
        figures += [
            Measurement(f"{name}, {arm}", mean_share(v), "mean accuracy over four tasks", baseline=0.5)
            for name, v in ways.items()
        ]
        shared_rows.append([arm, *(str(mean_share(v)) for v in ways.values()), format_difference(apart)])
    moves = {arm: {how: within(mean(v), -1.0, 1.0) for how, v in ways.items()} for arm, ways in moved.items()}
    for arm, ways in moves.items():
        for how, e in ways.items():
            figures.append(
                Measurement(
                    f"transfer to {LEFT_OUT}, {arm}, {how}", e, f"accuracy gained on {FEW} examples", baseline=0.0
                )
            )
    further = [share_difference(w["prompt"], w["head"]) for w in moved.values()]
    return Result(
        all_of(*map(verdict, [*gains, *sharing, *further])),
        f"A prompt, against a head, is {ranked(dict(zip((f'one task ({a})' for a in many), gains, strict=True)))}; "
        f"{ranked(dict(zip((f'four tasks in one model ({a})' for a in many), sharing, strict=True)))}; "
        f"{ranked(dict(zip((f'transfer to a new task ({a})' for a in moved), further, strict=True)))}.",
        f"{len(next(iter(curves.values())))} fine-tunings on one task, {len(next(iter(moved.values()))['head'])} on several, each with "
        "its own examples and head; intervals account for them and for items together; the learning rate of each cell is the best on "
        "validation. The claim holds only if prompts win in data, in sharing and in transfer, for both models.",
        figures,
        [
            Table(
                f"Accuracy on `{TASK}` after fine-tuning on n examples (guessing: 0.5)",
                ("model", "how", *map(str, COUNTS)),
                rows,
            ),
            Table(
                f"Four tasks, {SHARED} examples each, mean accuracy",
                ("model", "one model, prompts", "one body, many heads", "a model for each task", "prompts minus heads"),
                shared_rows,
            ),
            Table(
                f"What fine-tuning on the other tasks adds to `{LEFT_OUT}` with {FEW} examples",
                ("model", "prompt", "head"),
                [[arm, format_difference(w["prompt"]), format_difference(w["head"])] for arm, w in moves.items()],
            ),
        ],
        [
            (
                pictures.curves(series, "examples", "accuracy", log_x=True, at=COUNTS, a_guess=0.5),
                "Tuning on growing numbers of examples.",
            )
        ],
        "a prompt against a head: "
        + ", ".join(f"{format_difference(g)} ({a})" for a, g in zip(many, gains, strict=True)),
    )


EXPERIMENT = Experiment(
    "prompts",
    "Tasks put into the input share weights better than heads",
    "The way its input tasks are structure the task description alongside additional information do more closely mimic human "
    "language understanding. It seems reasonable this could lead to more of a sharing of weights across tasks vs the encoding of "
    "seperate tasks on the same network (which would be the bear case for BERT).",
    "The same models are fine-tuned with a prompt and answer words, and with a head, on 16 to 256 examples of generated tasks, at "
    "three learning rates each. Then on four tasks at once: one model with a prompt for each, one body with four heads, four models. "
    "Last, a held-out task is fine-tuned on few examples after the others.",
    "Le Scao and Rush (arXiv 2103.08493): a prompt is worth 3506 examples of MNLI, 752 of BoolQ, 282 of RTE, and -424 of WiC.",
    run,
    pilots=(
        Pilot(0.18, "of accuracy between a prompt and a head on one task", tuned=True),
        Pilot(0.089, "of accuracy between prompts and heads on four tasks"),
        Pilot(0.19, "of accuracy between what prompts and heads pass on"),
    ),
)
