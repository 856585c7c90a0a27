"""`bothways evaluate`: held-out loss and bits per byte, and tasks of lm-evaluation-harness and mteb."""

from pathlib import Path
from typing import Any

import tyro

import bothways
from bothways.commands.shared import capability, emit, which
from bothways.errors import InputError
from bothways.log import log

Positional = tyro.conf.Positional


def evaluate(
    run: Positional[str],
    suites: Positional[tuple[str, ...]] = ("validation",),
    shots: int | None = None,
    rule: str = "",
    tasks_from: Path | None = None,
    rows: int = 0,
    step: str = "newest",
    json: bool = False,
) -> None:
    """Measure held-out loss and bits per byte, and tasks of lm-evaluation-harness, with 95 % intervals; tasks of mteb,
    without.

    Args:
        run: A run directory.
        suites: validation or test: the run's own held-out text. lm-eval:TASK: a task of lm-evaluation-harness. mteb:TASK: a
            task of mteb, with the run's vectors.
        shots: Demonstrations before each question of an lm-eval task; by default as the task defines.
        rule: How an lm-eval task scores a continuation: causal; pll_word (the default of masked models) or pll; bound (the
            default of diffusion models).
        tasks_from: A folder with your own lm-eval task definitions.
        rows: Most rows (or pairs) of a split that are used, spread evenly; 0: all rows, or 4096 pairs. A bound on running
            text uses at most 64 pieces, whatever is given here.
        step: Which checkpoint: newest, best (on held-out text), or the step of a kept one.
        json: One JSON object per metric.
    """
    from bothways.sample.evaluate import evaluate

    model = bothways.load(run, step=which(step))
    vectors = [s.removeprefix("mteb:") for s in suites if s.startswith("mteb:")]
    suites = [s for s in suites if not s.startswith("mteb:")]
    capability(model, "embed" if vectors and not suites else "sample", "")
    tasks = [s.removeprefix("lm-eval:") for s in suites if s.startswith("lm-eval:")]
    own = [s for s in suites if not s.startswith("lm-eval:")]
    if (shots is not None or rule or tasks_from) and not tasks:
        raise InputError("--shots, --rule and --tasks-from are for lm-eval tasks, such as lm-eval:lambada_openai")
    if rows < 0:
        raise InputError(f"--rows is {rows}; it must be 0 (all) or more")
    harness: Any = None
    if vectors:
        try:
            from bothways.sample import mteb_backend
        except ModuleNotFoundError as e:
            raise InputError(f"mteb tasks need {e.name}, which is not installed: pip install 'bothways[mteb]'") from e
        mteb_backend.known_tasks(vectors)
    if tasks:
        try:
            from bothways.sample import lm_eval_backend as harness
        except ModuleNotFoundError as e:
            raise InputError(
                f"lm-eval tasks need {e.name}, which is not installed: pip install 'bothways[lmeval]'"
            ) from e
        harness.check(tasks, tasks_from, shots)  # before minutes are spent on the others
        harness.Continuations(model, rule)
    if own:  # a task needs nothing of the text that the run was trained on
        show(evaluate(model, own, log, rows), json)
    if tasks:
        show(harness.evaluate(model, tasks, shots, rule, tasks_from), json)
    if vectors:
        show(mteb_backend.evaluate(model, vectors), json)


def show(figures: list[Any], json: bool) -> None:
    """Print metrics, each with its interval."""
    for figure in figures:
        if figure.suite.startswith("mteb:"):
            emit(figure, json, f"{figure.suite} {figure.metric} {figure.value:.4f}", ("interval",))
            continue
        low, high = figure.interval
        shown = f"{figure.value:.4f} [{low:.4f}, {high:.4f}] ({figure.n} {figure.resampled})"
        undefined = ("interval", "value") if figure.suite.startswith("lm-eval:") else ("interval",)
        emit(figure, json, f"{figure.suite} {figure.metric} {shown}", undefined)
