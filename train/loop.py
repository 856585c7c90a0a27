"""The training loop: one for every family, objective, mesh and number of hosts."""

import contextlib
import dataclasses
import functools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from bothways import rundir, sharding
from bothways.chips import PEAK_FLOPS
from bothways.data import corpora, pipeline, tokens
from bothways.data.tokenizer import Tokenizer
from bothways.errors import Diverged, InputError, Stopped
from bothways.flops import recipe_flops_per_token
from bothways.log import log
from bothways.recipes import Recipe
from bothways.registry import make_module, tiny_inputs
from bothways.train import hosts
from bothways.train.objectives import make_objective
from bothways.train.optimizer import make_optimizer
from bothways.train.report import Reporter
from bothways.train.start import check_start, start_from
from bothways.train.step import TrainState, init_state, make_eval_step, make_train_step, state_shardings


@dataclasses.dataclass(frozen=True)
class Result:
    run: str
    steps: int
    loss: float
    """Held-out, nats per predicted token."""
    bits_per_byte: float | None
    seconds: float
    tokens_per_second: float


def resolve(recipe: Recipe, tokenizer: Tokenizer) -> Recipe:
    """The recipe with all derived sizes filled in, as it is kept with the run."""
    size = recipe.model.vocab_size or len(tokenizer)
    if size < len(tokenizer):
        raise InputError(
            f"model.vocab_size={size} is smaller than the tokenizer's {len(tokenizer)} pieces; "
            "set --model.vocab-size 0 to follow the tokenizer, or a smaller --data.vocab-size"
        )
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model.resolved(), vocab_size=size))


