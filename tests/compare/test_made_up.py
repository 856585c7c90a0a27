"""Experiments on made-up data, against models whose answers are known."""

import itertools
import math
import random
import types

import numpy as np
import pytest

from bothways.compare import algorithms, core, in_context, labelled, modes, stats
from bothways.sample.directions import FORWARD
from tests.compare.oracles import bigram, characters, told_by


@pytest.fixture(scope="module")
def letters():
    return characters(modes.texts(1)[0])


def oracle(tokenizer, case):
    """Knows the strings: of those that agree with what is in sight, each is as likely."""
    L = modes.CASES[case][1]
    strings, begin = [tokenizer.encode(s) for s in modes.modes(case)], 1 + modes.TAG

    def tell(row, place):
        seen = row[begin : begin + L]
        fits = [s for s in strings if all(x in (tokenizer.mask, y) for x, y in zip(seen, s, strict=True))] or strings
        return {s[place - begin]: 1 / len(fits) for s in fits}

    return told_by(tokenizer, tell)


@pytest.mark.parametrize("case", range(len(modes.CASES)))
def test_a_perfect_model_blends_as_often_as_theory_says(letters, case):
    M, L = modes.CASES[case]
    n = 400
    for T in {1, 2, L}:
        valid, blend, other = modes.kinds(case, modes.filled(oracle(letters, case), case, T, n, seed=0))
        theory = modes.blend_of_independent(M, L, T)
        assert other == 0
        assert valid + blend == n
        assert abs(blend / n - theory) <= 4 * math.sqrt(theory * (1 - theory) / n)


def test_the_rate_is_that_of_all_draws_counted():
    for M, L in ((2, 2), (2, 4), (3, 3)):
        draws = list(itertools.product(range(M), repeat=L))
        assert modes.blend_of_independent(M, L) == pytest.approx(sum(len(set(d)) > 1 for d in draws) / len(draws))
    assert modes.blend_of_independent(2, 8) == 1 - 2 ** (1 - 8)
    assert modes.blend_of_independent(2, 8, 8) == 0


