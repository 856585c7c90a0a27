"""The loop itself: steps, evaluations, checkpoints, SIGTERM and resume, for whatever is trained."""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from bothways import checkpoints, sharding
from bothways.chips import PEAK_FLOPS
from bothways.config import TrainConfig
from bothways.errors import Diverged, Stopped
from bothways.formats import old_names_of_state
from bothways.log import log
from bothways.train import hosts
from bothways.train.profile import Trace
from bothways.train.report import Reporter
from bothways.train.step import Metrics, TrainState


@dataclasses.dataclass(frozen=True)
class Job:
    """Something to train: what is done at each step, and where its state is kept."""

    home: Path
    """The run directory: checkpoints, metrics, plot."""
    cfg: TrainConfig
    mesh: Mesh
    shapes: TrainState
    shardings: TrainState
    begin: Callable[[], TrainState]
    """The state before the first step; called only where there is no checkpoint."""
    batches: Callable[[int], Iterator[dict[str, np.ndarray]]]
    """This host's rows from a step on; called again where the shape of batches changes."""
    step: Callable[[TrainState, dict[str, jax.Array], int], tuple[TrainState, Metrics]]
    evaluate: Callable[[Any], dict[str, float]]
    """Parameters -> held-out numbers, `loss` among them. The checkpoint with the lowest `selection`, or else the lowest
    `loss`, is kept beside the newest, and is the one that train.patience counts from."""
    meter: "Throughput"
    frozen: Callable[[], Any] = lambda: None
    """Parameters that are used and never trained (TrainState.frozen)."""
    shown: Callable[[dict[str, float]], str] = lambda held: shown_held(held)
    """An evaluation for people, in a line."""
    announce: Callable[[int], None] = lambda start: None
    """Called with the first step, once the state is there."""
    profile: int = 0
    """Steps of which a trace is written, from the fourth of this process on, when everything is compiled."""


def run_steps(job: Job) -> dict[str, float]:
    """Run a job to its last step, from its newest readable checkpoint or from the beginning.

    Returns:
      the last evaluation.

    Raises:
      Stopped: SIGTERM came; everything is saved.
      Diverged: the loss was not finite for train.max_nonfinite_steps steps in a row.
    """
    home, cfg, writes, meter = job.home, job.cfg, jax.process_index() == 0, job.meter
    start, state = _restore(job) or (0, None)
    manager = checkpoints.checkpoint_manager(home, keep=cfg.max_to_keep)
    if state is None:
        state = job.begin()
    state = state.replace(frozen=job.frozen())
    job.announce(start)
    reporter = Reporter(home, cfg.steps, start, writes, cfg.tracker)
    save_now, trace = hosts.time_to_save(cfg.save_every_minutes, cfg.log_every), Trace(home, job.profile, start, writes)
    kept = {step: m for step in manager.all_steps() if (m := manager.metrics(step))}
    best_at = min(kept, key=lambda step: checkpoints.selection(kept[step]), default=0)
    best = checkpoints.selection(kept[best_at]) if kept else math.inf
    counted = max(kept, default=0)  # a checkpoint that SIGTERM made without an evaluation counts for nothing
    settled = bool(cfg.patience) and counted - best_at >= cfg.patience * cfg.eval_every

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

    def evaluated(step: int, stop_at: hosts.Preemption) -> dict[str, float]:
        with meter.paused(), stop_at.abandons():
            held = job.evaluate(state.weights)
        reporter.log(step, {f"eval_{k}": v for k, v in held.items()}, job.shown(held))
        return held

    # ---- steps ------------------------------------------------------------------------------------------------
    pending: tuple[int, dict[str, jax.Array], int] | None = None
    held: dict[str, float] | None = None
    new_shape_at = {first for first, _, _ in cfg.stages()} | {cfg.short_steps}
    tidy = jax.process_count() == 1  # of several, one that fails leaves at once: what waits for the others would hang
    try:
        with hosts.preemption_requested() as stop_at:
            if start and (start % cfg.eval_every == 0 or start == cfg.steps) and not manager.metrics(start):
                # A signal cut this off: the checkpoint gets what it lacks, so that it may be the best.
                held = evaluated(start, stop_at)
                with hosts.process_zero_first():
                    if writes:
                        checkpoints.add_metrics(home, start, held)
                manager.reload()
                if checkpoints.selection(held) < best:
                    best, best_at = checkpoints.selection(held), start
                settled = cfg.patience > 0 and start - best_at >= cfg.patience * cfg.eval_every
            iterator = job.batches(start)
            for step in range(start, start if settled else cfg.steps):
                if step in new_shape_at and step > start:
                    iterator = job.batches(step)
                with meter.paused():
                    trace.begin(step, state)
                batch = sharding.to_global(job.mesh, next(iterator))
                with jax.profiler.StepTraceAnnotation("train_step", step_num=step + 1):
                    state, metrics = job.step(state, batch, cfg.seed)
                with meter.paused():
                    trace.end(step + 1, state)
                if pending:  # the metrics of the step before, read while this one runs
                    _report(reporter, meter, *pending, cfg)
                size = sum(batch[name].size for name in ("tokens", "source") if name in batch)
                pending, done = (step + 1, metrics, size), step + 1
                last = done == cfg.steps
                held, stopping = None, stop_at(done)
                evaluating = (done % cfg.eval_every == 0 or last) and not stopping  # a notice gives 30 s: save first
                if evaluating or stopping or step == start:  # step 1 is logged synchronously
                    _report(reporter, meter, *pending, cfg)
                    pending = None
                if evaluating:
                    try:
                        held = evaluated(done, stop_at)
                    except hosts.Abandoned as e:
                        stopping = e.number
                if held is not None:
                    if checkpoints.selection(held) < best:
                        best, best_at = checkpoints.selection(held), done
                    last = last or (cfg.patience > 0 and done - best_at >= cfg.patience * cfg.eval_every)
                if save_now(done) or done % cfg.save_every == 0 or last or stopping:
                    save(done, held)
                if stopping:
                    manager.wait_until_finished()
                    raise _stopped(stopping, done, home)
                if last:
                    break
            if held is None:  # the run was complete already
                with stop_at.abandons():
                    held = job.evaluate(state.weights)
            manager.wait_until_finished()
        tidy = True
    except hosts.Abandoned as e:  # in an evaluation behind a checkpoint
        tidy = True
        raise _stopped(e.number, start, home) from e
    except (Stopped, Diverged):  # on every process
        tidy = True
        raise
    finally:
        trace.close()
        reporter.close()
        if tidy:
            reporter.plot()
            manager.close()
    return held


