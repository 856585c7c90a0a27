"""Fine-tuning: a head and the whole stack on a labelled task, over a grid of learning rates and seeds."""

import collections
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

from bothways import rundir, sharding
from bothways.config import FinetuneConfig, MeshConfig, OptimizerConfig
from bothways.data import metrics, pipeline
from bothways.data.examples import as_is
from bothways.data.task_examples import TaskRows, decisions
from bothways.data.tasks import Task
from bothways.errors import InputError
from bothways.log import log
from bothways.model.loss import TokenLoss, cross_entropy
from bothways.model.task import TaskModel
from bothways.rundir import Run, TaskInfo
from bothways.train.objectives import Batch, Objective, Sums, class_loss
from bothways.train.optimizer import make_optimizer
from bothways.train.step import TrainState, make_train_step, state_shardings


@dataclasses.dataclass(frozen=True)
class Finetuned:
    run: str
    task: str
    metric: str
    value: float
    """Mean over seeds of what `tested_on` names, at the learning rate that was best on `selected_on`."""
    interval: tuple[float, float]
    """95 %, over seeds."""
    n: int
    """Items that it is measured on."""
    baselines: dict[str, float]
    selected_on: str
    """What epoch, learning rate and seed were chosen on, in words."""
    tested_on: str


def task_objective(kind: str, lm_weight: float) -> Objective:
    """The loss of a task, as train/step.py wants it; with lm_weight > 0 a GPT's own loss on the same text beside it."""

    def weights(batch: Batch) -> dict[str, jax.Array]:
        found = {"task": jnp.sum(batch["weight"])}
        return found | ({"lm": jnp.sum(batch["segments"][..., 1:] > 0).astype(jnp.float32)} if lm_weight else {})

    def terms(module: TaskModel, batch: Batch, deterministic: bool) -> Sums:
        fold = (lambda x: x.reshape(-1, x.shape[-1])) if kind == "choice" else (lambda x: x)
        tokens, segments, types = (fold(batch[k]) for k in ("tokens", "segments", "types"))
        features = module.features(tokens, segments, types, deterministic)
        scores, weight = module.read(features, segments, deterministic), batch["weight"]
        match kind:
            case "classify":
                task = class_loss(scores, batch["label"], weight)
            case "choice":
                task = class_loss(scores.reshape(batch["label"].shape[0], -1), batch["label"], weight)
            case "regress":
                task = TokenLoss(jnp.sum(weight * jnp.square(scores[:, 0] - batch["label"])), jnp.zeros(()))
            case "tag":
                task = class_loss(scores.reshape(-1, scores.shape[-1]), batch["label"].reshape(-1), weight.reshape(-1))
            case "span":
                start, end = (
                    class_loss(x, batch[k], weight)
                    for x, k in zip(span_scores(scores, batch), ("start", "end"), strict=True)
                )
                task = TokenLoss((start.nats + end.nats) / 2, (start.correct + end.correct) / 2)
        sums = {"task": task}
        if lm_weight:
            seen = (segments[:, 1:] > 0).astype(jnp.float32)
            lm = cross_entropy(features[:, :-1], *module.body.unembedding(), tokens[:, 1:], seen)
            sums["lm"] = TokenLoss(lm_weight * lm.nats, lm.correct)
        return sums

    return Objective(lambda *_: (None, as_is), weights, terms)


