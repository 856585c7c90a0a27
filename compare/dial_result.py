"""What the dial's experiment concludes: bits per byte by block size, and the frontier of quality against cost."""

import dataclasses
import itertools
from typing import Any

import numpy as np

from bothways.compare import pictures
from bothways.compare.core import Measurement, Result, Table
from bothways.compare.stats import Estimate, all_of, detectable, format_difference, mean, two_way, verdict

WAYS = {
    "1 a pass": (1, 0.0, True),
    "2 a pass": (2, 0.0, True),
    "4 a pass": (4, 0.0, True),
    "all at once": (0, 0.0, True),
    "most confident first": (1, 0.0, False),
    "above 0.5": (1, 0.5, False),
    "above 0.3": (1, 0.3, False),
}
"""How a block is filled, as (tokens a pass, threshold, any order): some in a random order, which draws from the model's own
distribution as far as they are few; or the most confident ones, and all that are above a probability."""
EACH, ALL = "a model for each", "one model for all"
ROWS = (1, 16)
"""Texts that are written together."""
SPEEDS = [f"tokens/s, {n} row{'s' * (n > 1)}" for n in ROWS]
VARIED = {"distinct": "distinct-2", "entropy": "entropy", "self_bleu": "self-BLEU"}
RULES = {
    "bits": "bits per byte of held-out text in blocks: exact at 1 and 2, a bound above, 16 draws; the truth is at most this",
    "judge": "bits per token that a larger causal model of other plays gives what is written, over what it gives real text",
    "per_pass": "tokens written per forward pass of a row, those over the prompt left out",
}


@dataclasses.dataclass(frozen=True)
class Point:
    """One way of writing: what it costs, and what it gives."""

    block: str
    way: str
    judge: Estimate
    per_pass: float
    per_second: dict[str, float]
    """By rows that are written together."""

    @property
    def line(self) -> str:
        return "whole row" if self.block == "row" else f"blocks of {self.block}"

    def cost(self, of: str) -> float:
        """Tokens for a forward `pass`, or for a second at so many rows; 0 where it was not measured."""
        return self.per_pass if of == "pass" else self.per_second.get(of, 0.0)

    @property
    def any_order(self) -> bool:
        return WAYS[self.way][2]


def frontier(points: list[Point], cost: str) -> list[Point]:
    """Those that no other beats in both: nearer to real text in the judge's eyes, and more tokens for the `cost`, a forward
    pass, or a second at so many rows. From the slowest to the fastest."""
    found: list[Point] = []
    for p in sorted(points, key=lambda p: (-p.cost(cost), abs(p.judge.value))):
        if not found or abs(p.judge.value) < abs(found[-1].judge.value):
            found.append(p)
    return found[::-1]


def frontiers(points: list[Point]) -> list[tuple[str, str]]:
    """Pictures of quality against cost: for both orders of writing, by tokens per forward pass and per second."""
    axes = {"pass": "tokens per forward pass"}
    axes |= {str(n): f"tokens per second, {n} row{'s' * (n > 1)}" for n in ROWS}
    orders = {
        True: "in any order, some tokens a pass",
        False: "the most confident tokens first, or all above a probability",
    }
    found = []
    for (any_order, order), (cost, label) in itertools.product(orders.items(), axes.items()):
        series: dict[str, list[tuple[float, Estimate]]] = {}
        for p in points:
            if p.cost(cost) and (p.any_order == any_order or p.block == "1"):  # a GPT stands in all
                series.setdefault(p.line, []).append((p.cost(cost), p.judge))
        if series:
            ticks = (1, 2, 4, 8, 16, 32, 64) if cost == "pass" else ()
            svg = pictures.curves(series, label, "judge's bits over real text", log_x=True, at=ticks, real_text=0.0)
            more = "Nearer to 0 is better, below it duller than real text; further right is cheaper."
            found.append((svg, f"Writing, {order}: quality against {label}. {more}"))
    return found


