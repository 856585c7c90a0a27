"""All experiments, in the order of the report; and what runs them."""

import dataclasses
import importlib
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from bothways.compare import report
from bothways.compare.core import SIZES, Experiment, ExperimentRunner, Result
from bothways.errors import InputError
from bothways.log import log
from bothways.recipes import Recipe

KINDS = {"causal": ("causal",), "masked": ("masked", "hybrid"), "hybrid": ("hybrid",), "bert": ("masked",)}
"""Objectives that an arm may have."""
NAMES = ("directions", "algorithms", "modes", "in-context", "weights", "prompts", "generation", "dial", "shares")


def experiment(name: str) -> Experiment:
    """The experiment of this name: a module here, with dashes for underscores."""
    if name not in NAMES:
        raise InputError(f"no experiment {name!r}; there are {', '.join(NAMES)}")
    return importlib.import_module(f"bothways.compare.{name.replace('-', '_')}").EXPERIMENT


def controlled(arms: dict[str, Recipe]) -> dict[str, Recipe]:
    """The recipes with all but model and objective taken from the first: text, tokenizer, optimizer, batches, row length."""
    first = next(iter(arms.values()))
    model = {"context_length": first.model.context_length, "vocab_size": first.model.vocab_size or first.data.vocab_size}
    shared = {"data": first.data, "optimizer": first.optimizer, "train": first.train, "mesh": first.mesh}
    return {arm: dataclasses.replace(r, model=dataclasses.replace(r.model, **model), **shared) for arm, r in arms.items()}


def masked_only(hybrid: Recipe) -> Recipe:
    """The hybrid recipe with no row read forward: a masked model of exactly the same parameters."""
    return dataclasses.replace(hybrid, objective=dataclasses.replace(hybrid.objective, causal_share=0.0))


def made_with() -> str:
    """What measured: the commit, where this is a checkout, and the versions."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "no checkout"
    version = importlib.metadata.version
    return f"commit {commit}, jax {version('jax')}, Python {platform.python_version()}, {os.cpu_count()} CPU cores"


def described(recipe: Recipe) -> str:
    """A recipe in a line of the report."""
    from bothways.compare.weights import parameter_count

    ask = recipe.objective
    kinds = {"causal": "next token", "masked": f"masked tokens ({ask.mask_rate:.0%})"}
    kinds["hybrid"] = f"masked next tokens ({ask.mask_rate:.0%}), {ask.causal_share:.0%} of rows forward instead"
    pairs = " and next sentences" if ask.next_sentence else ""
    return f"{kinds[ask.kind]}{pairs}, {parameter_count(recipe):,} parameters"


def compare(
    names: Sequence[str], size: str, arms: dict[str, Recipe], home: Path, options: str
) -> list[tuple[Experiment, Result]]:
    """Run experiments (all, if none is named); write the report anew after each, with all that the directory has.

    Args:
      options: how the command line was given, for the report to repeat.

    Raises:
      InputError: no such experiment or size, an arm that is of another kind or missing, or the directory holds another
        comparison.
    """
    if size not in SIZES:
        raise InputError(f"no size {size!r}; there are {', '.join(SIZES)}")
    for arm, recipe in arms.items():
        if (kind := recipe.objective.kind) not in KINDS[arm]:
            raise InputError(
                f"--{arm} {recipe.name} has objective.kind={kind}; the {arm} model of a comparison has {' or '.join(KINDS[arm])}"
            )
    lacking = {name: [arm for arm in experiment(name).needs if arm not in arms] for name in names or NAMES}
    for name, missing in lacking.items():
        if missing:
            why = f"{name} compares with {' and '.join(f'a {arm} model' for arm in missing)}, and there is none: give --{missing[0]}"
            if names:
                raise InputError(why)
            log(f"=== {name} is left out: {why}")
    lab = ExperimentRunner(home, SIZES[size], controlled(arms))
    kept = {n: home / "parts" / f"result-{n}.json" for n in NAMES}
    found: list[tuple[Experiment, Result]] = []
    for name in (name for name, missing in lacking.items() if not missing):
        began = time.monotonic()
        chosen = experiment(name)
        new = not kept[name].exists()
        if new and (power := chosen.detects(lab.size.seeds, lab.size.tunings)):
            log(f"=== {name}: {power}")
        Result.from_json(lab.part(f"result-{name}", lambda e=chosen: dataclasses.asdict(e.run(lab))))
        lab.part(f"made-{name}", made_with)
        found = [(experiment(n), Result.from_json(lab.part(f"result-{n}", dict))) for n in NAMES if kept[n].exists()]
        s, steps = lab.size, lab.size.text_steps or lab.recipes["causal"].train.steps
        about = {
            "size": size,
            "options": options,
            "seeds": s.seeds,
            "tunings": s.tunings,
            "scale": f"{s.seeds} seeds, {steps} steps on running text, {s.toy_steps} on made-up data.",
            "made": sorted({lab.part(f"made-{e.name}", made_with) for e, _ in found}),
            "arms": {arm: described(r) for arm, r in lab.recipes.items()},
        }
        page, _ = report.write(home, found, about)
        how = f"{time.monotonic() - began:.0f} s" if new else "kept from earlier"
        log(f"=== {name}: {how}; {page}")
    return found
