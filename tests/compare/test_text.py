"""Experiments on running text, against models and matrices whose answers are known."""

import collections
import dataclasses
import itertools
import math
import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bothways.compare import directions, generation, labelled, prompts, stats, text, weights, writing
from bothways.compare.core import SIZES, ExperimentRunner, asked
from bothways.config import ObjectiveConfig
from bothways.data.config import DataConfig
from bothways.data.tokenizer import Tokenizer
from bothways.model.gpt import GPT
from bothways.rundir import Run
from bothways.sample.directions import BOTH, FORWARD
from bothways.sample.hybrid import HybridModel
from tests.compare.oracles import bigram, characters, told_by
from tests.convert.published import save_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    sentences = [" ".join(WORDS) for WORDS in labelled.WORDS.values()] + [
        labelled.items(t, 30, 0)[0][0] for t in labelled.TASKS
    ]
    return characters([*sentences, *(s for _, *pair in text.minimal_pairs(30) for s in pair), "Is it so? no true:"])


@pytest.fixture(scope="module")
def source(tokenizer):
    """(text drawn from a bigram source, its logits [V, V])"""
    V, rng = len(tokenizer), np.random.default_rng(3)
    usual = np.flatnonzero(~tokenizer.vocabulary().special)[-20:]
    logits = np.full((V, V), -30.0)
    logits[:, usual] = rng.normal(0, 1.5, (V, 20))
    p = np.exp(logits[usual][:, usual] - np.logaddexp.reduce(logits[usual][:, usual], axis=1, keepdims=True))
    ids, at = [], 0
    for u in rng.random(6000):
        at = int(np.searchsorted(p[at].cumsum(), u * 0.999999))
        ids.append(int(usual[at]))
    return text.Text(tokenizer, np.array(ids[:5000]), np.array(ids[5000:])), logits


def test_the_true_source_tells_its_text_at_its_true_likelihood(source):
    held, logits = source
    pieces = held.pieces(10, 40)
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    bos = held.tokenizer.bos
    truth = [-sum(logprobs[a, b] for a, b in itertools.pairwise([bos, *p])) for p in pieces]
    np.testing.assert_allclose(text.forward_nats(bigram(held.tokenizer, logits), pieces), truth, rtol=1e-4)


def test_a_uniform_model_costs_the_logarithm_of_the_vocabulary(source):
    held, logits = source
    uniform, V = bigram(held.tokenizer), len(held.tokenizer)
    pieces = held.pieces(4, 40)
    np.testing.assert_allclose(text.forward_nats(uniform, pieces), 40 * math.log(V), rtol=1e-5)
    np.testing.assert_allclose(text.bound_nats(uniform, pieces, draws=400), 40 * math.log(V), rtol=0.15)
    told, unigram = text.hidden_nats(uniform, held, pieces, 0.3)
    assert told == pytest.approx([math.log(V)] * len(pieces), rel=1e-5)
    assert unigram.mean() < math.log(V)
    assert text.hidden_nats(bigram(held.tokenizer, logits), held, pieces, 0.3)[0].mean() < unigram.mean()


def test_every_row_is_asked_at_its_own_places(source):
    held, logits = source
    model, logprobs = bigram(held.tokenizer, logits), jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))
    pieces = [held.held[:n].tolist() for n in (30, 3, 17, 9)]
    got = asked(model, pieces, [[1], [2, 1], [16], []], [[7], [9, 8], [11], []])
    want = [
        [logprobs[pieces[0][0], 7]],
        [logprobs[pieces[1][1], 9], logprobs[pieces[1][0], 8]],
        [logprobs[pieces[2][15], 11]],
        [],
    ]
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, np.array(b), rtol=1e-4)


def test_the_key_decides_the_pairs(tokenizer):
    pairs = text.minimal_pairs(12)
    assert collections.Counter(k for k, *_ in pairs) == dict.fromkeys(text.PAIRS, 12)
    right = {tuple(tokenizer.encode(r)) for _, r, _ in pairs}
    oracle = bigram(tokenizer)
    oracle.score_tokens = lambda ids, rule: np.array([float(tuple(i) in right) for i in ids])
    assert all(directions.pairs_right(oracle, BOTH, pairs))
    assert not any(directions.pairs_right(oracle, BOTH, [(k, w, r) for k, r, w in pairs]))
    alike = [(k, r, r) for k, r, _ in pairs]
    assert not any(directions.pairs_right(bigram(tokenizer), FORWARD, alike))  # a tie is no merit