def train(recipe: Recipe, workdir: str | Path) -> Result:
    """Train a recipe into a run directory, or resume the run that is there.

    Where weights come from is said, and decided, under "weights" below.

    Raises:
      InputError: the recipe cannot run here, or the directory holds another run.
      Stopped: SIGTERM came; everything is saved.
      Diverged: the loss was not finite for train.max_nonfinite_steps steps in a row.
    """
    home, cfg, writes = rundir.directory(workdir), recipe.train, jax.process_index() == 0
    tell = log if writes else lambda _: None
    began = time.monotonic()
    recipe.check(jax.device_count())
    if recipe.model.attention == "cudnn" and jax.default_backend() != "gpu":
        raise InputError(f"model.attention=cudnn is for GPUs, and this is a {jax.default_backend()}; set auto")
    existing = rundir.read_recipe(home) if (home / "recipe.json").exists() else None

    if existing is None and cfg.init_from:
        rundir.read_recipe(rundir.directory(cfg.init_from))  # else corpus and vocabulary would be prepared in vain

    # ---- data -------------------------------------------------------------------------------------------------
    with hosts.process_zero_first():
        corpus = corpora.load(recipe.data)
        if existing is not None:
            if not rundir.trained_on(home, corpus.fingerprint, *corpus.earlier):
                raise InputError(
                    f"data.corpus={recipe.data.corpus} is not the text that {home} was trained on; put that back, "
                    "or train into another directory with --workdir DIR"
                )
            tokenizer = Tokenizer.load(home)
        else:
            tell(f"reading {recipe.data.corpus}, preparing its tokenizer and token rows in {recipe.data.cache}")
            tokenizer = tokens.obtain_tokenizer(recipe.data, corpus)
        text, held_text = (tokens.prepare(corpus, s, tokenizer, recipe.data.cache) for s in ("train", "validation"))
    recipe = resolve(recipe, tokenizer)
    hosts.assert_equal_across_hosts(
        {"recipe": recipe.to_json(), "text": corpus.fingerprint, "tokenizer": tokenizer.fingerprint}
    )
    if existing is None and cfg.init_from:
        check_start(recipe, tokenizer)
    if existing is not None and (changed := existing.differences(recipe)):
        raise InputError(
            f"{home} holds a run of another recipe; its recipe -> yours:\n"
            + "\n".join(f"  - {c}" for c in changed)
            + "\ntrain into another directory with --workdir DIR, or delete this one"
        )
    objective = make_objective(recipe.objective, tokenizer.vocabulary(), recipe.data.separate_documents)
    lengths = {recipe.model.context_length, cfg.short_length} - {0}
    with hosts.process_zero_first():  # how pairs are packed into rows is kept too
        sources = {length: objective.source(text, length, False) for length in lengths}
        held_out = objective.source(held_text, recipe.model.context_length, True)

    # ---- model, optimizer, mesh -------------------------------------------------------------------------------
    mesh = sharding.make_mesh(recipe.mesh)
    module = make_module(recipe.family, recipe.model)
    optimizer = make_optimizer(recipe.optimizer, cfg.steps)

    def fresh(seed: Any) -> TrainState:
        return init_state(module, tiny_inputs(recipe.family), optimizer, seed)

    shapes = jax.eval_shape(fresh, 0)
    shardings = state_shardings(mesh, shapes, recipe.mesh.max_replicated_fraction)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes.params))
    if writes and existing is None:
        home.mkdir(parents=True, exist_ok=True)
        tokenizer.save_in(home)
        (home / "corpus.json").write_text(json.dumps({"fingerprint": corpus.fingerprint}))
    if writes and existing != recipe:  # of a run that goes on: what it may change, readers must see
        partial = home / ".recipe.json"
        partial.write_text(recipe.to_json())
        partial.replace(home / "recipe.json")

    # ---- weights ----------------------------------------------------------------------------------------------
    # The first of these that there is:
    # 1. the newest whole checkpoint of this run: resume;
    # 2. another run, named by train.init_from: its body if it was fine-tuned;
    # 3. a published checkpoint, which `bothways import` made a run, named likewise: so 2 and 3 are one line;
    # 4. scratch.
    manager = rundir.checkpoint_manager(home, keep=cfg.max_to_keep)
    start, state = _restore(manager, shapes, shardings) or (0, None)
    if state is None:
        state = jax.jit(fresh, out_shardings=shardings)(cfg.seed)  # not a constant: seeds share their programs
        if cfg.init_from:
            place = functools.partial(sharding.parameter_shardings, mesh)
            other = rundir.directory(cfg.init_from)
            state = state.replace(params=start_from(other, recipe.model, state.params, place))
    tell(
        f"{count:,} parameters, {len(text.ids):,} tokens of text, rows of {recipe.model.context_length}, "
        f"{jax.device_count()} {jax.devices()[0].device_kind} device(s)" + (f", resumed at step {start}" if start else "")
    )
    if note := getattr(sources[recipe.model.context_length][0], "note", ""):
        tell(note)
    train_step = make_train_step(module, objective, optimizer, mesh, shardings, accumulate=cfg.grad_accum_steps)
    evaluate = Evaluator(recipe, objective, module, tokenizer, held_out, mesh, shardings.params)
    reporter = Reporter(home, cfg.steps, start, writes)
    meter = Throughput(recipe)

    def batches(step: int) -> Iterator[dict[str, np.ndarray]]:
        row, size = cfg.batch_at(step)
        length = cfg.short_length if step < cfg.short_steps else recipe.model.context_length
        rows, example = sources[length]
        mine = sharding.local_rows(mesh, size)
        return pipeline.training_batches(rows, example, batch_size=size, seed=cfg.seed, position=row, mine=mine)

    def save(step: int, metrics: dict[str, float] | None) -> None:
        if step in manager.all_steps():
            return
        rest = {k: getattr(state, k) for k in ("step", "opt_state", "consecutive_nonfinite", "bad_total")}
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            train=ocp.args.StandardSave(rest),
            meta=ocp.args.JsonSave({"step": step, "position": cfg.batch_at(step)[0], "seed": cfg.seed}),
        )
        manager.save(step, args=items, metrics=metrics)
        reporter.upload()

    # ---- steps ------------------------------------------------------------------------------------------------
    pending: tuple[int, dict[str, jax.Array], int] | None = None
    held: dict[str, float] | None = None
    new_shape_at = {first for first, _, _ in cfg.stages()} | {cfg.short_steps}
    tidy = jax.process_count() == 1  # of several, one that fails leaves at once: what waits for the others would hang
    try:
        with hosts.preemption_requested() as stop_at:
            iterator = batches(start)
            for step in range(start, cfg.steps):
                if step in new_shape_at and step > start:
                    iterator = batches(step)
                batch = sharding.to_global(mesh, next(iterator))
                state, metrics = train_step(state, batch, cfg.seed)
                if pending:  # the metrics of the step before, read while this one runs
                    _report(reporter, meter, *pending, cfg)
                size = sum(batch[name].size for name in ("tokens", "source") if name in batch)
                pending, done = (step + 1, metrics, size), step + 1
                last = done == cfg.steps
                held, stopping = None, stop_at(done)
                evaluating = done % cfg.eval_every == 0 or last
                if evaluating or stopping or step == start:  # the first is told when it is done
                    _report(reporter, meter, *pending, cfg)
                    pending = None
                if evaluating:
                    with meter.paused():
                        held = evaluate(state.params)
                    reporter.log(done, {f"eval_{k}": v for k, v in held.items()}, _shown_held(held))
                if done % cfg.save_every == 0 or last or stopping:
                    save(done, held)
                if stopping and not last:
                    manager.wait_until_finished()
                    raise Stopped(f"stopped by SIGTERM at step {done}; saved in {home}, run the same command to go on")
            if held is None:  # the run was complete already
                held = evaluate(state.params)
            manager.wait_until_finished()
        tidy = True
    except (Stopped, Diverged):  # on every process
        tidy = True
        raise
    finally:
        reporter.close()
        if tidy:
            reporter.plot()
            manager.close()
    bpb = held.get("bits_per_byte")
    return Result(str(home), cfg.steps, held["loss"], bpb, time.monotonic() - began, meter.tokens_per_second)