def test_the_strings_share_nothing_and_all_cases_are_alike_often():
    train, _ = modes.texts(3)
    assert {len(t) for t in train} == {modes.TAG + modes.WIDTH}
    for case, (M, _) in enumerate(modes.CASES):
        joined = "".join(modes.modes(case))
        assert len(set(joined)) == len(joined)
        counts = [train.count(modes.document(case, s)) for s in modes.modes(case)]
        assert sum(counts) == len(train) // len(modes.CASES)
        assert set(counts) == {sum(counts) // M}
    assert modes.kinds(1, [modes.modes(1)[0], modes.modes(1)[0][:2] + modes.modes(1)[1][2:], "....", "ab"]) == (1, 1, 2)


def test_held_out_lengths_are_in_no_training_text():
    train, _ = algorithms.texts(3000)
    for task, (_, seen, held) in algorithms.TASKS.items():
        assert not set(seen) & set(held)
        questions = [q for cell, asked in algorithms.questions(20).items() if cell == f"{task}, longer" for q, _ in asked]
        assert not any(t.startswith(q) for t in train for q in questions)
    backwards = [q + a for q, a in algorithms.questions(5)["A is B, backwards, never told"]]
    both = [q + a for q, a in algorithms.questions(5)["A is B, backwards, told both ways"]]
    assert not set(backwards) & set(train)
    assert set(both) & set(train)


def test_the_key_of_every_algorithm():
    rng = random.Random(0)
    for n in range(1, 7):
        q, a = algorithms.added(rng, n)
        x, y = q[1:-1].split("+")
        assert int(a[::-1]) == int(x) + int(y)
        assert max(len(x), len(y)) <= n
        q, a = algorithms.depth(rng, n)
        levels = np.cumsum([1 if c == "(" else -1 for c in q[1:-1]])
        assert (levels[-1], levels.min(), levels.max()) == (0, 0, int(a)) == (0, 0, n)
    for make, key in (
        (algorithms.copied, str),
        (algorithms.reversed_, lambda s: s[::-1]),
        (algorithms.sorted_, lambda s: "".join(sorted(s))),
    ):
        q, a = make(rng, 9)
        assert key(q[1:-1]) == a


def test_a_model_that_copies_is_right_at_any_length_and_one_that_guesses_is_not():
    tokenizer = characters(algorithms.texts(500)[0])
    begin = 2  # [CLS] c

    def tell(row, place):
        length = row.index(tokenizer.encode(">")[0]) - begin
        return {row[place - length - 1]: 1.0}

    asked = algorithms.questions(12)["copy, longer"]
    assert algorithms.right(asked, algorithms.said_both_ways(told_by(tokenizer, tell), asked)) == [1] * 12
    always_a = told_by(tokenizer, lambda row, place: {tokenizer.encode("a")[0]: 1.0})
    assert algorithms.right(asked, algorithms.said_both_ways(always_a, asked)) == [0] * 12


def test_the_baselines_know_what_they_saw():
    grams = algorithms.NGram(["cab>ab", "cab>ab", "rab>ba"], n=5)
    assert grams.answer("cab>", 2) == "ab"
    assert grams.answer("rab>", 2) == "ba"
    assert algorithms.nearest([("cab>", "ab"), ("rabcd>", "dcba")], "rabcc>") == "dcba"


def test_verdicts_of_algorithms_follow_the_figures():
    def runs(long: float, back: float) -> list[dict[str, float]]:
        cells = algorithms.questions(1)
        return [
            {c: [(long if "longer" in c else back if "never" in c else 1.0) + 0.001 * s] * 20 for c in cells}
            for s in range(3)
        ]

    base = {"5-gram": dict.fromkeys(algorithms.questions(1), 0.0)}
    worse = [
        dict(r, **{c: [x - 0.01 * s for x in r[c]] for c in r if "longer" in c or "never" in c})
        for s, r in enumerate(runs(0.1, 0.2))
    ]
    assert algorithms.conclude({"causal": worse}, base).verdict == stats.HOLDS
    assert algorithms.conclude({"causal": runs(1.0, 1.0)}, base).verdict == stats.OPEN


@pytest.mark.parametrize("task", in_context.TASKS)
def test_all_tokens_alike_surprise_alike(task):
    documents = in_context.documents(task, 3)
    tokenizer = characters([d[0] for d in documents])
    for reading in (FORWARD, "both ways"):
        got = in_context.nats(bigram(tokenizer), reading, documents)
        assert got.shape == (3, len(documents[0][1]))
        np.testing.assert_allclose(got, math.log(len(tokenizer)), rtol=1e-5)
    logits = np.random.default_rng(0).normal(0, 2, (len(tokenizer),) * 2)
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    ids = [tokenizer.encode(d[0]) for d in documents]
    want = [[-logprobs[i[p - 1], i[p]] for p in d[1]] for i, d in zip(ids, documents, strict=True)]
    for reading in (FORWARD, "both ways"):  # who looks at one token only does not care which
        np.testing.assert_allclose(in_context.nats(bigram(tokenizer, logits), reading, documents), want, rtol=1e-4)


def test_the_best_possible_reader_is_the_one_that_counts():
    """Its probabilities, averaged over documents, are those of the documents: calibrated, and never surprised for good."""
    for task in ("few-shot labels", "regression"):
        surprise = -np.log([[p[0] for p in best] for *_, best in in_context.documents(task, 800)])
        assert surprise[:, -1].mean() < 0.5 * surprise[:, 0].mean()
        assert (np.diff(surprise.mean(axis=0)) < 0.1).all()
    assert in_context.posterior([lambda x: x, lambda x: "0"], [("1", "1"), ("0", "0")]) == [[0.5], [1.0]]
    text, places, best = in_context.recall(random.Random(1))
    for i, (p, b) in enumerate(zip(places, best, strict=True)):
        assert b == [1.0 if text[p - 1] in [text[q - 1] for q in places[:i]] else 0.1]


def test_who_answers_as_the_best_reader_gains_what_it_gains():
    best = {
        t: (-np.log([[p[0] for p in ps] for *_, ps in in_context.documents(t, 50)])).mean(axis=0).tolist()
        for t in in_context.TASKS
    }
    perfect = [{t: [[v + 0.001 * s for v in c]] * 2 for t, c in best.items()} for s in range(3)]
    result = in_context.conclude({"causal": perfect}, best)
    assert result.verdict == stats.HOLDS
    for figure in result.figures:
        if "early minus late" in figure.name:
            assert figure.value.value == pytest.approx(figure.expected)
    flat = [{t: [[1.0] * len(c)] * 2 for t, c in best.items()} for _ in range(3)]
    assert in_context.conclude({"causal": flat}, best).verdict == stats.OPEN


def test_every_task_has_items_to_train_on_at_every_size():
    for size, task in itertools.product(core.SIZES.values(), labelled.TASKS):
        lab = types.SimpleNamespace(size=size)
        train, validation, test = labelled.splits(lab, task, 64, 1)
        assert len(train) == 64, (size.name, task)
        assert len(validation) >= 4
        assert test == labelled.splits(lab, task, 16, 2)[2]
        texts = [{text for text, _ in part} for part in (train, validation, test)]
        assert sum(map(len, texts)) == len(set.union(*texts))
