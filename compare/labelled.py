"""Small labelled tasks with a written key, and fine-tuning on them: by a head, or by a prompt and the words that answer it."""

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bothways import sharding
from bothways.compare.core import ExperimentRunner, Model
from bothways.compare.text import WORDS
from bothways.config import MeshConfig, ObjectiveConfig, OptimizerConfig
from bothways.data import pipeline
from bothways.data.examples import as_is
from bothways.data.pipeline import Example
from bothways.data.task_examples import collated, wrap
from bothways.data.tokenizer import Tokenizer
from bothways.model.task import TaskModel
from bothways.rundir import TaskInfo, module_of
from bothways.sample.denoise import hidden_logits
from bothways.sample.directions import directions
from bothways.train.objectives import Batch, Objective, Sums, class_loss, make_objective
from bothways.train.optimizer import clip_by_global_norm, schedule
from bothways.train.step import TrainState, make_train_step, state_shardings

LENGTH, BATCH = 32, 64
ANSWERS = (" no", " true")
Item = tuple[str, int]
PEOPLE, THINGS = [*WORDS["m"], *WORDS["f"]], WORDS["n"]
PAST = {"love": "loved", "kill": "killed", "serve": "served", "hear": "heard", "know": "known"}


def roles(rng: random.Random) -> Item:
    """Does the second sentence say the same? Only who does it to whom decides."""
    a, b = rng.sample(PEOPLE, 2)
    verb, past = rng.choice(list(PAST.items()))
    same = rng.random() < 0.5
    second = (b, a) if same else (a, b)
    return f"The {a} did {verb} the {b}. The {second[0]} was {past} by the {second[1]}.", int(same)


def number(rng: random.Random) -> Item:
    """Is the subject many? The noun next to it has a number of its own."""
    many, other = rng.random() < 0.5, rng.random() < 0.5
    subject, near = rng.sample(THINGS, 2)
    return (
        f"The {subject}{'s' * many} of the {near}{'s' * other} will {rng.choice(WORDS['v'])} {rng.choice(PEOPLE)}.",
        int(many),
    )


def mentioned(rng: random.Random) -> Item:
    """Is the last one among the first three?"""
    things = rng.sample(THINGS, 4)
    yes = rng.random() < 0.5
    return (
        f"I see the {things[0]}, the {things[1]} and the {things[2]}. A {things[rng.randrange(3)] if yes else things[3]}.",
        int(yes),
    )


def denied(rng: random.Random) -> Item:
    """Do the two sentences agree? Either may be a denial."""
    who, what = rng.choice(PEOPLE), rng.choice(THINGS)
    first, second = rng.random() < 0.5, rng.random() < 0.5
    said = [f"The {who} did {'not ' * no}{rng.choice(['hear', 'know', 'love'])} the {what}." for no in (first, second)]
    return " ".join(said), int(first == second)


TASKS: dict[str, Callable[[random.Random], Item]] = {
    "roles": roles,
    "number": number,
    "mentioned": mentioned,
    "denied": denied,
}


def items(task: str, count: int, seed: int, without: Sequence[Item] = ()) -> list[Item]:
    """Items of a task, no two alike, and none among `without`; fewer where the task has no more."""
    rng, seen = random.Random(f"{task} {seed}"), {text for text, _ in without}
    found: list[Item] = []
    for _ in range(20 * count):
        text, label = TASKS[task](rng)
        if text not in seen:
            seen.add(text)
            found.append((text, label))
        if len(found) == count:
            break
    return found


def filled(ids: list[int], tokenizer: Tokenizer) -> Example:
    """One text with padding up to LENGTH."""
    rows = collated([wrap(ids, None, tokenizer, LENGTH)], LENGTH, tokenizer.pad)
    return {name: values[0] for name, values in rows.items()}


def headed(item: Item, tokenizer: Tokenizer, task: int = 0) -> Example:
    """For a head: the text alone."""
    return filled(tokenizer.encode(item[0]), tokenizer) | {
        "label": np.int32(item[1]),
        "weight": np.float32(1),
        "task": np.int32(task),
    }


