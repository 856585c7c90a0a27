"""One direction against both, and both in one set of weights: likelihood, minimal pairs, cloze, fine-tuning."""

from typing import Any

import numpy as np

from bothways.compare import pictures
from bothways.compare.core import Experiment, ExperimentRunner, Measurement, Pilot, Result, Table, asked
from bothways.compare.labelled import splits, tuned_accuracy
from bothways.compare.stats import (
    Estimate,
    all_of,
    difference,
    format_difference,
    mean,
    mean_share,
    ranked,
    share_difference,
    verdict,
)
from bothways.compare.text import Text, bound_nats, forward_nats, minimal_pairs, text_of
from bothways.data.metrics import naive_bayes
from bothways.sample.directions import BOTH, FORWARD, directions
from bothways.sample.masked import MaskedModel

RULES = {
    ("bits", FORWARD): "causal: bits per byte of held-out text read forward",
    ("bits", BOTH): "bound: the diffusion bound on bits per byte, 32 draws; the truth is at most this",
    ("pairs", FORWARD): "causal: which of two sentences is likelier",
    ("pairs", BOTH): "pll_word: which of two sentences has the higher pseudo-log-likelihood",
    ("cloze", FORWARD): "causal: which of ten words makes the whole piece most likely",
    ("cloze", BOTH): "which of ten words is most likely at the mask",
}
TUNED = "accuracy on test, best of the rates by validation; interval over fine-tunings and items"
TASK, EXAMPLES = "denied", 256
CHOICES, PIECE = 10, 30