def test_the_cloze_is_won_by_who_knows_the_source(source):
    held, logits = source
    blanks = directions.cloze(held, 60)
    for piece, place, choices in blanks:
        assert choices[0] == piece[place]
        assert len(set(choices)) == directions.CHOICES
    knows = np.mean(directions.cloze_right(bigram(held.tokenizer, logits), FORWARD, blanks))
    assert knows > 0.3
    assert np.mean(directions.cloze_right(bigram(held.tokenizer), FORWARD, blanks)) == 0  # all alike: no choice wins
    by_hand = [bool(logits[p[at - 1], c[0]] > logits[p[at - 1], c[1:]].max()) for p, at, c in blanks]
    assert directions.cloze_right(bigram(held.tokenizer, logits), BOTH, blanks) == by_hand


def test_symmetric_skew_and_directed_matrices():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(2, 11, 3, 5))
    attention = {"query": {"kernel": kernel}, "key": {"kernel": kernel}}
    same = weights.compared({"decoder": {"stack": {"blocks": {"attention": attention}}}})
    np.testing.assert_allclose([weights.symmetry(m) for m in same], 1.0)
    np.testing.assert_allclose(same[1], kernel[1].reshape(11, 15) @ kernel[1].reshape(11, 15).T)
    square = rng.normal(size=(200, 200))
    assert weights.symmetry(square - square.T) == pytest.approx(-1)
    assert abs(weights.symmetry(square)) < 0.03
    square[:, 7] = 40
    assert weights.direction(square) > 0.3
    assert weights.direction(square.T) == -weights.direction(square)


def test_shuffling_keeps_the_words_of_every_line():
    lines = "to be or not to be\n\nROMEO:\nthat is the question"
    mixed = weights.shuffled(lines, random.Random(1))
    assert mixed != lines
    assert [sorted(a.split()) for a in mixed.split("\n")] == [sorted(a.split()) for a in lines.split("\n")]


def test_text_without_order_keeps_a_published_tokenizer(tiny_recipe, text_file, cache_dir, tmp_path):
    save_tokenizer("gpt2", tmp_path / "gpt2")
    data = DataConfig(str(text_file), tokenizer=str(tmp_path / "gpt2" / "tokenizer.json"), cache=str(cache_dir))
    recipe = dataclasses.replace(tiny_recipe, data=data)
    mixed = weights.without_order(ExperimentRunner(tmp_path / "lab", SIZES["smoke"], {"causal": recipe}))
    assert mixed.problems() == []
    kept, given = (Tokenizer.load(Path(cfg.tokenizer)) for cfg in (mixed, data))
    assert kept.fingerprint == given.fingerprint


def test_a_claim_about_weights_holds_only_if_both_halves_do():
    def found(masked: float) -> dict:
        rows = [{"symmetry": [s + 0.001 * i] * 2, "direction": [0.0] * 2} for s in (0.1, masked) for i in range(3)]
        return {"causal": rows[:3], "masked": rows[3:]}

    kept = {
        a: [{"with": [2.0, 4.0], "without": [2 * v + 0.002 * i, 4 * v + 0.004 * i]} for i in range(3)]
        for a, v in (("causal", 0.5), ("masked", 0.501))
    }
    even = [r | {"symmetry": [x + 1e-4 * i for x in r["symmetry"]]} for i, r in enumerate(found(0.5)["masked"])]
    apart = [{"with": [2.0, 4.0], "without": [1.6 + 0.001 * i, 3.2 - 0.001 * i * i]} for i in range(3)]
    result = weights.conclude(found(0.5) | {"masked": even}, kept | {"masked": apart})
    assert result.verdict == stats.HOLDS
    named = {f.name: f.value for f in result.figures}
    assert named["kept without word order, masked"].value == pytest.approx(0.8, abs=1e-3)
    assert weights.conclude(found(0.1), kept | {"masked": apart}).verdict == stats.OPEN