def _stopped(number: int, step: int, home: Path) -> Stopped:
    by = {signal.SIGINT: "Ctrl-C", signal.SIGHUP: "the end of its terminal (SIGHUP)"}.get(number, "SIGTERM")
    return Stopped(f"stopped by {by} at step {step}; saved in {home}, run the same command to go on", number)


def _restore(job: Job) -> tuple[int, TrainState] | None:
    """The newest checkpoint that all processes can read, sharded as this mesh wants it; None if there is none."""
    with hosts.process_zero_first():  # all go through what follows, or none
        (job.home / "checkpoints").mkdir(parents=True, exist_ok=True)
    targets = jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), job.shapes, job.shardings)
    rest = {k: getattr(targets, k) for k in ("step", "opt_state", "consecutive_nonfinite", "bad_total")}
    with checkpoints.checkpoint_manager(job.home, read_only=True) as manager:

        def restore(step: int) -> TrainState:
            of = old_names_of_state(job.home, step)
            wanted = {of.get(name, name): target for name, target in rest.items()}
            items = {"params": ocp.args.StandardRestore(targets.params), "train": ocp.args.StandardRestore(wanted)}
            found = manager.restore(step, args=ocp.args.Composite(**items))
            return TrainState(params=found["params"], **{name: found["train"][of.get(name, name)] for name in rest})

        found = checkpoints.restore_latest_readable(manager, restore, log)
        with hosts.process_zero_first():
            for step in manager.all_steps() if jax.process_index() == 0 and found is not None else ():
                if step > found[0]:
                    where = checkpoints.put_aside(job.home, step)
                    log(f"checkpoint {step} is kept in {where}; the run writes this step again")
    return found


def shown_held(held: dict[str, float]) -> str:
    bpb = f", {held['bits_per_byte']:.3f} bits per byte" if "bits_per_byte" in held else ""
    if "bits_per_byte_low" in held:
        bpb += f" [{held['bits_per_byte_low']:.3f}, {held['bits_per_byte_high']:.3f}]"
    if each := [f"{name.removeprefix('loss/')} {loss:.3f}" for name, loss in held.items() if name.startswith("loss/")]:
        bpb += f" ({', '.join(each)})"
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

    def __init__(self, flops_per_token: float):
        self.flops = flops_per_token
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
        if self.clock is not None:
            self.away += time.monotonic() - left

    @property
    def tokens_per_second(self) -> float:
        """Up to the last step that was counted."""
        return self.tokens / max(1e-9, self.spent)

    @property
    def mfu(self) -> float | None:
        """Model FLOP utilisation (arXiv 2204.02311, appendix B); None where the chip's peak is not known."""
        return self.tokens_per_second * self.flops / (self.peak * jax.device_count()) if self.peak else None