def cloze(text: Text, count: int) -> list[tuple[list[int], int, list[int]]]:
    """(piece, place, choices): a held-out piece, and the word in its middle among others about as frequent.

    The right word is the first of the choices; the others are its neighbours by frequency.
    """
    special = text.tokenizer.vocabulary().special
    order = [int(t) for t in np.argsort(-text.unigram, kind="stable") if not special[t]]
    rank, found = {t: i for i, t in enumerate(order)}, []
    for piece in text.pieces(count, PIECE):
        place = PIECE // 2
        first = min(max(0, rank[piece[place]] - CHOICES // 2), len(order) - CHOICES)
        others = [t for t in order[first : first + CHOICES] if t != piece[place]]
        found.append((piece, place, [piece[place], *others[: CHOICES - 1]]))
    return found


def cloze_right(model: MaskedModel, direction: str, tasks: list[tuple[list[int], int, list[int]]]) -> list[bool]:
    """Whether the right word wins; a tie counts as lost."""
    rows = [[*p[:at], c, *p[at + 1 :]] for p, at, choices in tasks for c in choices]
    if direction == FORWARD:
        scores = -forward_nats(model, rows)
    else:
        bos, eos, mask = model.tokenizer.bos, model.tokenizer.eos, model.tokenizer.mask
        hidden = [[bos, *p[:at], mask, *p[at + 1 :], eos] for p, at, choices in tasks]
        n = [len(choices) for *_, choices in tasks]
        scores = np.concatenate(
            asked(model, hidden, [[at + 1] * k for (_, at, _), k in zip(tasks, n, strict=True)], [c for *_, c in tasks])
        )
    scores = scores.reshape(len(tasks), -1)
    return (scores[:, 0] > scores[:, 1:].max(axis=1)).tolist()


def pairs_right(model: MaskedModel, direction: str, pairs: list[tuple[str, str, str]]) -> list[bool]:
    """Whether the right sentence scores higher; a tie counts as lost."""
    ids = [model.tokenizer.encode(sentence) for _, *both in pairs for sentence in both]
    scores = -forward_nats(model, ids) if direction == FORWARD else model.score_tokens(ids, "pll_word")
    return (scores[::2] > scores[1::2]).tolist()


def measured(lab: ExperimentRunner, arm: str, seed: int) -> dict[str, dict[str, Any]]:
    """By direction, for every item: bits of a piece; whether a pair, or a cloze, is right."""
    text, model, found = text_of(lab), lab.text(arm, seed), {}
    pairs, blanks = minimal_pairs(max(4, lab.size.items // 6)), cloze(text, max(4, lab.size.items // 2))
    for direction, asks in directions(model).items():
        pieces = text.pieces(max(4, lab.size.items // 12), model.recipe.model.context_length - 2)
        nats = (forward_nats if direction == FORWARD else bound_nats)(asks, pieces)
        right = pairs_right(asks, direction, pairs)
        by_kind: dict[str, list[int]] = {}
        for (kind, *_), r in zip(pairs, right, strict=True):
            by_kind.setdefault(kind, []).append(int(r))
        found[direction] = {"bits": (nats / np.log(2)).tolist(), "pairs": list(map(int, right)), "by_kind": by_kind}
        found[direction]["cloze"] = list(map(int, cloze_right(asks, direction, blanks)))
    return found


def baselines(lab: ExperimentRunner) -> dict[str, Any]:
    """What counting gives on the same items, and the bytes of the pieces."""
    text = text_of(lab)
    pairs, blanks = minimal_pairs(max(4, lab.size.items // 6)), cloze(text, max(4, lab.size.items // 2))
    counted = [[text.unigram[text.tokenizer.encode(s)].sum() for s in both] for _, *both in pairs]
    pieces = text.pieces(max(4, lab.size.items // 12), lab.recipes["causal"].model.context_length - 2)
    train, _, test = splits(lab, TASK, EXAMPLES, 0)
    guesses = naive_bayes([t for t, _ in train], [str(y) for _, y in train], [t for t, _ in test])
    return {
        "bits": text.bits(-sum(text.unigram[p].sum() for p in pieces), pieces),
        "bytes": [int(text.tokenizer.byte_lengths()[p].sum()) for p in pieces],
        "pairs": float(np.mean([right > wrong for right, wrong in counted])),
        "cloze": float(np.mean([text.unigram[c[0]] > max(text.unigram[c[1:]]) for *_, c in blanks])),
        "tuned": float(np.mean([g == str(y) for g, (_, y) in zip(guesses, test, strict=True)])),
    }


def run(lab: ExperimentRunner) -> Result:
    found = {
        a: [lab.part(f"directions-{a}-{s}", lambda a=a, s=s: measured(lab, a, s)) for s in lab.seeds] for a in lab.arms()
    }
    tuned = {arm: tuned_accuracy(lab, arm, "head", TASK, EXAMPLES) for arm in lab.arms()}
    rate = lab.recipes["masked"].objective.mask_rate

    def short(seed: int) -> list[float]:
        text, model = text_of(lab), lab.text("causal", seed, share=rate, tag="-short")
        pieces = text.pieces(max(4, lab.size.items // 12), model.recipe.model.context_length - 2)
        return (forward_nats(directions(model)[FORWARD], pieces) / np.log(2)).tolist()

    fewer = [lab.part(f"directions-short-{s}", lambda s=s: short(s)) for s in lab.seeds]
    return conclude(found, tuned, fewer, lab.part("directions-baselines", lambda: baselines(lab)), rate)


def conclude(found: dict, tuned: dict, fewer: list[list[float]], baseline: dict[str, Any], rate: float) -> Result:
    """All values are [seeds][items]; bits are of pieces of so many `bytes` (baseline)."""
    by: dict[tuple[str, str, str], list[list[float]]] = {}
    size = baseline["bytes"]
    for arm, runs in found.items():
        for direction in runs[0]:
            for what in ("bits", "pairs", "cloze"):
                by[what, arm, direction] = [run[direction][what] for run in runs]

    def estimate(what: str, values: list[list[float]]) -> Estimate:
        return mean(values, size) if what == "bits" else mean_share(values)

    figures = [
        Measurement(f"{w}, {a}, {r}", estimate(w, v), RULES[w, r], baseline=baseline[w]) for (w, a, r), v in by.items()
    ]
    figures += [
        Measurement(
            f"pairs: {k}, {a}, {r}", mean_share([x[r]["by_kind"][k] for x in runs]), RULES["pairs", r], baseline=0.5
        )
        for a, runs in found.items()
        for r in runs[0]
        for k in runs[0][r]["by_kind"]
    ]
    short = mean(fewer, size)
    figures.append(
        Measurement(
            f"bits, causal at {rate:.0%} of the tokens, forward", short, RULES["bits", FORWARD], None, baseline["bits"]
        )
    )
    figures += [
        Measurement(f"fine-tuned on {TASK}, {a}", mean_share(t["test"]), TUNED, baseline=baseline["tuned"])
        for a, t in tuned.items()
    ]

    def against(what: str, arm: str, other: str, mine: str = BOTH, theirs: str = FORWARD) -> Estimate:
        if what == "tuned":
            return share_difference(tuned[arm]["test"], tuned[other]["test"])
        if what == "bits":
            return difference(by[what, arm, mine], by[what, other, theirs], size)
        return share_difference(by[what, arm, mine], by[what, other, theirs])

    costs = against("bits", "masked", "causal")
    better = {what: against(what, "masked", "causal") for what in ("pairs", "cloze", "tuned")}
    equal_asked = difference(by["bits", "masked", BOTH], fewer, size)
    names = {"pairs": "minimal pairs", "cloze": "cloze", "tuned": "fine-tuning"}
    rows = [["likelihood: bits per byte more", format_difference(costs), verdict(costs)]]
    rows.append(
        [f"the same, causal at as many asked tokens ({rate:.0%})", format_difference(equal_asked), verdict(equal_asked)]
    )
    rows += [[f"{names[w]}: accuracy more", format_difference(e), verdict(e)] for w, e in better.items()]
    tables = [
        Table("Masked against causal; the claim is that each is positive", ("measure", "difference", "claim"), rows)
    ]
    groups = {arm: {} for arm in found}
    for (what, arm, direction), values in by.items():
        if what != "bits":
            groups[arm][f"{names[what]}, {direction}"] = mean_share(values)
    for arm, t in tuned.items():
        groups[arm]["fine-tuning"] = mean_share(t["test"])
    summary = [
        [a, r, *(str(estimate(w, by[w, a, r])) for w in ("bits", "pairs", "cloze")), str(mean_share(tuned[a]["test"]))]
        for _, a, r in [k for k in by if k[0] == "bits"]
    ]
    summary += [[f"causal, {rate:.0%} of the tokens", FORWARD, str(short), "", "", ""]]
    summary += [["counting words", "", *(f"{baseline[w]:.3f}" for w in ("bits", "pairs", "cloze", "tuned"))]]
    columns = ("model", "read", "bits per byte", "minimal pairs", "cloze, 1 of 10", "fine-tuned")
    tables.insert(0, Table("At equal tokens seen; the last row but one at equal predicted tokens", columns, summary))
    finding = (
        f"At equal tokens, against the causal model, the masked one is {ranked({names[w]: e for w, e in better.items()})}. "
        f"Its bound on text differs from the causal likelihood by {format_difference(costs, ' bits per byte')}."
    )
    if "hybrid" in found:
        rows = []
        for parent, direction in (("causal", FORWARD), ("masked", BOTH)):
            for what in ("bits", "pairs", "cloze"):
                e = against(what, "hybrid", parent, direction, direction)
                rows.append([f"{what}, {direction}, against {parent}", format_difference(e)])
            rows.append([f"fine-tuning, against {parent}", format_difference(against("tuned", "hybrid", parent))])
        tables.append(
            Table("Hybrid minus each parent, at equal tokens (fewer bits are better)", ("measure", "difference"), rows)
        )
        forward, both = (against("bits", "hybrid", p, r, r) for p, r in (("causal", FORWARD), ("masked", BOTH)))
        costs_both = f"forward {format_difference(forward, ' bits')}, both ways {format_difference(both, ' bits')}"
        finding += f" The hybrid, one set of weights for both directions, against its parents: {costs_both} (fewer bits are better)."
    return Result(
        all_of(verdict(costs), *map(verdict, better.values())),
        finding,
        f"{len(fewer)} seeds, a model for each; models of one seed see the data in the same order. "
        f"{len(tuned['causal']['test'])} fine-tunings, which take these models in turn. Intervals account for seeds and items "
        "together. A bound is not the likelihood: part of the difference is its slack.",
        figures,
        tables,
        [
            (
                pictures.bars(groups, "accuracy", chance_of_pairs=0.5),
                "Accuracy by model and direction; 95 % intervals over seeds and items.",
            )
        ],
        f"masked against causal: {format_difference(costs, ' bits per byte')}, {format_difference(better['tuned'])} of accuracy after fine-tuning",
    )


EXPERIMENT = Experiment(
    "directions",
    "Reading both ways or one way decides which tasks a model is good at",
    "The main distinction is the uni-directional GPT architecture vs the bi-directional BERT architecture. This effects the "
    "input and the types of tasks each performs best on.",
    "Causal, masked (on exactly the same stack), hybrid (half of the rows each way) and BERT proper (masked and next sentences) "
    "are trained on the same text. Each is scored in every direction that it was trained in: likelihood, minimal pairs from "
    "templates, cloze (a word in the middle of held-out text), and a head fine-tuned to tell whether two sentences agree.",
    "GPT-BERT (arXiv 2410.24159), from causal-only to masked-only, BLiMP scored both ways: 74.6 78.8 80.8 82.4 83.9 84.0 84.8 "
    "84.4 84.3. BERT (arXiv 1810.04805, table 5): MNLI 83.9 with both directions, 82.1 left to right.",
    run,
    pilots=(
        Pilot(0.031, "bits per byte between masked and causal"),
        Pilot(0.04, "in the share of minimal pairs"),
        Pilot(0.051, "in the share of clozes"),
        Pilot(0.57, "of accuracy after fine-tuning", tuned=True),
    ),
)
