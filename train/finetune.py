"""Fine-tuning: a head and the whole stack, or adapters for it, on a labelled task, over a grid of learning rates and seeds.

HOME/finetune.json        what is trained: task, body, settings; written first, and what a resumed grid must agree with
HOME/grid/RATE-SEED/      a candidate: checkpoints and metrics while it runs, then result.json
HOME/grid/scratch-.../    the same from random weights
HOME/recipe.json, ...     the run of the best candidate, once the grid is complete; of labels also confusion.png

One candidate is in memory at a time, and the checkpoints of two are kept: the leader's and that of the rate at hand.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from bothways import rundir
from bothways.config import FinetuneConfig
from bothways.data import metrics
from bothways.data.hold_out import labels_of
from bothways.data.tasks import Task
from bothways.errors import Diverged, InputError
from bothways.files import read_json, write_whole
from bothways.formats import FORMAT
from bothways.log import log
from bothways.rundir import Run, TaskInfo
from bothways.train.confusion import picture
from bothways.train.steps import run_steps
from bothways.train.tuning import FinetuneRunner

MAY_CHANGE = ("mesh", "save_every_minutes")
"""Settings that a resumed grid may have of its own: the result is the same."""


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
    metrics: dict[str, float]
    """Every metric on what is reported, the loss, and of labels and choices the calibration error, means over seeds."""
    confusion: dict[str, Any] | None
    """Of the candidate that is kept, on what is reported: {"labels", "counts"}, right answers in rows; None where an item
    has not one of some labels."""


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
    if task.kind == "multilabel":  # every text has the label that most have
        common = collections.Counter(label for item in task.splits["train"] for label in item["label"]).most_common(1)[0][
            0
        ]
        found["majority"] = metrics.compute(
            lead, [frozenset(i["label"]) for i in test], [frozenset([common])] * len(test)
        )
    return found


def finetune(run: Run, task: Task, workdir: str | Path, cfg: FinetuneConfig) -> Finetuned:
    """Tune a run's whole stack, or adapters for it, and a new head on a task, or go on with a grid that was stopped; the
    best candidate is kept in `workdir`.

    Weights come from the run (for adapters, one checkpoint of it, and not a mean of several); the head is random. For
    every learning rate and seed the epoch that is best on validation counts; the rate with the best mean over seeds is
    reported, on test. Of a grid that is complete the result is returned again.

    Raises:
      InputError: numbers out of range, or a directory that holds something else.
      OSError: a directory that cannot be written; nothing is trained.
      Stopped: SIGTERM or Ctrl-C came; everything is saved.
      Diverged: no candidate had a finite loss.
      Busy: another process works in this directory.
    """
    home = rundir.directory(workdir)
    cfg.check(run.recipe.objective.kind, run.recipe.model.context_length, run.recipe.model.gated)
    metrics.sklearn_metrics()
    cfg = cfg.settled(sum(x.size for x in jax.tree.leaves(run.params)), run.recipe.optimizer.name)
    plan = plan_of(run, task, cfg)
    check_free(home, plan)
    runner = FinetuneRunner(run, task, cfg)
    home.mkdir(parents=True, exist_ok=True)
    with rundir.one_writer(home):
        write_json(home / "finetune.json", plan)  # the grid takes long: a place that cannot be written is known before it
        return _grid(runner, home)


def _grid(runner: FinetuneRunner, home: Path) -> Finetuned:
    task, lead = runner.task, runner.lead
    counts = {split: len(items) for split, items in task.splits.items()}
    log(f"{task.name}: {task.kind}, " + ", ".join(f"{n} {split}" for split, n in counts.items()))
    log(f"  epoch, rate and seed are chosen on {task.selected_on}; reported is {task.tested_on}")
    if task.kind in ("classify", "multilabel"):
        shares = collections.Counter(name for item in task.splits["train"] for name in labels_of(item, task.kind))
        log("  labels: " + ", ".join(f"{label} {n / counts['train']:.0%}" for label, n in shares.most_common()))
    baselines = baselines_of(task)
    complete = (home / "recipe.json").exists()
    rate, found, best = search(runner, home / "grid", pretrained=True)
    if runner.cfg.scratch:
        try:
            tests = [result["test"][lead] for result in search(runner, home / "grid", pretrained=False)[1]]
            baselines["from_scratch"] = metrics.mean_interval(tests)[0]
        except Diverged:
            log("  from scratch no candidate had a finite loss, so there is no such baseline")
    counts_of = json.loads((best / "result.json").read_text()).get("confusion")
    if counts_of is not None:
        picture(home, task.labels, counts_of)
    if not complete:
        tuned = dataclasses.replace(runner.run, recipe=runner.recipe)
        save(home, tuned, runner.best(best)[-1], runner.info)
    discard(best)
    mean, low, high = metrics.mean_interval([result["test"][lead] for result in found])
    each = {m: round(metrics.mean_interval([r["test"][m] for r in found])[0], 4) for m in found[0]["test"]}
    others = ", ".join(f"{m.replace('_', ' ')} {value}" for m, value in each.items() if m != lead)
    log(f"  best rate {rate:g}; test {lead} {mean:.4f}; {others}")
    return Finetuned(
        str(home),
        task.name,
        lead,
        round(mean, 4),
        (round(low, 4), round(high, 4)),
        counts["test"],
        {k: round(v, 4) for k, v in baselines.items()},
        task.selected_on,
        task.tested_on,
        each,
        None if counts_of is None else {"labels": list(task.labels), "counts": counts_of},
    )


def search(runner: FinetuneRunner, grid: Path, pretrained: bool) -> tuple[float, list[dict[str, Any]], Path]:
    """Every candidate that has no result yet is trained.

    Returns:
      the best rate, the results of its seeds, and the candidate among them that is best on validation.

    Raises:
      Diverged: no rate has a candidate with a finite loss.
    """
    cfg, winner = runner.cfg, None
    for rate in cfg.learning_rates:
        tried: list[tuple[Path, dict[str, Any]]] = []
        for seed in range(cfg.seeds):
            home = grid / f"{'' if pretrained else 'scratch-'}{rate:g}-{seed}"
            tried.append((home, candidate(runner, home, rate, seed, pretrained)))
            for other, _ in tried:
                if not pretrained or other != leader(tried):
                    discard(other)
        finite = [(home, result) for home, result in tried if result["validation"] is not None]
        if not finite:
            continue
        mean, low, high = metrics.mean_interval([result["validation"] for _, result in finite])
        log(f"  rate {rate:g}: validation {runner.lead} {mean:.3f} [{low:.3f}, {high:.3f}] over {len(finite)} seeds")
        if winner is not None and mean <= winner[0]:
            discard(leader(tried))
            continue
        if winner is not None:
            discard(winner[3])
        winner = (mean, rate, [result for _, result in finite], leader(tried))
    if winner is None:
        raise Diverged("no candidate had a finite loss; give lower --learning-rates")
    return winner[1:]


def leader(tried: list[tuple[Path, dict[str, Any]]]) -> Path:
    """The first of the candidates that are best on validation."""
    return max(tried, key=lambda found: -np.inf if found[1]["validation"] is None else found[1]["validation"])[0]


def candidate(runner: FinetuneRunner, home: Path, rate: float, seed: int, pretrained: bool) -> dict[str, Any]:
    """{"validation", "test", "step"} of a rate and seed: read, or trained from where it was stopped. One that diverged has
    no validation."""
    done = home / "result.json"
    if done.exists():
        return read_json(done)
    result: dict[str, Any] = {"validation": None, "test": None, "step": None, "confusion": None}
    try:
        run_steps(runner.job(home, rate, seed, pretrained))
    except Diverged as e:
        log(f"  rate {rate:g}, seed {seed}: {str(e).partition(';')[0]}; it counts for nothing")
    else:
        step, validation, params = runner.best(home)
        test, counts = runner.tested(params)
        result = {"validation": validation, "test": test, "step": step, "confusion": counts}
    write_json(done, result)
    return result


def discard(home: Path) -> None:
    """A candidate's checkpoints, which nothing needs any more."""
    epath.Path(home / "checkpoints").rmtree(missing_ok=True)


