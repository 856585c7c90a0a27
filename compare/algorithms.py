"""Reasoning or recall: small algorithms at lengths never seen in training, and facts asked backwards."""

import difflib
import random
import string
from collections.abc import Callable
from typing import Any

import numpy as np

from bothways.compare import pictures
from bothways.compare.core import Experiment, ExperimentRunner, Measurement, Pilot, Result, Table, continued
from bothways.compare.stats import (
    Estimate,
    all_of,
    apart,
    format_difference,
    mean_share,
    share,
    share_difference,
    verdict,
)
from bothways.sample.directions import BOTH, FORWARD, directions
from bothways.sample.masked import MaskedModel

LETTERS, FACTS = "abcdefgh", 40
ROW = 64


def copied(rng: random.Random, n: int) -> tuple[str, str]:
    s = "".join(rng.choices(LETTERS, k=n))
    return f"c{s}>", s


def reversed_(rng: random.Random, n: int) -> tuple[str, str]:
    s = "".join(rng.choices(LETTERS, k=n))
    return f"r{s}>", s[::-1]


def sorted_(rng: random.Random, n: int) -> tuple[str, str]:
    s = "".join(rng.choices(LETTERS, k=n))
    return f"s{s}>", "".join(sorted(s))


def added(rng: random.Random, n: int) -> tuple[str, str]:
    """Numbers of n digits; the sum with its last digit first, as carrying goes."""
    a, b = (rng.randrange(10 ** (n - 1) if n > 1 else 0, 10**n) for _ in range(2))
    return f"a{a}+{b}>", str(a + b).zfill(n + 1)[::-1]


def depth(rng: random.Random, n: int) -> tuple[str, str]:
    """Brackets that nest n deep at most; the answer is how deep."""
    text, level, most = "", 0, 0
    while most < n or level:
        up = level == 0 or (level < n and rng.random() < (0.7 if most < n else 0.3))
        level += 1 if up else -1
        most, text = max(most, level), text + "()"[not up]
        if len(text) > 4 * n + 8:
            text, level, most = "", 0, 0
    return f"b{text}>", str(most)


TASKS: dict[str, tuple[Callable[[random.Random, int], tuple[str, str]], range, range]] = {
    "copy": (copied, range(2, 8), range(8, 13)),
    "reversal": (reversed_, range(2, 8), range(8, 13)),
    "sorting": (sorted_, range(2, 8), range(8, 13)),
    "addition": (added, range(1, 4), range(4, 6)),
    "bracket depth": (depth, range(1, 5), range(5, 7)),
}
"""The task, the lengths (digits, depths) trained on, the lengths held out."""


def facts() -> list[tuple[str, str]]:
    """(A, B) of three letters each, every one in one fact."""
    rng, names = random.Random(5), set()
    while len(names) < 2 * FACTS:
        names.add("".join(rng.choices(string.ascii_uppercase, k=3)))
    names = sorted(names)
    rng.shuffle(names)
    return list(zip(names[::2], names[1::2], strict=True))


def told_forward(a: str, b: str) -> tuple[str, str]:
    return f"{a} is ", b


def told_backward(a: str, b: str) -> tuple[str, str]:
    """The same fact from its other end: `B of ` wants A."""
    return f"{b} of ", a


