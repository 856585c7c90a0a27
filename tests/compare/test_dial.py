"""The dial's experiment: what it concludes from measurements that leave no doubt, and that it runs from end to end."""

import dataclasses

import jax
import numpy as np
import pytest

from bothways import rundir
from bothways.compare import core, dial, stats
from bothways.compare.core import Size
from bothways.compare.text import text_of
from bothways.registry import make_module
from bothways.sample.open import open_model

BLOCKS = ("1", "4", "row")


def found(bound: float, chunk: float) -> tuple:
    """Measurements where whole rows cost `bound` bits per byte, and four tokens at once `chunk` bits per token."""
    rng = np.random.default_rng(0)
    bits = {"1": 2.0, "4": 2.0 + bound / 2, "row": 2.0 + bound}
    judge = {"1 a pass": 5.0, "2 a pass": 5.0 + chunk / 2, "all at once": 5.0 + chunk, "above 0.5": 4.5}

    def writes() -> dict:
        more = {"per_pass": 1.5, "distinct": 0.9, "entropy": 5.0}
        return {way: {"judge": (value + rng.normal(0, 0.05, 12)).tolist(), **more} for way, value in judge.items()}

    def one(blocks) -> dict:
        nats = {b: ((bits[b] + rng.normal(0, 0.02, 12)) * 100 * np.log(2)).tolist() for b in blocks}
        return {"nats": nats, "writes": {b: writes() for b in blocks}}

    runs = {b: [one([b]) for _ in range(3)] for b in BLOCKS} | {"all": [one(BLOCKS) for _ in range(3)]}
    real = {"judge": [5.0] * 12, "distinct": 0.95, "entropy": 6.0, "bytes": [100] * 12}
    return runs, real, {b: {"1 a pass": {"1": 10.0, "16": 100.0}} for b in BLOCKS}


@pytest.mark.parametrize(
    ("bound", "chunk", "verdict"), [(0.5, 1.0, stats.HOLDS), (-0.5, 1.0, stats.FAILS), (0.5, 0, None)]
)
def test_the_claim_holds_where_chunks_cost(bound, chunk, verdict):
    result = dial.conclude(*found(bound, chunk))
    if verdict:
        assert result.verdict == verdict
    named = {f.name: f.value for f in result.figures}
    assert named["bits per byte, blocks of row, a model for each"].holds(2 + bound)
    assert named["judge, blocks of 4, all at once"].holds(chunk)
    assert f"whole rows is {bound:+.1f}"[:-1] in result.finding
    assert len(result.pictures) == 3


def test_it_measures_what_it_says(tiny_recipe, tmp_path, monkeypatch):
    """From end to end, with random weights in place of trained ones."""
    monkeypatch.setattr(dial, "BLOCKS", (1, 4, 0))
    monkeypatch.setattr(dial, "WAYS", {k: dial.WAYS[k] for k in ("1 a pass", "all at once", "above 0.5")})
    monkeypatch.setattr(dial, "speeds", lambda lab: {})
    model = dataclasses.replace(tiny_recipe.model, n_layers=1, scan_layers=False, dropout_residual=0.0)
    base = dataclasses.replace(tiny_recipe, model=model)
    made = []

    def untrained(lab, arm, seed, share=1.0, tag="", **other):
        made.append((tag, seed))
        tokenizer = text_of(lab).tokenizer
        recipe = dataclasses.replace(base, **other)
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, vocab_size=len(tokenizer)))
        rng = np.random.default_rng(seed)
        params = jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(s.dtype), rundir.param_shapes(recipe))
        return open_model(rundir.Run(tmp_path, recipe, tokenizer, make_module("gpt", recipe.model), params, 0))

    monkeypatch.setattr(core.ExperimentRunner, "text", untrained)
    lab = core.ExperimentRunner(tmp_path / "x", Size("least", 1, 2, 2, 8, 2, (1e-3,)), {"causal": base})
    result = dial.run(lab)
    assert {tag for tag, _ in made} == {f"-dial-{name}" for name in ("1", "4", "row", "all")} | {"-judge"}
    bits = {f.name: f.value.value for f in result.figures if f.name.startswith("bits")}
    assert len(bits) == 6
    assert len(set(bits.values())) == 3  # the same weights for each and for all
    passes = {f.name: f.value.value for f in result.figures if f.name.startswith("tokens per pass")}
    assert passes["tokens per pass, blocks of row, all at once"] == pytest.approx(7, abs=1)
    assert passes["tokens per pass, blocks of 4, all at once"] > passes["tokens per pass, blocks of 4, 1 a pass"]
    again = dial.run(lab)  # nothing is measured twice
    assert again.finding == result.finding