def prompted(item: Item, tokenizer: Tokenizer, name: str) -> Example:
    """For a prompt: the task's name, the text, and a place for the answer, which is asked as a masked token."""
    ids = [*tokenizer.encode(f"{name}: {item[0]} Is it so?")[: LENGTH - 3], tokenizer.mask]
    answers = answer_ids(tokenizer)
    return {k: v for k, v in filled(ids, tokenizer).items() if k != "types"} | {
        "positions": np.arange(LENGTH, dtype=np.int32),
        "mask_positions": np.array([len(ids)], np.int32),
        "targets": np.array([answers[item[1]]], np.int32),
        "weights": np.ones(1, np.float32),
    }


def answer_ids(tokenizer: Tokenizer) -> list[int]:
    """The first tokens in which the answers differ."""
    return list(next(pair for pair in zip(*map(tokenizer.encode, ANSWERS), strict=False) if pair[0] != pair[1]))


def own_head(module: TaskModel, batch: Batch, deterministic: bool) -> jax.Array:
    """[B, 2] scores of each example's own task, of a head with two outputs per task."""
    features = module.features(batch["tokens"], batch["segments"], batch["types"], deterministic)
    scores = module.read(features, batch["segments"], deterministic)
    return scores.reshape(len(scores), -1, 2)[jnp.arange(len(scores)), batch["task"]]


def heads_objective() -> Objective:
    """Every example asks the head of its own task."""

    def terms(module: TaskModel, batch: Batch, deterministic: bool) -> Sums:
        return {"task": class_loss(own_head(module, batch, deterministic), batch["label"], batch["weight"])}

    return Objective(lambda *_: (None, as_is), lambda batch: {"task": jnp.sum(batch["weight"])}, terms)


