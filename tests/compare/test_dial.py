"""The dial's experiment: what it concludes from measurements that leave no doubt, and that it runs from end to end."""

import dataclasses

import jax
import numpy as np
import pytest

from bothways import rundir
from bothways.compare import core, dial, dial_result, stats
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
        more = {"distinct": 0.9, "entropy": 5.0, "self_bleu": 0.2}
        passes = {"1 a pass": 1.0, "2 a pass": 2.0, "all at once": 4.0, "above 0.5": 1.5}
        return {
            way: {"judge": (value + rng.normal(0, 0.05, 12)).tolist(), "per_pass": passes[way], **more}
            for way, value in judge.items()
        }

    def one(blocks) -> dict:
        nats = {b: ((bits[b] + rng.normal(0, 0.02, 12)) * 100 * np.log(2)).tolist() for b in blocks}
        return {"nats": nats, "writes": {b: writes() for b in blocks}}

    runs = {b: [one([b]) for _ in range(3)] for b in BLOCKS} | {"all": [one(BLOCKS) for _ in range(3)]}
    real = {"judge": [5.0] * 12, "distinct": 0.95, "entropy": 6.0, "self_bleu": 0.1, "bytes": [100] * 12}
    return runs, real, {b: {"1 a pass": {"1": 10.0, "16": 100.0}, "all at once": {"1": 30.0, "16": 90.0}} for b in BLOCKS}


@pytest.mark.parametrize(
    ("bound", "chunk", "verdict"), [(0.5, 1.0, stats.HOLDS), (-0.5, 1.0, stats.FAILS), (0.5, 0, None)]
)
def test_the_claim_holds_where_chunks_cost(bound, chunk, verdict, monkeypatch):
    monkeypatch.setattr(dial_result.pictures, "curves", lambda *args, **how: "")
    result = dial.conclude(*found(bound, chunk))
    if verdict:
        assert result.verdict == verdict
    named = {f.name: f.value for f in result.figures}
    assert named["bits per byte, blocks of row, a model for each"].holds(2 + bound)
    assert named["judge, blocks of 4, all at once"].holds(chunk)
    assert f"whole rows is {bound:+.1f}"[:-1] in result.finding
    assert len(result.pictures) == 1 + 2 * 3  # bits; two orders, each by pass and by second at 1 and 16 rows
    best = [row for row in result.tables[2].rows if row[0] == "a second, 1 row"]
    assert "duller" in result.finding  # all above 0.5, at 4.5 bits where real text has 5
    assert best[-1][2:4] == ["all at once", "30"]  # the fastest, whatever the judge says


def test_the_frontier_has_what_nothing_else_beats():
    def point(way: str, value: float, per_pass: float) -> dial_result.Point:
        return dial_result.Point("4", way, stats.Estimate(value, value, value, 1), per_pass, {"1": 8 / per_pass})

    slow, quick, dull, beaten = (
        point("1 a pass", 0.1, 1),
        point("all at once", 2.0, 4),
        point("above 0.5", -0.7, 2),
        point("2 a pass", 0.8, 2),
    )
    points = [beaten, quick, slow, dull]
    assert dial_result.frontier(points, "pass") == [slow, dull, quick]  # below real text counts as far as above it
    assert dial_result.frontier(points, "1") == [slow]


def test_it_measures_what_it_says(tiny_recipe, tmp_path, monkeypatch):
    """From end to end, with random weights in place of trained ones."""
    monkeypatch.setattr(dial, "FEW", (1, 4, 0))
    monkeypatch.setattr(dial, "WAYS", {k: dial.WAYS[k] for k in ("1 a pass", "all at once", "above 0.5")})
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
    lab = core.ExperimentRunner(tmp_path / "x", Size("least", 1, 2, 2, 8, 2, 1, (1e-3,)), {"causal": base})
    result = dial.run(lab)
    assert {tag for tag, _ in made} == {f"-dial-{name}" for name in ("1", "4", "row", "all")} | {"-judge"}
    bits = {f.name: f.value.value for f in result.figures if f.name.startswith("bits")}
    assert len(bits) == 6
    assert len(set(bits.values())) == 3  # the same weights for each and for all
    passes = {f.name: f.value.value for f in result.figures if f.name.startswith("tokens per pass")}
    # 8 tokens behind 3 and [CLS]; the prompt gives the first. No block is cut, so a token a pass costs the same in any block;
    # two blocks of 4 at once take a pass each, and one between them that puts the first into the cache.
    expected = {"1, 1 a pass": 8 / 7, "4, 1 a pass": 8 / 7, "4, all at once": 8 / 3}
    for way, value in expected.items():
        assert passes[f"tokens per pass, blocks of {way}"] == pytest.approx(value)
    assert passes["tokens per pass, whole row, all at once"] == pytest.approx(8, abs=1)
    (tmp_path / "x" / "parts" / "dial-nats-4-0.json").unlink()
    made.clear()
    again = dial.run(lab)  # only what is gone is measured again
    assert set(made) == {("-dial-4", 0)}
    assert again.finding == result.finding
