"""Both in one set of weights: how many of the rows to read forward, and what that costs each direction."""

import dataclasses
import math
from typing import Any

from bothways.compare import pictures
from bothways.compare.core import Experiment, ExperimentRunner, Measurement, Pilot, Result, Table
from bothways.compare.run import masked_only
from bothways.compare.stats import FAILS, HOLDS, OPEN, Estimate, difference, format_difference, mean
from bothways.compare.text import bound_nats, forward_nats, hidden_nats, text_of
from bothways.sample.directions import FORWARD, directions

SHARES = (0.5, 0.75, 0.875, 0.9375, 0.96875)
"""Of rows read forward."""
FEW = (0.5, 0.9375)
"""Of a size that trains for fewer than 100 steps."""
RATE = 0.3
"""Share of tokens that are hidden from all models alike."""
PRICE = 0.03
"""Bits per byte that reading forward may cost for the price to be one model's."""
MEASURES = {
    "forward": ("causal", "bits per byte read forward, rule causal"),
    "both ways": ("masked", "bits per byte read both ways, rule bound, 32 draws; the truth is at most this"),
    "hidden": ("masked", f"nats per token of {RATE:.0%} hidden in held-out pieces, the same for all models"),
}
"""What is measured: (the parent that is asked the same, the rule)."""
Values = list[list[float]]


def measured(lab: ExperimentRunner, arm: str, seed: int, share: float | None = None) -> dict[str, list[float]]:
    """Of one model, in each direction that it was trained in: a value for every held-out piece."""
    how = {}
    if share is not None:
        objective = dataclasses.replace(lab.recipes[arm].objective, causal_share=share)
        how = {"objective": objective, "tag": f"-{share:g}"}
    pieces, model, found = held_pieces(lab), lab.text(arm, seed, **how), {}
    for direction, asks in directions(model).items():
        if direction == FORWARD:
            found["forward"] = forward_nats(asks, pieces).tolist()
        else:
            found["both ways"] = bound_nats(asks, pieces).tolist()
            found["hidden"] = hidden_nats(asks, text_of(lab), pieces, RATE)[0].tolist()
    return found