@dataclasses.dataclass
class Tuned:
    """One way of tuning one model: `how` is head or prompt. One program for every rate, seed and set of examples.

    Args:
      heads: tasks that a head answers, two outputs each.
    """

    model: Model
    how: str
    steps: int
    heads: int = 1
    batch_size: int = 16

    def __post_init__(self):
        run, self.tokenizer = self.model.run, self.model.tokenizer
        self.mesh = sharding.make_mesh(MeshConfig())
        if self.how == "head":
            info = TaskInfo("", "classify", tuple(map(str, range(2 * self.heads))), LENGTH, ())
            self.module, objective = module_of(run.recipe, info), heads_objective()
            self._scores = jax.jit(lambda p, b: self.module.apply({"params": p}, b, True, method=own_head))
        else:
            scorer = list(directions(self.model).values())[-1]  # both ways, of a model that can
            self.module = scorer.run.module
            objective = make_objective(ObjectiveConfig(kind="masked"), self.tokenizer.vocabulary())
        falling = OptimizerConfig(schedule="linear", warmup_steps=max(1, self.steps // 10), final_lr_ratio=0.0)
        self.optimizer = optax.chain(
            clip_by_global_norm(1.0),
            optax.scale_by_adam(b2=0.98),
            optax.scale_by_schedule(schedule(falling, self.steps, 1.0)),
            optax.inject_hyperparams(optax.scale)(step_size=-1.0),
        )
        shardings = state_shardings(self.mesh, jax.eval_shape(self.state, self.fresh(0), 1.0))
        self.begin = jax.jit(self.state, out_shardings=shardings)
        self.step = make_train_step(self.module, objective, self.optimizer, self.mesh, shardings)

    def fresh(self, seed: int) -> Any:
        """The model's own parameters, and a new head where there is one."""
        body = self.model.run.params
        if self.how == "prompt":
            return body
        kernel = 0.02 * jax.random.normal(jax.random.key(seed), (self.model.recipe.model.d_model, 2 * self.heads))
        return {"body": body, "task_head": {"kernel": kernel, "bias": jnp.zeros(2 * self.heads)}}

    def state(self, params: Any, rate: Any) -> TrainState:
        zero, opt_state = jnp.zeros((), jnp.int32), self.optimizer.init(params)
        opt_state[-1].hyperparams["step_size"] = jnp.asarray(-rate, jnp.float32)
        return TrainState(zero, params, opt_state, zero, zero)

    def examples(self, named: dict[str, list[Item]]) -> list[Example]:
        if self.how == "head":
            return [headed(i, self.tokenizer, k) for k, part in enumerate(named.values()) for i in part]
        return [prompted(i, self.tokenizer, name) for name, part in named.items() for i in part]

    def fit(self, params: Any, named: dict[str, list[Item]], rate: float, seed: int) -> Any:
        """Parameters after `steps` steps on the items of some tasks."""
        state = self.begin(params, rate)
        rows = pipeline.training_batches(
            pipeline.Stacked(self.examples(named)), as_is, batch_size=self.batch_size, seed=seed
        )
        for _ in range(self.steps):
            state, _ = self.step(state, sharding.to_global(self.mesh, next(rows)), seed)
        return state.params

    def right(self, params: Any, named: dict[str, list[Item]]) -> list[bool]:
        """Whether each item is answered rightly."""
        labels = [label for part in named.values() for _, label in part]
        found: list[int] = []
        examples = self.examples(named)
        for rows in pipeline.evaluation_batches(pipeline.Stacked(examples), as_is, batch_size=BATCH, seed=0):
            if self.how == "head":
                scores = np.asarray(self._scores(params, rows))
            else:
                logits = hidden_logits(self.module, params, rows["tokens"], rows["segments"], rows["mask_positions"])
                scores = np.asarray(logits)[:, 0, answer_ids(self.tokenizer)]
            found += scores.argmax(axis=1).tolist()
        found = found[: len(labels)]  # the last batch is filled with nothing
        return [a == b for a, b in zip(found, labels, strict=True)]


def splits(lab: ExperimentRunner, task: str, count: int, seed: int) -> tuple[list[Item], list[Item], list[Item]]:
    """(train, validation, test): test is the same for every seed, train and validation are drawn by it. Of a task that has no
    more items than are wanted for test, half are left to the others."""
    test = items(task, lab.size.items, -1)
    test = test[: len(test) // 2] if len(test) < lab.size.items else test
    train = items(task, count, seed, test)
    return train, items(task, max(8, lab.size.items // 2), 1000 + seed, [*test, *train]), test


def best_rate(lab: ExperimentRunner, measure: Callable[[float, int], tuple[list[bool], list[bool]]]) -> dict[str, Any]:
    """Every rate with every seed: the rate that is best on validation; and with it every fine-tuning, [tunings][items] right
    on test.

    Args:
      measure: (rate, tuning) -> which items of validation and of test are right.
    """
    tried = {rate: [measure(rate, seed) for seed in lab.seeds] for rate in lab.size.rates}
    best = max(tried, key=lambda rate: np.mean([np.mean(v) for v, _ in tried[rate]]))
    more = [measure(best, tuning) for tuning in range(len(lab.seeds), lab.size.tunings)]
    return {
        "rate": best,
        "test": [list(map(int, t)) for _, t in (tried[best] + more)[: lab.size.tunings]],
        "validation": {str(r): [float(np.mean(v)) for v, _ in f] for r, f in tried.items()},
    }


def tuned_accuracy(lab: ExperimentRunner, arm: str, how: str, task: str, count: int) -> dict[str, Any]:
    """`best_rate` of one arm tuned on `count` examples; every fine-tuning has examples and a head of its own, and the
    pretrained models take turns."""

    def measure(rate: float, seed: int) -> tuple[list[bool], list[bool]]:
        model = lab.text(arm, lab.seeds[seed % len(lab.seeds)])
        if (arm, how) not in lab.programs:
            lab.programs[arm, how] = Tuned(model, how, lab.size.tune_steps)
        tuned = lab.programs[arm, how]
        tuned.model = model
        train, validation, test = splits(lab, task, count, seed)
        params = tuned.fit(tuned.fresh(seed), {task: train}, rate, seed)
        right = tuned.right(params, {task: [*validation, *test]})
        return right[: len(validation)], right[len(validation) :]

    return lab.part(f"tuned-{task}-{count}-{arm}-{how}", lambda: best_rate(lab, measure))