def texts(count: int = 20_000) -> tuple[list[str], list[str]]:
    """Every task and every length equally often. Half of the facts are told from both ends, the others as `A is B` only."""
    rng, found = random.Random(0), []
    known = facts()
    for _ in range(count):
        task = rng.choice([*TASKS, "fact"])
        if task == "fact":
            i = rng.randrange(FACTS)
            found.append("".join((told_backward if i < FACTS // 2 and rng.random() < 0.5 else told_forward)(*known[i])))
        else:
            make, seen, _ = TASKS[task]
            found.append("".join(make(rng, rng.choice(seen))))
    return found[: count - 200], found[count - 200 :]


def questions(per_cell: int) -> dict[str, list[tuple[str, str]]]:
    """(question, answer) by task and whether the length was trained on. None of those of trained lengths need be new."""
    found: dict[str, list[tuple[str, str]]] = {}
    for task, (make, seen, held) in TASKS.items():
        for name, lengths in (("trained lengths", seen), ("longer", held)):
            rng = random.Random(f"{task} {name}")
            found[f"{task}, {name}"] = [make(rng, lengths[i % len(lengths)]) for i in range(per_cell)]
    known = facts()
    found["A is B, as told"] = [told_forward(*f) for f in known]
    found["A is B, backwards, told both ways"] = [told_backward(*f) for f in known[: FACTS // 2]]
    found["A is B, backwards, never told"] = [told_backward(*f) for f in known[FACTS // 2 :]]
    return found


def said_forward(model: Any, asked: list[tuple[str, str]]) -> list[str]:
    """Greedy answers, as long as the right ones."""
    t = model.tokenizer
    rows = [[t.bos, *t.encode(q)] for q, _ in asked]
    return [t.decode(s)[: len(a)] for s, (_, a) in zip(continued(model, rows, 16, greedy=True), asked, strict=True)]


def said_both_ways(model: MaskedModel, asked: list[tuple[str, str]]) -> list[str]:
    """Masks at the answer's positions, filled with the most likely tokens, the most confident first, a forward pass each."""
    t = model.tokenizer
    rows = [[t.bos, *t.encode(q), *[t.mask] * len(a), t.eos] for q, a in asked]
    positions = [[i for i, x in enumerate(row) if x == t.mask] for row in rows]
    model.fill_rows(rows, positions, max(map(len, positions)))
    return [t.decode([row[p] for p in here]) for row, here in zip(rows, positions, strict=True)]


def nearest(train: list[tuple[str, str]], question: str) -> str:
    """The answer to the most similar question of the training text."""
    likeness = difflib.SequenceMatcher(b=question, autojunk=False)

    def alike(pair: tuple[str, str]) -> float:
        likeness.set_seq1(pair[0])
        return likeness.ratio()

    return max(train, key=alike)[1]


class NGram:
    """The commonest next character behind the last n - 1, or behind fewer where those were never seen."""

    def __init__(self, documents: list[str], n: int = 5):
        self.n, self.counts = n, {}
        for text in documents:
            for i in range(len(text)):
                for k in range(n):
                    if k <= i:
                        after = self.counts.setdefault(text[i - k : i], {})
                        after[text[i]] = after.get(text[i], 0) + 1

    def answer(self, question: str, length: int) -> str:
        text = question
        for _ in range(length):
            after = next(
                c for k in range(self.n - 1, -1, -1) if (c := self.counts.get(text[len(text) - k :] if k else ""))
            )
            text += max(after, key=after.get)
        return text[len(question) :]


def right(asked: list[tuple[str, str]], said: list[str]) -> list[int]:
    """Whether each answer is right to the last character."""
    return [int(a == s) for (_, a), s in zip(asked, said, strict=True)]


def baselines(cells: dict[str, list[tuple[str, str]]]) -> dict[str, dict[str, float]]:
    documents = texts()[0][:4000]
    pairs = [(d[: i + 1], d[i + 1 :]) for d in documents if (i := max(d.find(">"), d.rfind(" "))) > 0]
    grams = NGram(documents)
    found: dict[str, dict[str, float]] = {"5-gram": {}, "nearest neighbour": {}}
    for cell, asked in cells.items():
        found["5-gram"][cell] = float(np.mean(right(asked, [grams.answer(q, len(a)) for q, a in asked])))
        few = asked[:30]
        same = [[p for p in pairs if p[0][0] == q[0] or p[0][0].isupper()][:300] or pairs[:300] for q, _ in few]
        answers = [nearest(p, q) for p, (q, _) in zip(same, few, strict=True)]
        found["nearest neighbour"][cell] = float(np.mean(right(few, answers)))
    return found


def run(lab: ExperimentRunner) -> Result:
    cells = questions(max(5, lab.size.items // 4))

    def measured(arm: str, seed: int) -> dict[str, list[int]]:
        model = lab.toy("algorithms", arm, seed, texts, row=ROW, mask_rate=0.3, batch_size=16)
        known = directions(model)
        if FORWARD in known:
            return {cell: right(asked, said_forward(model, asked)) for cell, asked in cells.items()}
        return {cell: right(asked, said_both_ways(known[BOTH], asked)) for cell, asked in cells.items()}

    arms = lab.arms("causal", "masked")
    found = {a: [lab.part(f"algorithms-{a}-{s}", lambda a=a, s=s: measured(a, s)) for s in lab.seeds] for a in arms}
    return conclude(found, lab.part("algorithms-baselines", lambda: baselines(cells)))


def conclude(found: dict[str, list[dict[str, list[int]]]], baseline: dict[str, dict[str, float]]) -> Result:
    cells = list(found["causal"][0])
    rule = {
        "causal": "greedy, exact match",
        "masked": "as many masks as the answer has characters, a forward pass each; exact match",
    }
    shown = {(arm, c): mean_share([run[c] for run in runs]) for arm, runs in found.items() for c in cells}
    best = {c: max(b[c] for b in baseline.values()) for c in cells}
    figures = [Measurement(f"{c}, {arm}", e, rule[arm], baseline=best[c]) for (arm, c), e in shown.items()]
    rows = [[c, *(str(shown[arm, c]) for arm in found), *(f"{b[c]:.3f}" for b in baseline.values())] for c in cells]

    def averaged(arm: str, ending: str) -> np.ndarray:
        """[seeds, items] the mean over tasks, which have equally many items."""
        return np.mean([[run[f"{task}, {ending}"] for run in found[arm]] for task in TASKS], axis=0)

    longer = averaged("causal", "longer")
    drop = share_difference(averaged("causal", "trained lengths"), longer)
    counted = float(np.mean([best[f"{t}, longer"] for t in TASKS]))
    beyond = share_difference(longer, np.full_like(longer, counted))
    # Facts are counted over all seeds: where every model is alike, seeds alone would show no spread.
    facts_of = [
        [x for run in found["causal"] for x in run[f"A is B, backwards, {how}"]]
        for how in ("told both ways", "never told")
    ]
    both, once = (share(sum(x), len(x)) for x in facts_of)
    curse = apart(both, once)
    names = [c for c in cells if "longer" in c or "trained" in c]
    groups: dict[str, dict[str, Estimate]] = {task: {} for task in TASKS}
    for arm in found:
        for c in names:
            task, length = c.split(", ")
            groups[task][f"{arm}, {length}"] = shown[arm, c]
    return Result(
        all_of(verdict(drop), verdict(curse)),
        f"At lengths not seen in training, the accuracy of the causal model falls by {format_difference(drop, sign='')}; there it differs from "
        f"that of the better of 5-gram and nearest neighbour by {format_difference(beyond)}. On facts queried backwards, its accuracy is lower by "
        f"{format_difference(curse, sign='')} where training had the fact in one direction only than where it had both.",
        f"{len(found['causal'])} seeds; intervals account for seeds and items together, those of facts pool all seeds. A small model trained briefly "
        "fails tasks that a larger one learns, so a failure at trained lengths says nothing about the family. The claim holds only if both "
        "losses are significant.",
        figures,
        [Table("Share of answers that match exactly", ("task", *found, *baseline), rows)],
        [
            (
                pictures.bars(groups, "right answers"),
                "Exact match at trained and at longer lengths; 95 % intervals over seeds and items.",
            )
        ],
        f"{format_difference(drop, sign='')} of accuracy lost at longer lengths, {format_difference(curse, sign='')} on facts queried "
        "backwards",
    )


EXPERIMENT = Experiment(
    "algorithms",
    "A GPT can be given unseen tasks, and where it fails can be found",
    "The architecture and input space is possible to present GPT with unseen tasks that if it could reason could answer is "
    "there, the question of how GPTv3 performs in rigorous testing would be a great question to answer, but its size prohibits "
    "all but its creators and a few choice others from really discovering where GPTv3 fails.",
    "One model learns to copy, reverse, sort, add and count the depth of brackets at short lengths, and is tested at longer ones. "
    "It also sees facts `A is B`, half of them in both directions, and is queried in the other direction. A failure to reason is, "
    "here, a right answer to what resembles the training data and a wrong one to what follows from it.",
    "GPT-3 (arXiv 2005.14165): sums of 4 digits 25.5 %, of 5 digits 9.3 %, reversed words 0.44 %; models that learn `A is B` "
    "do not learn `B is A` (arXiv 2309.12288).",
    run,
    pilots=(Pilot(0.022, "in the share of answers lost at longer lengths"),),
)