def span_scores(scores: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Scores [B, T] of each place to be the start and the end; only the document's places and bos may be."""
    allowed = (batch["begin_char"] >= 0) | (jnp.arange(scores.shape[1]) == 0)
    return tuple(jnp.where(allowed, scores[..., i].astype(jnp.float32), -1e30) for i in range(2))


class Tuner:
    """One task on one body: compiled once, run for every learning rate and seed."""

    def __init__(self, run: Run, task: Task, cfg: FinetuneConfig):
        cfg = cfg.settled(sum(x.size for x in jax.tree.leaves(run.params)), run.recipe.optimizer.name)
        self.mesh = sharding.make_mesh(MeshConfig())
        placed = jax.device_put(run.params, sharding.parameter_shardings(self.mesh, run.params))
        self.run, self.task, self.cfg = dataclasses.replace(run, params=placed), task, cfg
        self.length = cfg.length or run.recipe.model.context_length
        self.info = TaskInfo(task.name, task.kind, task.labels, self.length, task.metrics, cfg.pool)
        self.module = rundir.module_of(run.recipe, self.info).clone(dropout=cfg.dropout)
        self.rows = {split: TaskRows(items, task, run.tokenizer, self.length) for split, items in task.splits.items()}
        self.batch_size = -(-cfg.batch_size // jax.device_count()) * jax.device_count()
        self.per_epoch = max(1, len(self.rows["train"]) // self.batch_size)
        self.objective = task_objective(task.kind, cfg.lm_weight)
        self.fresh, self.step = self._programs()
        self._predict = jax.jit(lambda params, batch: self._scores(params, batch))

    def _scores(self, params: Any, batch: Batch) -> Any:
        fold = (lambda x: x.reshape(-1, x.shape[-1])) if self.task.kind == "choice" else (lambda x: x)
        inputs = [fold(batch[k]) for k in ("tokens", "segments", "types")]
        scores = self.module.apply({"params": params}, *inputs)
        return span_scores(scores, batch) if self.task.kind == "span" else scores

    def _programs(self) -> tuple[Callable, Callable]:
        """Jitted: (key, peak learning rate, the body's parameters or None for random ones) -> state; and the train step."""
        steps = self.per_epoch * self.cfg.epochs
        unit = OptimizerConfig(  # updates are proportional to the rate, which comes behind them
            name=self.cfg.optimizer,
            learning_rate=1.0,
            adam_learning_rate=1.0,
            schedule="linear",
            warmup_steps=min(steps - 1, round(self.cfg.warmup_share * steps)),
            b2=0.999,
            eps=1e-6,
            weight_decay=self.cfg.weight_decay,
        )
        optimizer = optax.chain(make_optimizer(unit, steps), optax.inject_hyperparams(optax.scale)(step_size=1.0))

        def fresh(key: jax.Array, rate: jax.Array, body: Any) -> TrainState:
            tokens = jnp.zeros((1, 2), jnp.int32)
            params = self.module.init(key, tokens, tokens + 1, tokens)["params"]
            params = params | ({} if body is None else {"body": body})
            zero, opt_state = jnp.zeros((), jnp.int32), optimizer.init(params)
            opt_state[-1].hyperparams["step_size"] = jnp.asarray(rate, jnp.float32)
            return TrainState(zero, params, opt_state, zero, zero)

        shardings = state_shardings(self.mesh, jax.eval_shape(fresh, jax.random.key(0), 1.0, self.run.params))
        step = make_train_step(self.module, self.objective, optimizer, self.mesh, shardings)
        return jax.jit(fresh, out_shardings=shardings), step

    def fit(self, rate: float, seed: int, pretrained: bool) -> tuple[float, Any]:
        """(best validation metric, the parameters that had it)."""
        state = self.fresh(jax.random.key(seed), rate, self.run.params if pretrained else None)
        batches = pipeline.training_batches(self.rows["train"], as_is, batch_size=self.batch_size, seed=seed)
        best, kept, worse = -np.inf, None, 0
        for epoch in range(self.cfg.epochs):
            for _ in range(self.per_epoch):
                state, numbers = self.step(state, sharding.to_global(self.mesh, next(batches)), seed)
            value = self.measure(state.params, "validation")[self.task.metrics[0]]
            if kept is None or value > best:
                best, kept, worse = value, jax.device_get(state.params), 0
            else:
                worse += 1
            how = "fine-tuned" if pretrained else "from scratch"
            log(
                f"  {how}, rate {rate:g}, seed {seed}, epoch {epoch + 1}: loss {float(numbers['task']):.3f}, "
                f"validation {self.task.metrics[0]} {value:.3f}"
            )
            if worse >= self.cfg.patience:
                break
        return float(best), kept

    def measure(self, params: Any, split: str) -> dict[str, float]:
        """Every metric of the task on a split."""
        rows, items = self.rows[split], self.task.splits[split]
        scores = []
        for begin in range(0, len(rows), self.batch_size):
            part = rows[np.minimum(np.arange(begin, begin + self.batch_size), len(rows) - 1)]
            found = jax.device_get(self._predict(params, part))
            scores.append(np.stack(found, axis=-1) if self.task.kind == "span" else found)
        flat = np.concatenate(scores)[: len(rows) * (len(items[0]["choices"]) if self.task.kind == "choice" else 1)]
        got = decisions(self.info, flat, rows.examples, rows.item_of, items)
        if self.task.kind == "span":
            gold: list[Any] = [[text for _, text in item["answers"]] for item in items]
        else:
            gold = [item["label"] for item in items]
        answers = [g[0] for g in got]
        if self.task.kind == "tag":  # words past the length were never read
            answers = [a + [self.task.labels[-1]] * (len(g) - len(a)) for a, g in zip(answers, gold, strict=True)]
        return {m: metrics.compute(m, gold, answers) for m in self.task.metrics}


def baselines_of(task: Task) -> dict[str, float]:
    """What a guess and counting words reach on the same test split."""
    found: dict[str, float] = {}
    lead, test = task.metrics[0], task.splits["test"]
    if task.kind == "classify":
        common = collections.Counter(item["label"] for item in task.splits["train"]).most_common(1)[0][0]
        gold = [item["label"] for item in test]
        found["majority"] = metrics.compute(lead, gold, [common] * len(gold))

        def joined(items: list[dict]) -> list[str]:
            return [f"{item['text']} {item.get('text_b', '')}" for item in items]

        guesses = metrics.naive_bayes(
            joined(task.splits["train"]), [i["label"] for i in task.splits["train"]], joined(test)
        )
        if guesses is not None:
            found["naive_bayes"] = metrics.compute(lead, gold, guesses)
    return found


def finetune(run: Run, task: Task, workdir: str | Path, cfg: FinetuneConfig) -> Finetuned:
    """Tune a run's whole stack and a new head on a task; the best run is kept in `workdir`.

    Weights come from the run; the head is random. For every learning rate and seed the epoch that is best on
    validation counts; the rate with the best mean over seeds is reported, on test.

    Raises:
      InputError: numbers out of range, or a directory that holds something already.
      OSError: a directory that cannot be written; nothing is trained.
    """
    home = rundir.directory(workdir)
    cfg.check(run.recipe.objective.kind, run.recipe.model.context_length)
    if home.exists() and (not home.is_dir() or any(home.iterdir())):
        raise InputError(f"{home} exists already; give another directory with --workdir")
    tuner, lead = Tuner(run, task, cfg), task.metrics[0]
    home.mkdir(parents=True, exist_ok=True)  # the grid takes long: a place that cannot be written is known before it
    probe = home / ".writable"
    probe.write_text("")
    probe.unlink()
    counts = {split: len(items) for split, items in task.splits.items()}
    log(f"{task.name}: {task.kind}, " + ", ".join(f"{n} {split}" for split, n in counts.items()))
    log(f"  epoch, rate and seed are chosen on {task.selected_on}; reported is {task.tested_on}")
    if task.kind == "classify":
        shares = collections.Counter(item["label"] for item in task.splits["train"])
        log("  labels: " + ", ".join(f"{label} {n / counts['train']:.0%}" for label, n in shares.most_common()))
    baselines = baselines_of(task)

    def grid(pretrained: bool) -> tuple[list[dict[str, float]], Any, float]:
        tried: dict[float, list[tuple[float, Any]]] = {}
        for rate in tuner.cfg.learning_rates:
            tried[rate] = [tuner.fit(rate, seed, pretrained) for seed in range(cfg.seeds)]
        best = max(tried, key=lambda rate: np.mean([value for value, _ in tried[rate]]))
        for rate, found in tried.items():
            mean, low, high = metrics.mean_interval([value for value, _ in found])
            log(f"  rate {rate:g}: validation {lead} {mean:.3f} [{low:.3f}, {high:.3f}] over {cfg.seeds} seeds")
        tests = [tuner.measure(params, "test") for _, params in tried[best]]
        return tests, max(tried[best], key=lambda found: found[0])[1], best

    tests, params, best = grid(pretrained=True)
    if cfg.scratch:
        scratch = [t[lead] for t in grid(pretrained=False)[0]]
        baselines["from_scratch"] = metrics.mean_interval(scratch)[0]
    save(home, run, params, tuner.info)
    mean, low, high = metrics.mean_interval([t[lead] for t in tests])
    others = {m: round(metrics.mean_interval([t[m] for t in tests])[0], 4) for m in task.metrics[1:]}
    log(f"  best rate {best:g}; test {lead} {mean:.4f}; " + ", ".join(f"{k} {v}" for k, v in others.items()))
    rounded = {k: round(v, 4) for k, v in baselines.items()}
    value, interval = round(mean, 4), (round(low, 4), round(high, 4))
    chosen_on = task.selected_on, task.tested_on
    return Finetuned(str(home), task.name, lead, value, interval, counts["test"], rounded, *chosen_on)


def save(home: Path, run: Run, params: Any, info: TaskInfo) -> None:
    """A fine-tuned run directory: the body's recipe and tokenizer, task.json, the parameters."""
    home.mkdir(parents=True, exist_ok=True)
    run.tokenizer.save_in(home)
    rundir.write_task(home, info)
    with rundir.checkpoint_manager(home, keep=1) as manager:
        manager.save(
            0, args=ocp.args.Composite(params=ocp.args.StandardSave(params), meta=ocp.args.JsonSave({"step": 0}))
        )
        manager.wait_until_finished()
    (home / "recipe.json").write_text(run.recipe.to_json())