def conclude(found: dict[str, list[dict]], real: dict[str, Any], speeds: dict[str, Any]) -> Result:
    """The result, of at least one seed of every model: by model the nats of held-out pieces in blocks, and of the model for
    all what is written."""
    blocks = [name for name in found if name != "all"]
    size, seeds = np.array(real["bytes"], float), len(found["all"])

    def nats(model: str, block: str) -> np.ndarray:
        return np.array([run["nats"][block] for run in found[model]]) / np.log(2)

    bits = {(EACH, b): two_way(nats(b, b), size) for b in blocks}
    bits |= {(ALL, b): two_way(nats("all", b), size) for b in blocks}
    figures = [Measurement(f"bits per byte, blocks of {b}, {kind}", e, RULES["bits"]) for (kind, b), e in bits.items()]
    cost = two_way(nats("row", "row") - nats("1", "1"), size)
    shared = two_way(nats("all", "1") - nats("1", "1"), size)
    by_seed = (nats("row", "row") - nats("1", "1")).sum(axis=1) / size.sum()

    def over_real(block: str, way: str) -> np.ndarray:
        """[seeds, texts] bits per token over real text, of the model for all."""
        return np.array([r["writes"][block][way]["judge"] for r in found["all"]]) - np.array(real["judge"])

    def average(block: str, way: str, what: str) -> float:
        return float(np.mean([r["writes"][block][way][what] for r in found["all"]]))

    def at(block: str) -> int:
        """Where a block size stands in the picture: the whole row at twice the last."""
        return int(block) if block != "row" else 2 * int(blocks[-2])

    points = [
        Point(b, way, two_way(over_real(b, way)), average(b, way, "per_pass"), speeds.get(b, {}).get(way, {}))
        for b in blocks
        for way in found["all"][0]["writes"][b]
    ]
    rows = []
    for p in points:
        figures.append(Measurement(f"judge, {p.line}, {p.way}", p.judge, RULES["judge"], expected=0.0))
        passes = mean([r["writes"][p.block][p.way]["per_pass"] for r in found["all"]])
        figures.append(Measurement(f"tokens per pass, {p.line}, {p.way}", passes, RULES["per_pass"]))
        fast = [f"{x:.0f}" if (x := p.per_second.get(str(n))) else "" for n in ROWS]
        more = [f"{average(p.block, p.way, what):.3f}" for what in VARIED]
        rows.append([p.block, p.way, f"{p.per_pass:.2f}", str(p.judge), *more, *fast])
    rows.append(["real text", "", "", "0", *(f"{real[what]:.3f}" for what in VARIED), *[""] * len(ROWS)])
    wide = "16" if "16" in blocks else blocks[-2]
    chunked = two_way(over_real(wide, "all at once") - over_real(wide, "1 a pass"))
    patient = two_way(over_real(wide, "1 a pass") - over_real("1", "1 a pass"))
    quick = average(wide, "above 0.5", "per_pass")
    at_half = two_way(over_real(wide, "above 0.5") - over_real("1", "1 a pass"))
    best = []
    for c, name in (("pass", "a forward pass"), *((str(n), f"a second, {n} row{'s' * (n > 1)}") for n in ROWS)):
        for p in frontier([p for p in points if p.cost(c) and p.any_order], c):
            varied = f"{average(p.block, p.way, 'distinct'):.3f}"
            best.append([name, p.block, p.way, f"{p.cost(c):.3g}", str(p.judge), varied])
    power = ""
    if seeds > 1:
        spread = float(by_seed.std(ddof=1))
        power = (
            f"With the spread between these seeds, {spread:.3f} bits per byte, a difference of {detectable(spread, seeds):.3f} is "
            "found four times out of five. "
        )
    return Result(
        all_of(verdict(cost), verdict(chunked)),
        f"Predicting held-out text, a model of whole rows is {format_difference(cost, ' bits per byte')} worse than one of single "
        f"tokens, at equal tokens; one model for all sizes {format_difference(shared, ' bits')} worse than that at single "
        f"tokens. Writing in blocks of {wide}, a token a pass in any order, is to the judge "
        f"{format_difference(patient, ' bits per token')} further above real text than a token at a time from the left; all "
        f"{wide} at once {format_difference(chunked, ' bits')} further still. All tokens above a probability of 0.5, {quick:.1f} "
        f"a pass: {format_difference(at_half, ' bits')} against a token at a time, with {average(wide, 'above 0.5', 'distinct'):.0%} "
        f"of its pairs of tokens distinct against {average('1', '1 a pass', 'distinct'):.0%}"
        + (": below real text is not better, but duller." if over_real(wide, "above 0.5").mean() < 0 else "."),
        f"{seeds} seed{'s' * (seeds > 1)}, {len(size)} held-out pieces and {len(real['judge'])} texts that are written each way, all in "
        "the intervals"
        f"{'' if seeds > 1 else ', which say nothing of other seeds where there is one'}. {power}The claim counts as held if "
        f"whole rows predict worse than single tokens, and {wide} tokens at once are written worse than one by one. The bound is "
        "no likelihood: some of what whole rows lose is the bound's.",
        figures,
        [
            Table(
                "Bits per byte of held-out text",
                ("block", EACH, ALL),
                [[b, str(bits[EACH, b]), str(bits[ALL, b])] for b in blocks],
            ),
            Table(
                "What one model for all writes behind the beginnings of held-out pieces, at temperature 1 (tokens/s: the fastest run)",
                ("block", "kept in a pass", "tokens a pass", "judge over real, bits", *VARIED.values(), *SPEEDS),
                rows,
            ),
            Table(
                "The frontier of tokens kept in any order: nothing else is both nearer to real text, in the judge's eyes, and cheaper",
                ("tokens for", "block", "kept in a pass", "tokens", "judge over real, bits", "distinct-2"),
                best,
            ),
        ],
        [
            (
                pictures.curves(
                    {k: [(at(b), bits[k, b]) for b in blocks] for k in (EACH, ALL)},
                    "tokens in a block (the last: the whole row)",
                    "bits per byte",
                    log_x=True,
                    at=[at(b) for b in blocks],
                ),
                "Predicting held-out text: exact at 1 and 2, a bound above.",
            ),
            *frontiers(points),
        ],
        f"whole rows against single tokens {format_difference(cost, ' bits per byte')}; {wide} at once against one at a time "
        f"{format_difference(chunked, ' bits per token')}",
    )
