"""One candidate of fine-tuning, a learning rate and a seed, as a job for the loop; and what its parameters reach on a split."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

from bothways import checkpoints, rundir, sharding
from bothways.config import FinetuneConfig, OptimizerConfig, TrainConfig
from bothways.data import metrics, task_batches
from bothways.data.task_examples import TaskRows, decisions, label_weights
from bothways.data.tasks import Task
from bothways.flops import training_flops_per_token
from bothways.log import log
from bothways.model import adapters
from bothways.model.axes import activation_shardings
from bothways.rundir import Run, TaskInfo
from bothways.train.objectives.core import Batch
from bothways.train.objectives.labels import inputs, item_weights, span_scores, task_loss, task_objective
from bothways.train.optimizer import make_optimizer
from bothways.train.step import TrainState, make_train_step, state_shardings
from bothways.train.steps import Job, Throughput


class FinetuneRunner:
    """One task on one body: compiled once for each batch length, run for every learning rate and seed.

    Args:
      cfg: settled.

    Raises:
      InputError: a task whose items do not fit together, or a mesh that the body does not divide over.
    """

    def __init__(self, run: Run, task: Task, cfg: FinetuneConfig):
        self.mesh = sharding.make_mesh(cfg.mesh)
        placed = jax.device_put(run.params, sharding.parameter_shardings(self.mesh, run.params))
        self.task, self.cfg, self.lead = task, cfg, task.metrics[0]
        self.run = dataclasses.replace(run, params=placed)
        model = dataclasses.replace(run.recipe.model, lora=cfg.lora)
        self.recipe = dataclasses.replace(run.recipe, model=model)  # of the run that comes of it
        longest = cfg.length or run.recipe.model.context_length
        trained = run.recipe.objective  # a text is read as it was in training
        whole_rows = trained.kind == "diffusion" and set(trained.block_sizes) == {0}
        both_ways = run.recipe.family == "bert" or trained.kind == "hybrid" or whole_rows
        null = "first" if both_ways else "last"
        how = {"no_answer": task.no_answer, "null_position": null, "both_ways": both_ways}
        self.info = TaskInfo(task.name, task.kind, task.labels, longest, task.metrics, cfg.pool, **how)
        self.module = rundir.module_of(self.recipe, self.info).clone(dropout=cfg.dropout)
        counts = {"train": label_weights(cfg.class_weights, task)}
        self.rows = {
            split: TaskRows(items, task, run.tokenizer, longest, null, counts.get(split))
            for split, items in task.splits.items()
        }
        self.sizes = task_batches.batch_lengths(np.concatenate([r.lengths for r in self.rows.values()]), longest)
        devices = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        self.batch_size = -(-cfg.batch_size // devices) * devices
        self.per_epoch = max(1, len(self.rows["train"]) // self.batch_size)
        self.steps = self.per_epoch * cfg.epochs
        self._programs()

    def _programs(self) -> None:
        """`fresh`: (key, peak learning rate, the body's parameters or None for random ones) -> state, without what is
        frozen; `frozen`, the body that adapters are for, or None; the train step; the scores and loss of a batch."""
        cfg, model = self.cfg, self.recipe.model
        unit = OptimizerConfig(  # updates are proportional to the rate, which comes behind them
            name=cfg.optimizer,
            learning_rate=1.0,
            adam_learning_rate=1.0,
            schedule="linear",
            warmup_steps=min(self.steps - 1, round(cfg.warmup_share * self.steps)),
            b2=0.999,
            eps=1e-6,
            weight_decay=cfg.weight_decay,
        )
        optimizer = optax.chain(make_optimizer(unit, self.steps), optax.inject_hyperparams(optax.scale)(step_size=1.0))

        def fresh(key: jax.Array, rate: jax.Array, body: Any) -> TrainState:
            tokens = jnp.zeros((1, 2), jnp.int32)
            params = self.module.init(key, tokens, tokens + 1, tokens)["params"]
            frozen = None
            if cfg.lora.rank:
                params, frozen = adapters.split(params)
                frozen = jax.tree.map(lambda x, s: x.astype(s.dtype), frozen, adapters.frozen_types(frozen, model))
            else:
                params = params | ({} if body is None else {"body": body})
            zero, opt_state = jnp.zeros((), jnp.int32), optimizer.init(params)
            opt_state[-1].hyperparams["step_size"] = jnp.asarray(rate, jnp.float32)
            return TrainState(zero, params, opt_state, zero, zero, frozen)

        self.shapes = jax.eval_shape(fresh, jax.random.key(0), 1.0, self.run.params)
        self.shardings = state_shardings(self.mesh, self.shapes, cfg.mesh.max_replicated_fraction)
        self.fresh = jax.jit(
            lambda *given: fresh(*given).replace(frozen=None), out_shardings=self.shardings.replace(frozen=None)
        )
        self.frozen = None
        if cfg.lora.rank:
            body = {"body": adapters.of_base(self.run.params, self.shapes.frozen["body"])}
            placed = jax.tree.map(lambda x, s: x.astype(s.dtype), body, self.shapes.frozen)
            self.frozen = jax.device_put(placed, self.shardings.frozen)
        kind, objective = self.task.kind, task_objective(self.task.kind, cfg.lm_weight)
        self.step = make_train_step(
            self.module, objective, optimizer, self.mesh, self.shardings, vmem_kib=cfg.mesh.vmem_kib
        )

        def read(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
            with activation_shardings(sharding.activation_sharding_fn(self.mesh)):
                scores = self.module.apply({"params": params}, *inputs(kind, batch))
                loss = task_loss(kind, scores, batch)
            scores = jnp.stack(span_scores(scores, batch), axis=-1) if kind == "span" else scores
            return scores, loss.nats, jnp.sum(item_weights(batch))

        batch_spec = sharding.batch_sharding(self.mesh)
        self.read = jax.jit(read, in_shardings=(self.shardings.weights, batch_spec))

    def job(self, home: Path, rate: float, seed: int, pretrained: bool) -> Job:
        """The candidate of this rate and seed, from the run's weights or from random ones, kept in `home`."""
        cfg, name = self.cfg, f"rate {rate:g}, seed {seed}{'' if pretrained else ', from random weights'}"

        def begin() -> TrainState:
            return self.fresh(jax.random.key(seed), rate, self.run.params if pretrained else None)

        def batches(step: int) -> Iterator[dict[str, np.ndarray]]:
            return task_batches.training_batches(self.rows["train"], self.sizes, self.batch_size, seed, step)

        def evaluate(params: Any) -> dict[str, float]:
            found = self.measure(params, "validation")
            # Of epochs with the same metric, as there are many on few items, the one with the lower loss.
            tie = 1e-6 * found["loss"] / (1 + found["loss"])
            return found | {"selection": tie - found[self.lead]}

        def announce(start: int) -> None:
            resumed = f", resumed at step {start}" if start else ""
            log(f"  {name}: {self.steps} steps of {self.batch_size} items, lengths {self.sizes}{resumed}")

        mean = math.ceil(self.rows["train"].lengths.mean())
        model = dataclasses.replace(self.run.recipe.model, context_length=mean)
        flops = training_flops_per_token(model, causal=False, predicted_share=0.0)
        return Job(
            home=home,
            cfg=TrainConfig(
                steps=self.steps,
                batch_size=self.batch_size,
                seed=seed,
                log_every=max(1, self.per_epoch // 4),
                eval_every=self.per_epoch,
                save_every=self.per_epoch,
                save_every_minutes=cfg.save_every_minutes,
                max_to_keep=1,
                patience=cfg.patience,
            ),
            mesh=self.mesh,
            shapes=self.shapes,
            shardings=self.shardings,
            begin=begin,
            frozen=lambda: jax.tree.map(jnp.copy, self.frozen),  # a step consumes its state
            batches=batches,
            step=self.step,
            evaluate=evaluate,
            meter=Throughput(flops),
            announce=announce,
            shown=functools.partial(shown, self.task.metrics),
        )

    def best(self, home: Path) -> tuple[int, float, Any]:
        """(step, validation metric, trained parameters) of the epoch of a candidate that was best on validation, on the
        mesh."""
        targets = jax.tree.map(
            lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), self.shapes.params, self.shardings.params
        )
        with checkpoints.checkpoint_manager(home, read_only=True) as manager:

            def restore(step: int) -> Any:
                return manager.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(targets)))["params"]

            step, params = checkpoints.restore_step(manager, restore, checkpoints.best_step(manager))
            return step, manager.metrics(step)[self.lead], params

    def answers(self, params: Any, split: str) -> tuple[list[tuple[Any, Any]], float]:
        """(answer, probability) of every item of a split, and the loss per item or word.

        Args:
          params: all of them, or what is trained of them.
        """
        params = adapters.join(params, self.frozen)
        rows, items, kind = self.rows[split], self.task.splits[split], self.task.kind
        scores: list[Any] = [None] * len(rows)
        nats = weight = 0.0
        for chosen, batch in task_batches.evaluation_batches(rows, self.sizes, self.batch_size):
            found, *sums = jax.device_get(self.read(params, sharding.to_global(self.mesh, batch)))
            nats, weight = nats + float(sums[0]), weight + float(sums[1])
            found = found.reshape(self.batch_size, -1) if kind == "choice" else found
            for i, row in zip(chosen, found, strict=False):
                scores[i] = row[: rows.lengths[i]] if kind in ("tag", "span") else row
        return decisions(self.info, scores, rows.examples, rows.item_of, items), nats / max(weight, 1e-9)

    def measure(self, params: Any, split: str) -> dict[str, float]:
        """Every metric of the task on a split, the loss, and of labels and choices the calibration error."""
        return self.measures(*self.answers(params, split), split)

    def measures(self, found: list[tuple[Any, Any]], loss: float, split: str) -> dict[str, float]:
        """What `measure` gives, of answers that are there."""
        gold, got = self.gold(split), [answer for answer, _ in found]
        measured = {"loss": loss} | {m: metrics.compute(m, gold, got) for m in self.task.metrics}
        confidences, right = metrics.decisions_of(self.task.kind, gold, found)
        return measured | ({"calibration_error": metrics.calibration_error(confidences, right)} if right else {})

    def tested(self, params: Any) -> tuple[dict[str, float], list[list[int]] | None]:
        """`measure` on test, and how often each label was given for each; None where an item has not one of some labels."""
        found, loss = self.answers(params, "test")
        counts = None
        if self.task.kind in ("classify", "tag"):
            counts = metrics.confusion(self.task.labels, self.gold("test"), [answer for answer, _ in found])
        return self.measures(found, loss, "test"), counts

    def gold(self, split: str) -> list[Any]:
        """The right answers of a split, as metrics.compute wants them."""
        items = self.task.splits[split]
        if self.task.kind == "span":
            return [[text for _, text in item["answers"]] for item in items]
        if self.task.kind == "multilabel":
            return [frozenset(item["label"]) for item in items]
        return [item["label"] for item in items]


def shown(names: tuple[str, ...], held: dict[str, float]) -> str:
    return f"validation loss {held['loss']:.3f}, " + ", ".join(f"{name} {held[name]:.3f}" for name in names)
