"""What the experiments on running text conclude from measurements that leave no doubt, and from those that say nothing."""

import pytest

from bothways.compare import directions, generation, prompts, stats
from bothways.sample.directions import BOTH, FORWARD

SEEDS = range(3)


def near(value: float, seed: int, of: str = "") -> float:
    """A measurement with a little spread, not the same for every model."""
    return value + 0.002 * ((seed * 7 + len(of)) % 3 - 1)


def scores(bits: float, share: float, seed: int, arm: str) -> dict:
    """Of two items each, the pieces of 10 and 30 bytes."""
    shares = [near(share, seed, arm)] * 2
    pieces = [10 * near(bits, seed, arm), 30 * near(bits, seed, arm)]
    return {"bits": pieces, "pairs": shares, "cloze": shares, "by_kind": {"agreement": shares}}


def directions_found(share_both: float, bits_both: float) -> tuple:
    found = {
        "causal": [{FORWARD: scores(2.0, 0.6, s, "causal")} for s in SEEDS],
        "masked": [{BOTH: scores(bits_both, share_both, s, "bothways")} for s in SEEDS],
        "hybrid": [{FORWARD: scores(2.1, 0.6, s, "h"), BOTH: scores(2.4, 0.7, s, "hy")} for s in SEEDS],
    }
    tuned = {
        arm: {"test": [near(v, s, arm) for s in SEEDS]}
        for arm, v in (("causal", 0.6), ("masked", share_both), ("hybrid", 0.6))
    }
    tuned["masked"]["test"] = [v + 0.001 * s for s, v in enumerate(tuned["masked"]["test"])]
    baseline = {"bits": 3.0, "bytes": [10, 30], "pairs": 0.5, "cloze": 0.1, "tuned": 0.5}
    return found, tuned, [[22.0, 66.0], [22.01, 66.03], [21.99, 65.97]], baseline, 0.3


@pytest.mark.parametrize(
    ("share", "bits", "verdict"), [(0.8, 2.5, stats.HOLDS), (0.4, 2.5, stats.FAILS), (0.8, 1.5, stats.FAILS)]
)
def test_directions(share, bits, verdict):
    result = directions.conclude(*directions_found(share, bits))
    assert result.verdict == verdict
    assert ("better at minimal pairs" in result.finding) == (share > 0.6)
    named = {f.name: f for f in result.figures}
    assert named[f"bits, masked, {BOTH}"].value.holds(bits)
    assert named[f"bits, masked, {BOTH}"].rule.startswith("bound")
    assert named["bits, causal at 30% of the tokens, forward"].baseline == 3.0
    assert all(f.baseline is not None for f in result.figures)
    hybrid = result.tables[2].rows
    assert hybrid[0][1].startswith("+0.1")  # bits forward: 2.1 against 2.0


def generation_found(writes: float, fills: float) -> tuple:
    def run(arm: str, ways: dict[str, float], reading: str, share: float, s: int) -> dict:
        measures = {"distinct": 0.9, "entropy": 5.0, "self_bleu": 0.2, "milliseconds": 3.0}
        written = {
            w: {"judge": near(bits, s, w + arm), **{k: near(v, s) for k, v in measures.items()}}
            for w, bits in ways.items()
        }
        return {"writes": written, "spans": {reading: {str(n): near(share, s, arm) for n in generation.SPANS}}}

    ways = {"chunks of 16, 16 readings": writes, "chunks of 16 at once": writes + 1}
    found = {
        "causal": [run("causal", {"left to right": 9.1}, FORWARD, 0.2, s) for s in SEEDS],
        "masked": [run("bothways", ways, BOTH, fills, s) for s in SEEDS],
    }
    tuned = {"causal": [0.6, 0.601, 0.599], "masked": [0.8, 0.803, 0.8]}
    spans = {str(n): 0.05 for n in generation.SPANS}
    return found, tuned, {"writes": {"judge": 9.0, "distinct": 0.9, "entropy": 5.0, "self_bleu": 0.2}, "spans": spans}


@pytest.mark.parametrize(
    ("writes", "fills", "verdict"),
    [(10.0, 0.4, stats.HOLDS), (9.0, 0.4, stats.FAILS), (8.0, 0.4, stats.HOLDS), (10.0, 0.1, stats.FAILS)],
)
def test_generation(writes, fills, verdict):
    """Too plain a text is as far from real text as too wild a one."""
    assert generation.conclude(*generation_found(writes, fills)).verdict == verdict


@pytest.mark.parametrize(("ahead", "verdict"), [(0.1, stats.HOLDS), (-0.1, stats.FAILS), (0.0, stats.OPEN)])
def test_prompts(ahead, verdict):
    curves = {
        (arm, how, n): [
            0.6 + (ahead if how == "prompt" else 0) + 0.001 * ((s * s + len(arm + how) + n) % 5) for s in SEEDS
        ]
        for arm in ("causal", "masked")
        for how in ("prompt", "head")
        for n in prompts.COUNTS
    }
    names = ("one model, named tasks", "one body, many heads", "a model for each task")
    many = {
        a: {k: [near(0.7 + (ahead if i == 0 else 0), s, k) for s in SEEDS] for i, k in enumerate(names)}
        for a in ("causal", "masked")
    }
    moved = {
        a: {"prompt": [near(0.1 + ahead, s, "xy") for s in SEEDS], "head": [near(0.1, s) for s in SEEDS]} for a in many
    }
    assert prompts.conclude(curves, many, moved).verdict == verdict