def test_the_judge_knows_the_source_it_counted():
    rng = np.random.default_rng(0)
    coin = rng.integers(0, 2, 20_000)
    judge = writing.Judge(coin)
    assert judge.bits(rng.integers(0, 2, 2000).tolist()) == pytest.approx(1.0, abs=0.02)
    steps = np.tile([0, 1, 2], 3000)
    assert writing.Judge(steps).bits(steps[:300].tolist()) < 0.5
    assert writing.Judge(steps).bits([0, 2, 1] * 50) > 2


def test_measures_of_variety():
    same, different = [[1, 2, 3, 4]] * 3, [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
    assert writing.distinct(same) == 1 / 3
    assert writing.distinct(different) == 1
    assert writing.self_bleu(same) == pytest.approx(1)
    assert writing.self_bleu(different) < 0.1
    assert writing.entropy(different) == pytest.approx(math.log2(12))


def test_self_bleu_counts_each_text_against_the_others():
    """Of 1 1 1 2 another text has 3 of 4 tokens, 2 of 3 pairs, 1 of 2 threes; of 1 1 2 all; of 1 3 one token."""
    texts = [[1, 1, 1, 2], [1, 1, 2], [1, 3]]
    each = [3 / 4 * 2 / 3 * 1 / 2, 1 * 1 * 1, 1 / 2 * 0.1 / 1 * 0.1 / 1]
    assert writing.self_bleu(texts) == pytest.approx(np.mean(np.cbrt(each)))
    assert writing.self_bleu([[1, 1], [1, 1], [1]], most=1) == pytest.approx(1)  # two texts have it most often


def test_chunks_are_written_behind_what_is_there(tokenizer):
    """Of a model that always says one more than the token before the masks."""
    a = tokenizer.encode("a")[0]

    def tell(row, place):
        return {a: 1.0}

    said = generation.by_chunks(told_by(tokenizer, tell, context_length=40), [[7, 8], [9]], 20, 4, seed=0)
    assert said == [[a] * 20] * 2


@pytest.mark.parametrize("task", labelled.TASKS)
def test_the_key_of_every_labelled_task(task):
    made = labelled.items(task, 60, 1)
    assert len({t for t, _ in made}) == len(made)
    assert 0.2 < np.mean([y for _, y in made]) < 0.8
    assert not {t for t, _ in made} & {t for t, _ in labelled.items(task, 60, 2, without=made)}
    for sentence, label in made:
        words = sentence.replace(".", "").replace(",", "").split()
        if task == "roles":
            assert label == int(words[1] == words[-1])
        if task == "denied":
            assert label == int(words.count("not") != 1)
        if task == "mentioned":
            assert label == int(words[-1] in words[:-1])
        if task == "number":
            assert label == int(words[1].endswith("s"))


@pytest.mark.parametrize("how", ["head", "prompt"])
def test_tuning_learns_what_it_is_told(tokenizer, tiny, how):
    cfg = dataclasses.replace(tiny, n_layers=1, context_length=36, vocab_size=len(tokenizer), init_std=0.1)
    params = jax.jit(GPT(cfg).init)(jax.random.key(0), jnp.zeros((1, 2), int))["params"]
    recipe = dataclasses.replace(bigram(tokenizer).recipe, model=cfg, objective=ObjectiveConfig(kind="hybrid"))
    model = HybridModel(Run(None, recipe, tokenizer, GPT(cfg), params, 0))
    tuned = labelled.Tuned(model, how, steps=16, heads=2)
    named = {"a": [("k", 0), ("q", 1)] * 4}
    named |= {"b": [("k", 1), ("q", 0)] * 4} if how == "head" else {}  # two heads want the opposite of each other
    learned = tuned.fit(tuned.fresh(0), named, 0.1, 0)
    assert all(tuned.right(learned, named))
    assert not all(tuned.right(tuned.fresh(0), named))


def test_what_a_prompt_is_worth():
    assert prompts.worth([0.5, 0.7, 0.9], [0.5, 0.5, 0.7], (16, 64, 256)) == pytest.approx(192)
    assert prompts.worth([0.5, 0.7, 0.9], [0.7, 0.8, 0.9], (16, 64, 256)) == pytest.approx(-48)
    assert math.isnan(prompts.worth([0.5, 0.9, 0.9], [0.5, 0.6, 0.7], (16, 64, 256)))