def plan_of(run: Run, task: Task, cfg: FinetuneConfig) -> dict[str, Any]:
    """What is trained, as finetune.json has it."""
    items = json.dumps(task.splits, ensure_ascii=False, sort_keys=True)
    body = run.recipe.to_json() + run.tokenizer.fingerprint
    old = {
        "lora": not cfg.lora.rank,
        "class_weights": not cfg.class_weights,
    }  # grids of before there were these lack them
    left_out = (*MAY_CHANGE, *(name for name, says_nothing in old.items() if says_nothing))
    settings = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in left_out}
    plan = {
        "format": FORMAT,
        "task": task.name,
        "items": hashlib.sha256(items.encode()).hexdigest()[:16],
        "body": hashlib.sha256(body.encode()).hexdigest()[:16],
        "body_step": run.step,
        **settings,
    }
    return json.loads(json.dumps(plan))  # tuples as JSON has them


def check_free(home: Path, plan: dict[str, Any]) -> None:
    """Raises InputError where a directory holds something else than this grid."""
    if not home.exists() or (home.is_dir() and {path.name for path in home.iterdir()} <= {".lock"}):
        return
    kept = home / "finetune.json"
    if not home.is_dir() or not kept.exists():
        raise InputError(f"{home} exists already; give another directory with --workdir")
    theirs = read_json(kept)
    if changed := [f"{k}: {theirs.get(k)} -> {v}" for k, v in plan.items() if theirs.get(k) != v]:
        raise InputError(
            f"{home} exists already and holds another fine-tuning; its settings -> yours:\n"
            + "\n".join(f"  - {c}" for c in changed)
            + "\ngive another directory with --workdir"
        )


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all; untouched where it is there and the same."""
    text = json.dumps(value, indent=2)
    with contextlib.suppress(FileNotFoundError):
        if path.read_text() == text:
            return
    write_whole(path, text)


def save(home: Path, run: Run, params: Any, info: TaskInfo) -> None:
    """A fine-tuned run directory: the body's tokenizer, task.json, the parameters (of adapters, these and the head, and which
    checkpoint of which run they are for); the recipe last, which makes it a run."""
    home.mkdir(parents=True, exist_ok=True)
    run.tokenizer.save_in(home)
    rundir.write_task(home, info)
    if run.recipe.model.lora.rank:
        rundir.write_base(home, run.home, run.step)
    with rundir.checkpoint_manager(home, keep=1) as manager:
        if 0 not in manager.all_steps():  # else it was stopped between the two
            items = {"params": ocp.args.StandardSave(params), "meta": ocp.args.JsonSave({"step": 0})}
            manager.save(0, args=ocp.args.Composite(**items))
            manager.wait_until_finished()
    write_whole(home / "recipe.json", run.recipe.to_json())
