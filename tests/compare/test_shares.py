"""Both in one set of weights: what is concluded from measurements that leave no doubt, and that it measures what it says."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from bothways import rundir
from bothways.compare import core, shares, stats
from bothways.compare.core import Size
from bothways.compare.run import masked_only
from bothways.compare.text import text_of
from bothways.config import ObjectiveConfig
from bothways.registry import make_module
from bothways.sample.open import open_model

SIZE = [100] * 12


def found(costs: dict[float, tuple[float, float]]) -> tuple:
    """Measurements where one set of weights costs (forward, both ways) bits per byte, by the share of rows read forward."""
    rng = np.random.default_rng(0)

    def nats(bits: float) -> list[float]:
        return ((bits + rng.normal(0, 0.002, len(SIZE))) * math.log(2) * 100).tolist()

    def one(forward: float, both: float) -> list[dict]:
        return [{"forward": nats(forward), "both ways": nats(both), "hidden": nats(both)} for _ in range(3)]

    parents = {"causal": one(2.0, 9.0), "masked": one(9.0, 2.5)}
    return parents, {share: one(2.0 + f, 2.5 + b) for share, (f, b) in costs.items()}, SIZE


@pytest.mark.parametrize(
    ("costs", "verdict", "named"),
    [
        ({0.5: (0.1, -0.1), 0.75: (0.02, -0.05), 0.9375: (0.01, -0.02)}, stats.HOLDS, "93.75%"),
        ({0.5: (0.1, -0.1), 0.75: (0.02, -0.05), 0.9375: (0.01, 0.2)}, stats.HOLDS, "75.00%"),
        ({0.5: (0.1, -0.1), 0.9375: (0.01, 0.2)}, stats.FAILS, "93.75%"),
        ({0.5: (0.1, -0.1), 0.9375: (0.03, -0.1)}, stats.OPEN, "93.75%"),
    ],
)
def test_the_price_of_one(costs, verdict, named):
    result = shares.conclude(*found(costs))
    assert result.verdict == verdict
    assert named in result.finding
    assert ("is both" in result.finding) == (verdict == stats.HOLDS)
    assert ("every share costs" in result.finding.lower()) == (verdict == stats.FAILS)
    values = {f.name: f.value for f in result.figures}
    for share, (forward, both) in costs.items():
        assert values[f"forward, {share:.4g} forward minus causal"].value == pytest.approx(forward, abs=0.004)
        assert values[f"both ways, {share:.4g} forward minus masked"].value == pytest.approx(both, abs=0.004)
    assert values["forward, causal"].value == pytest.approx(2.0, abs=0.004)
    assert [row[0] for row in result.tables[0].rows[2:]] == [f"{share:.2%} forward" for share in costs]


def test_it_measures_what_it_says(tiny_recipe, tmp_path, monkeypatch):
    """From end to end, with the same random weights in place of trained ones: no share costs anything."""
    model = dataclasses.replace(tiny_recipe.model, n_layers=1, scan_layers=False, dropout_residual=0.0)
    causal = dataclasses.replace(tiny_recipe, model=model)
    hybrid = dataclasses.replace(causal, objective=ObjectiveConfig(kind="hybrid"))
    arms = {"causal": hybrid, "masked": masked_only(hybrid), "hybrid": hybrid}
    made = []

    def untrained(lab, arm, seed, share=1.0, tag="", **other):
        recipe = dataclasses.replace(arms[arm], **other)
        made.append((arm, tag, recipe.objective.causal_share, seed))
        tokenizer = text_of(lab).tokenizer
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, vocab_size=len(tokenizer)))
        rng = np.random.default_rng(seed)
        params = jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(s.dtype), rundir.param_shapes(recipe))
        return open_model(rundir.Run(tmp_path, recipe, tokenizer, make_module("gpt", recipe.model), params, 0))

    monkeypatch.setattr(core.ExperimentRunner, "text", untrained)
    lab = core.ExperimentRunner(tmp_path / "x", Size("least", 2, 2, 2, 8, 2, 1, (1e-3,)), arms)
    result = shares.run(lab)
    mixed = [("hybrid", "-0.5", 0.5), ("hybrid", "-0.9375", 0.9375)]
    assert made == [(*a, s) for s in (0, 1) for a in [("causal", "", 0.5), ("masked", "", 0.0), *mixed]]
    values = {f.name: f.value for f in result.figures}
    assert len(values) == 3 * (1 + 2) + 3 * 2
    for name, value in values.items():
        assert (value.value == pytest.approx(0, abs=1e-6)) == (" minus " in name), name
    assert values["hidden, masked"].value > 1.0  # nats; random weights know nothing


def test_its_masked_parent_is_the_hybrid_whatever_the_masked_arm_is(tiny_recipe, tmp_path, monkeypatch):
    hybrid = dataclasses.replace(tiny_recipe, objective=ObjectiveConfig(kind="hybrid"))
    asked = []
    monkeypatch.setattr(shares, "measured", lambda lab, arm, seed, share=None: asked.append((arm, share)))
    monkeypatch.setattr(shares, "sizes", lambda lab: [])
    monkeypatch.setattr(shares, "conclude", lambda *_: None)
    for name, masked, parent in (("x", masked_only(hybrid), ("masked", None)), ("y", tiny_recipe, ("hybrid", 0))):
        arms = {"causal": tiny_recipe, "masked": masked, "hybrid": hybrid}
        shares.run(core.ExperimentRunner(tmp_path / name, Size("least", 1, 2, 2, 8, 2, 1, (1e-3,)), arms))
        assert asked[:2] == [("causal", None), parent]
        asked.clear()
