"""What every experiment is made of: a claim, a function that measures, a result; and the laboratory that keeps its runs."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bothways.compare.stats import Estimate, detectable
from bothways.data.config import DataConfig
from bothways.errors import InputError
from bothways.log import log
from bothways.recipes import Recipe
from bothways.rundir import load_run
from bothways.sample.batching import batched, rows_that_fit
from bothways.sample.decode import Row
from bothways.sample.masked import MaskedModel, hidden_batch, hidden_logprobs
from bothways.sample.open import Model, open_model
from bothways.sample.sampling_params import SamplingParams
from bothways.sample.text import TextModel
from bothways.train.loop import train


@dataclasses.dataclass(frozen=True)
class Size:
    """How much work an experiment may make of itself."""

    name: str
    seeds: int
    text_steps: int
    """Steps of every run on running text; 0: as the recipe says."""
    toy_steps: int
    """Steps of every run on made-up data."""
    items: int
    """Test items, or draws, per cell of a table."""
    tune_steps: int
    """Steps of every fine-tuning."""
    tunings: int
    """Fine-tunings at the best rate, each with examples and a head of its own; the pretrained models take turns."""
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    toy_width: int = 64
    """Made-up data gets two layers so wide; 0: as the recipe says."""


SIZES = {
    "smoke": Size("smoke", 2, 4, 4, 8, 2, 2, (3e-3,)),
    "tiny": Size("tiny", 3, 40, 150, 100, 20, 6, (1e-2,)),
    "small": Size("small", 3, 400, 500, 400, 40, 6),
    "full": Size("full", 3, 0, 10_000, 2000, 2000, 3, (2e-5, 3e-5, 5e-5), 0),
}


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A number of the report. `rule` says how it was scored, `expected` what theory gives, `baseline` what no model gives."""

    name: str
    value: Estimate
    rule: str
    expected: float | None = None
    baseline: float | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: list[list[str]]


@dataclasses.dataclass(frozen=True)
class Result:
    """What an experiment found. `finding` is a sentence or two in plain words, `sure` how sure that is and why."""

    verdict: str
    finding: str
    sure: str
    figures: list[Measurement]
    tables: list[Table]
    pictures: list[tuple[str, str]]
    """(SVG, what it shows)"""
    effect: str = ""
    """How large what the verdict is about is, with its interval."""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Result":
        figures = [Measurement(**f | {"value": Estimate(**f["value"])}) for f in values["figures"]]
        tables = [Table(t["title"], tuple(t["columns"]), t["rows"]) for t in values["tables"]]
        return cls(**values | {"figures": figures, "tables": tables, "pictures": [tuple(p) for p in values["pictures"]]})


@dataclasses.dataclass(frozen=True)
class Pilot:
    """How much a difference varied from seed to seed (a standard deviation) in an earlier comparison of size `size`."""

    spread: float
    of: str
    """The difference and its unit."""
    size: str = "small"
    tuned: bool = False
    """Whether its seeds are those of fine-tunings."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A row of the comparison. `method` is the experiment in two sentences, `known` what others found at real size."""

    name: str
    title: str
    claim: str
    method: str
    known: str
    run: Callable[["ExperimentRunner"], Result]
    pilots: tuple[Pilot, ...] = ()
    needs: tuple[str, ...] = ()
    """Arms without which it measures nothing."""

    def detects(self, seeds: int, tunings: int) -> str:
        """Which differences so many seeds can find, known before anything is run; empty without a pilot, or with one seed."""
        found = []
        for p in self.pilots:
            n, what = (tunings, "fine-tunings") if p.tuned else (seeds, "seeds")
            if n > 1:
                found.append(
                    f"{n} {what} find a difference of {detectable(p.spread, n):.3g} {p.of} four times out of five, "
                    f"if they vary as in an earlier comparison of size {p.size} (standard deviation {p.spread:.3g})"
                )
        return "; ".join(found)