def held_pieces(lab: ExperimentRunner) -> list[list[int]]:
    return text_of(lab).pieces(max(8, lab.size.items // 6), lab.recipes["causal"].model.context_length - 2)


def sizes(lab: ExperimentRunner) -> list[int]:
    """Bytes of the pieces."""
    lengths = text_of(lab).tokenizer.byte_lengths()
    return [int(lengths[p].sum()) for p in held_pieces(lab)]


def run(lab: ExperimentRunner) -> Result:
    shares = FEW if 0 < lab.size.text_steps < 100 else SHARES
    parents: dict[str, list[dict[str, list[float]]]] = {"causal": [], "masked": []}
    mixed: dict[float, list[dict[str, list[float]]]] = {share: [] for share in shares}
    # The masked parent is the hybrid with no row read forward: as a rule that is the masked arm, which is trained already.
    own = masked_only(lab.recipes["hybrid"]) == lab.recipes["masked"]
    arms: dict[str, tuple[str, float | None]] = {
        "causal": ("causal", None),
        "masked": ("masked", None) if own else ("hybrid", 0),
    }
    for seed in lab.seeds:
        for name, (arm, share) in arms.items():
            parents[name].append(lab.part(f"shares-{name}-{seed}", lambda a=arm, x=share, s=seed: measured(lab, a, s, x)))
        for share in shares:
            name = f"shares-{share:g}-{seed}"
            mixed[share].append(lab.part(name, lambda s=seed, x=share: measured(lab, "hybrid", s, x)))
    return conclude(parents, mixed, lab.part("shares-bytes", lambda: sizes(lab)))


def conclude(
    parents: dict[str, list[dict[str, list[float]]]], mixed: dict[float, list[dict[str, list[float]]]], size: list[int]
) -> Result:
    """All values are [seeds][pieces], of pieces of so many bytes."""

    def of(runs: list[dict[str, list[float]]], what: str) -> tuple[Values, list[int] | None]:
        values = [run[what] for run in runs]
        return ([[x / math.log(2) for x in row] for row in values], size) if what != "hidden" else (values, None)

    figures: list[Measurement] = []
    for what, (parent, rule) in MEASURES.items():
        figures.append(Measurement(f"{what}, {parent}", mean(*of(parents[parent], what)), rule))
        figures += [Measurement(f"{what}, {x:.4g} forward", mean(*of(runs, what)), rule) for x, runs in mixed.items()]
    costs: dict[float, dict[str, Estimate]] = {
        x: {what: difference(of(runs, what)[0], *of(parents[parent], what)) for what, (parent, _) in MEASURES.items()}
        for x, runs in mixed.items()
    }
    figures += [
        Measurement(f"{what}, {x:.4g} forward minus {MEASURES[what][0]}", e, MEASURES[what][1])
        for x, found in costs.items()
        for what, e in found.items()
    ]
    value = {f.name: str(f.value) for f in figures}
    rows: list[list[Any]] = [
        ["causal", value["forward, causal"], "", "", ""],
        ["masked", "", "", value["both ways, masked"], value["hidden, masked"]],
    ]
    for x, found in costs.items():
        shown = [format_difference(found[what]) for what in MEASURES]
        rows.append([f"{x:.2%} forward", value[f"forward, {x:.4g} forward"], shown[0], shown[1], shown[2]])
    columns = ("rows", "forward, bits per byte", "minus causal", "both ways minus masked", "hidden minus masked")
    fair = {x: f for x, f in costs.items() if f["forward"].high <= PRICE and f["both ways"].high <= 0}
    dear = all(f["forward"].low > PRICE or f["both ways"].low > 0 for f in costs.values())
    best = min(fair or costs, key=lambda x: costs[x]["forward"].value)
    shown = {what: format_difference(costs[best][what]) for what in MEASURES}
    series = {
        f"{what} minus {MEASURES[what][0]}": [(1 - x, f[what]) for x, f in costs.items()]
        for what in ("forward", "both ways")
    }
    at = [1 - x for x in costs]
    picture = pictures.curves(
        series, "share of rows read both ways", "bits per byte more", log_x=True, at=at, the_price=PRICE
    )
    verdict = HOLDS if fair else FAILS if dear else OPEN
    so = {
        HOLDS: " At this size one set of weights is both.",
        FAILS: " Every share costs one of the directions.",
        OPEN: "",
    }
    return Result(
        verdict,
        f"With {best:.2%} of the rows read forward, one set of weights costs {shown['forward']} bits per byte against a causal "
        f"model, and {shown['both ways']} against a masked one, at equal tokens and equal compute.{so[verdict]}",
        f"{len(parents['causal'])} seeds that share the order of the data, {len(size)} held-out pieces. It counts as the price "
        f"of one where the whole interval forward is below {PRICE} and the whole interval both ways at most 0. The share that is "
        "named was chosen among all by these same figures.",
        figures,
        [Table("Fewer is better; the masked model is the hybrid with no row read forward", columns, rows)],
        [(picture, "What one set of weights costs over a model for one direction, by the share of rows read both ways.")],
        f"forward {shown['forward']}, both ways {shown['both ways']} bits per byte",
    )


EXPERIMENT = Experiment(
    "shares",
    "Both, for the price of one",
    "What has been suprising so far is the ability of GPT to both learn language structure and encode semantic understanding.",
    "One decoder, two directions: some rows ask for the next token, the others for hidden tokens from both sides. The share of "
    "rows read forward goes from a half to 31 of 32; the tokens and the compute are those of a causal and of a masked model of the "
    "same stack. Each is scored in the directions that it was trained in.",
    "GPT-BERT (arXiv 2410.24159), from causal-only to masked-only, BLiMP scored both ways: 74.6 78.8 80.8 82.4 83.9 84.0 84.8 "
    "84.4 84.3. Causal for a quarter of the steps, then masked, beats masked alone at equal steps (arXiv 2507.00994).",
    run,
    needs=("causal", "hybrid"),
    pilots=(
        Pilot(0.007, "bits per byte forward between one set of weights and a causal model"),
        Pilot(0.022, "bits per byte both ways between one set of weights and a masked model"),
    ),
)