def _restore(manager: ocp.CheckpointManager, shapes: TrainState, shardings: TrainState) -> tuple[int, TrainState] | None:
    """The newest whole checkpoint, placed on this mesh; None if there is none."""
    targets = jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), shapes, shardings)
    rest = {k: getattr(targets, k) for k in ("step", "opt_state", "consecutive_nonfinite", "bad_total")}
    items = ocp.args.Composite(params=ocp.args.StandardRestore(targets.params), train=ocp.args.StandardRestore(rest))

    def restore(step: int) -> TrainState:
        found = manager.restore(step, args=items)
        return TrainState(params=found["params"], **found["train"])

    found = rundir.restore_latest_readable(manager, restore, log)
    if found is not None:
        for step in manager.all_steps():
            if step > found[0]:
                manager.delete(step)  # damaged: the run writes this step again
    return found


def _shown_held(held: dict[str, float]) -> str:
    bpb = f", {held['bits_per_byte']:.3f} bits per byte" if "bits_per_byte" in held else ""
    return f"held-out loss {held['loss']:.3f}{bpb}"


def _report(
    reporter: Reporter, meter: "Throughput", step: int, metrics: dict[str, jax.Array], size: int, cfg: Any
) -> None:
    values = {k: float(v) for k, v in metrics.items()}
    meter.count(size)
    bad = int(values.pop("consecutive_nonfinite"))
    if bad:
        reporter.note(
            f"step {step}: loss {values['loss']}, not applied ({bad} in a row, {int(values['bad_total'])} in all)"
        )
    if bad >= cfg.max_nonfinite_steps:
        raise Diverged(
            f"{bad} steps in a row had no finite loss; stopped at step {step}. The last checkpoint is intact. "
            "Try a lower --optimizer.learning-rate or a longer --optimizer.warmup-steps"
        )
    if step % cfg.log_every == 0 or step == cfg.steps:
        shown = f"loss {values['loss']:.3f}"
        if meter.tokens:  # the first step has no speed yet
            values["tokens_per_second"] = meter.tokens_per_second
            shown += f"  {meter.tokens_per_second:,.0f} tokens/s"
            if meter.mfu is not None:
                values["mfu"] = meter.mfu
                shown += f"  MFU {meter.mfu:.1%}"
        reporter.log(step, values, shown)
    else:
        reporter.advance(step)


class Throughput:
    """Tokens per second and MFU, evaluations and the first step's compilation left out."""

    def __init__(self, recipe: Recipe):
        self.flops = recipe_flops_per_token(recipe)
        self.peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
        self.tokens = 0
        self.clock: float | None = None
        self.spent = self.away = 0.0

    def count(self, tokens: int) -> None:
        if self.clock is None:
            self.clock = time.monotonic()  # the first step is done: compiled
        else:
            self.tokens += tokens
            self.spent = time.monotonic() - self.clock - self.away

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        left = time.monotonic()
        yield
        self.away += time.monotonic() - left

    @property
    def tokens_per_second(self) -> float:
        """Up to the last step that was counted."""
        return self.tokens / max(1e-9, self.spent)

    @property
    def mfu(self) -> float | None:
        """Model FLOP utilisation (arXiv 2204.02311, appendix B); None where the chip's peak is not known."""
        return self.tokens_per_second * self.flops / (self.peak * jax.device_count()) if self.peak else None


class Evaluator:
    """Held-out loss: parameters -> {"loss", "<term>", "<term>_accuracy", "bits_per_byte"}."""

    def __init__(self, recipe, objective, module, tokenizer, source, mesh, param_shardings):
        self.recipe, self.source, self.mesh = recipe, source, mesh
        self.step = make_eval_step(module, objective, mesh, param_shardings)
        lengths = tokenizer.byte_lengths()
        self.count_bytes = jax.jit(
            lambda targets, weights: jnp.sum(jnp.where(weights > 0, jnp.asarray(lengths)[targets], 0))
        )

    def __call__(self, params: Any) -> dict[str, float]:
        cfg = self.recipe.train
        batch_size = cfg.batch_size // cfg.grad_accum_steps  # no more at once than training has
        sums: dict[str, np.ndarray] = {}
        size = 0
        mine = sharding.local_rows(self.mesh, batch_size)
        options = {"batch_size": batch_size, "seed": cfg.seed, "limit": cfg.eval_rows, "mine": mine}
        for rows in pipeline.evaluation_batches(*self.source, **options):
            batch = sharding.to_global(self.mesh, rows)
            size += int(self.count_bytes(batch["targets"], batch["weights"]))
            for name, term in self.step(params, batch).items():
                sums[name] = sums.get(name, 0) + np.array([float(x) for x in term])
        held = {name: nats / weight for name, (nats, _, weight) in sums.items()}
        held["loss"] = sum(held.values())
        held |= {f"{name}_accuracy": correct / weight for name, (_, correct, weight) in sums.items()}
        if "nll" in sums:
            held["bits_per_byte"] = float(sums["nll"][0] / math.log(2) / size)
        return {name: float(value) for name, value in held.items()}