class ExperimentRunner:
    """Where experiments train and keep what they have: `runs/NAME` are ordinary runs, `parts/NAME.json` what was measured.

    Args:
      home: the directory; what is there already is used again.
      size: how much work.
      recipes: the models to compare, by arm: causal, masked, hybrid and maybe bert.

    Raises:
      InputError: the directory holds a comparison of another size or other recipes.
    """

    def __init__(self, home: Path, size: Size, recipes: dict[str, Recipe]):
        self.home, self.size, self.recipes = home, size, recipes
        self.seeds = range(size.seeds)
        self._models: dict[str, Model] = {}
        self.programs: dict[tuple[str, str], Any] = {}
        """What experiments have compiled, by arm and use."""
        asked = {"size": dataclasses.asdict(size), "recipes": {k: json.loads(r.to_json()) for k, r in recipes.items()}}
        mark = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
        path = home / "comparison"
        if path.exists() and path.read_text() != mark:
            raise InputError(f"{home} holds a comparison of another size or other recipes; give another --workdir")
        home.mkdir(parents=True, exist_ok=True)
        path.write_text(mark)

    def arms(self, *wanted: str) -> list[str]:
        """The arms among `wanted` (all, if none is named) that there are recipes for."""
        return [arm for arm in (wanted or ("causal", "masked", "hybrid", "bert")) if arm in self.recipes]

    def trained(self, name: str, recipe: Recipe) -> Model:
        """The run of this name, trained now if it is not yet, and ready to be asked."""
        home = self.home / "runs" / name
        if not (home / "done").exists():
            log(f"--- training {home}")
            train(dataclasses.replace(recipe, name=name), home)
            (home / "done").touch()
        if name not in self._models:
            self._models[name] = open_model(load_run(home, log))
        return self._models[name]

    def text(self, arm: str, seed: int, share: float = 1.0, tag: str = "", **other: Any) -> Model:
        """A model of running text. `share` shortens its training; `other` are parts of the recipe that are put in place of
        the arm's, such as another corpus."""
        base = self.recipes[arm]
        steps = max(2, round((self.size.text_steps or base.train.steps) * share))
        recipe = _fixed(dataclasses.replace(base, **other), steps, seed)
        return self.trained(f"text-{arm}{tag}-{seed}", recipe)

    def toy(self, task: str, arm: str, seed: int, texts: Callable[[], tuple[list[str], list[str]]], **how: Any) -> Model:
        """A model of made-up documents, a character a token.

        Args:
          texts: makes (train, validation) documents; called once.
          how: row (tokens per row; if all documents have one length, and it divides `row`, none is cut), batch_size,
            mask_rate, longer (times the usual steps).
        """
        base, row = self.recipes[arm], how["row"]
        bert = base.family == "bert"
        model = {"context_length": row + bert, "vocab_size": 0, "next_sentence": False, "segment_types": 0}
        if self.size.toy_width:
            model |= {
                "n_layers": 2,
                "d_model": self.size.toy_width,
                "n_heads": 4,
                "d_ff": 0,
                "d_head": 0,
                "n_kv_heads": 0,
            }
        ask = {
            "mask_rate": how.get("mask_rate", 0.3),
            "mask_token_prob": 1.0,
            "random_token_prob": 0.0,
            "next_sentence": False,
        }
        recipe = dataclasses.replace(
            base,
            data=self.documents(task, texts),
            model=dataclasses.replace(base.model, **model),
            objective=dataclasses.replace(base.objective, **ask),
            train=dataclasses.replace(base.train, batch_size=how.get("batch_size", 16)),
        )
        return self.trained(f"{task}-{arm}-{seed}", _fixed(recipe, self.size.toy_steps * how.get("longer", 1), seed))

    def documents(
        self, task: str, texts: Callable[[], tuple[list[str], list[str]]], tokenizer: str = "char"
    ) -> DataConfig:
        """Documents for training and validation as files, written once."""
        home = self.home / "data"
        paths = [home / f"{task}-{split}.jsonl" for split in ("train", "validation")]
        if not all(p.exists() for p in paths):
            home.mkdir(exist_ok=True)
            for path, part in zip(paths, texts(), strict=True):
                partial = path.with_suffix(".partial")
                partial.write_text("".join(json.dumps({"text": t}) + "\n" for t in part))
                partial.replace(path)
        return DataConfig(
            corpus=str(paths[0]), validation=str(paths[1]), tokenizer=tokenizer, cache=str(self.home / "cache")
        )

    def part(self, name: str, measure: Callable[[], Any]) -> Any:
        """What `measure` returns, as JSON, measured once: a comparison that was stopped goes on behind it."""
        path = self.home / "parts" / f"{name}.json"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            log(f"--- measuring {name}")
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(measure()))
            partial.replace(path)
        return json.loads(path.read_text())


def _fixed(recipe: Recipe, steps: int, seed: int) -> Recipe:
    """The recipe at so many steps from this seed, warm-up within them; measured by the experiment, not by the loop."""
    warm = min(recipe.optimizer.warmup_steps, steps // 2)
    often = {"eval_every": steps, "eval_rows": 32, "save_every": max(200, steps // 4), "max_to_keep": 1}
    return dataclasses.replace(
        recipe,
        optimizer=dataclasses.replace(recipe.optimizer, warmup_steps=warm),
        train=dataclasses.replace(recipe.train, steps=steps, seed=seed, log_every=max(20, steps // 5), **often),
    )


def asked(
    model: MaskedModel, rows: Sequence[list[int]], positions: list[list[int]], targets: list[list[int]]
) -> list[np.ndarray]:
    """For every row log p(target), in nats, at each of its positions."""
    found: list[np.ndarray] = [np.zeros(0)] * len(rows)
    for some in batched(range(len(rows)), lambda i: (len(rows[i]),), rows_that_fit(model.recipe.model)):
        chosen = ([values[i] for i in some] for values in (rows, positions, targets))
        batch = hidden_batch(*chosen, model.context_length, model.tokenizer.pad)
        logprobs = np.asarray(hidden_logprobs(model.run.module, model.run.params, batch))
        for k, i in enumerate(some):
            found[i] = logprobs[k, : len(positions[i])]
    return found


def drawn(count: int, seed: int, *numbers: int) -> dict[str, Any]:
    """For MaskedModel.fill_rows: tokens drawn from each mask's whole distribution, with a key for each of `count` rows."""
    key = jax.random.key(seed)
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return {"method": SamplingParams.make(), "keys": list(jax.random.split(key, count))}


def continued(
    model: TextModel, rows: Sequence[Sequence[int]], tokens: int, *, greedy: bool = False, seed: int = 0
) -> list[list[int]]:
    """Up to so many tokens behind every row of ids, as the run's own decoder says them, at temperature 1 or greedily."""
    key = jax.random.key(seed)
    going = [Row(list(ids), jax.random.fold_in(key, i)) for i, ids in enumerate(rows)]
    model.decoder.generate(model.run.params, going, SamplingParams.make(1.0, 0, 1.0, 0.0, greedy), tokens)
    return [row.tokens for row in going]


def lines(estimates: dict[str, Estimate], rule: str, prefix: str = "", **more: Any) -> list[Measurement]:
    """A figure for each."""
    return [Measurement(f"{prefix}{name}", e, rule, **more) for name, e in estimates.items()]
