"""Beam search against all sequences there are."""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bothways.sample.beam import length_penalty, make_beam_search
from bothways.sample.decode import Decoder, Row
from tests.sample.models import Known, remembering

V, EOS = 5, 0
SIZE = 16
PROMPTS = [[3, 1, 4], [2], [4, 4, 1, 2, 3]]


@dataclasses.dataclass(frozen=True)
class Searcher:
    """A model, and the compiled programs that all models share."""

    model: Known
    decoder: Decoder
    compiled: Callable

    def __call__(self, prompts, limits, beams: int, alpha: float):
        """For every prompt its hypotheses, best first: (tokens, score, log-probability)."""
        rows = [Row(list(prompt), jax.random.key(0)) for prompt in prompts]
        state, _, _ = self.decoder.start(self.model.params, rows, limits)
        found = self.compiled(
            self.model.params, state.cache, state.logits, state.limit, beams=beams, alpha=alpha, size=SIZE
        )
        texts, lengths = np.asarray(found.finished), np.asarray(found.finished_length)
        return [
            [
                (
                    texts[i, k, : lengths[i, k]].tolist(),
                    float(found.finished_score[i, k]),
                    float(found.finished_logprob[i, k]),
                )
                for k in range(beams)
                if lengths[i, k]
            ]
            for i in range(len(prompts))
        ]

    def every(self, prompt: list[int], limit: int, alpha: float):
        """All sequences that end with eos or at the limit, best first."""
        others = [t for t in range(V) if t != EOS]
        endings = [[*body, EOS] for n in range(limit) for body in itertools.product(others, repeat=n)]
        endings += [list(body) for body in itertools.product(others, repeat=limit)]
        scored = [(tokens, self.model.total(prompt, tokens)) for tokens in endings]
        scored = [(tokens, lp / ((5 + len(tokens)) / 6) ** alpha, lp) for tokens, lp in scored]
        return sorted(scored, key=lambda hypothesis: -hypothesis[1])

    def narrow(self, prompt: list[int], limit: int, beams: int, alpha: float):
        """Beam search by hand, on lists: the finished keep their slots."""
        live, done = [([], 0.0)], []
        for length in range(1, limit + 1):
            longer = [
                ([*tokens, t], lp + step)
                for tokens, lp in live
                for t, step in enumerate(self.model.logprobs(prompt + tokens))
            ]
            longer = sorted(longer, key=lambda hypothesis: -hypothesis[1])[: beams - len(done)]
            over = [(t, lp / ((5 + length) / 6) ** alpha, lp) for t, lp in longer if t[-1] == EOS or length == limit]
            done += over
            live = [(t, lp) for t, lp in longer if t[-1] != EOS]
        return sorted(done, key=lambda hypothesis: -hypothesis[1])


def same(found, expected) -> None:
    assert [tokens for tokens, _, _ in found] == [tokens for tokens, _, _ in expected]
    np.testing.assert_allclose([f[1:] for f in found], [e[1:] for e in expected], rtol=1e-4, atol=1e-5)


def model(seed: int, eos_bias: float) -> Known:
    return remembering(tokens=V, seed=seed, eos=EOS, eos_bias=eos_bias)


@pytest.fixture(scope="module")
def searchers() -> list[Searcher]:
    """Three models: one as it is, one that likes to end, one that never does."""
    models = [model(0, 0.0), model(1, 2.0), model(2, -30.0)]
    decoder, compiled = models[0].decoder(context=32), make_beam_search(models[0].forward, models[0].logits, EOS)
    return [Searcher(model, decoder, compiled) for model in models]


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
def test_wide_beams_find_the_best_of_all_sequences_in_order(searchers, alpha):
    for searcher in searchers:
        limits = [4, 4, 4]
        found = searcher(PROMPTS, limits, beams=341, alpha=alpha)
        for prompt, limit, of_prompt in zip(PROMPTS, limits, found, strict=True):
            expected = searcher.every(prompt, limit, alpha)
            assert len(of_prompt) == len(expected) == 1 + 4 + 16 + 64 + 256
            same(of_prompt, expected)


def test_the_length_penalty_decides_which_is_best(searchers):
    lengths = {}
    for alpha in (0.0, 2.0):
        found = [searcher(PROMPTS, [4, 4, 4], beams=64, alpha=alpha) for searcher in searchers]
        lengths[alpha] = [len(of_prompt[0][0]) for of_searcher in found for of_prompt in of_searcher]
    assert sum(lengths[2.0]) > sum(lengths[0.0])


def test_length_penalty_is_the_published_one():
    np.testing.assert_allclose(length_penalty(jnp.array([1.0, 7.0, 13.0]), 0.0), 1)
    np.testing.assert_allclose(length_penalty(jnp.array([1.0, 7.0, 13.0]), 1.0), [1, 2, 3])
    np.testing.assert_allclose(length_penalty(jnp.array([7.0]), 0.6), 2**0.6, rtol=1e-6)


@pytest.mark.parametrize(("beams", "alpha"), [(1, 0.0), (2, 0.6), (3, 1.0)])
def test_narrow_beams_find_what_a_search_by_hand_finds(searchers, beams, alpha):
    for searcher in searchers:
        limits = [12, 5, 9]
        found = searcher(PROMPTS, limits, beams, alpha)
        for prompt, limit, of_prompt in zip(PROMPTS, limits, found, strict=True):
            same(of_prompt, searcher.narrow(prompt, limit, beams, alpha))


def test_prompts_with_other_limits_do_not_disturb_each_other(searchers):
    limits = [12, 5, 9]
    for searcher in searchers:
        together = searcher(PROMPTS, limits, beams=3, alpha=1.0)
        for prompt, limit, of_prompt in zip(PROMPTS, limits, together, strict=True):
            assert max(len(tokens) for tokens, _, _ in of_prompt) <= limit
            same(searcher([prompt], [limit], beams=3, alpha=1.0)[0], of_prompt)


@pytest.mark.parametrize("alpha", [0.0, 0.6])
def test_one_beam_is_greedy(searchers, alpha):
    limits = [12, 5, 9]
    ended = 0
    for searcher in searchers:
        for prompt, limit, (found,) in zip(PROMPTS, limits, searcher(PROMPTS, limits, beams=1, alpha=alpha), strict=True):
            greedy = searcher.model.greedy(prompt, limit)
            total = searcher.model.total(prompt, greedy)
            same([found], [(greedy, total / ((5 + len(greedy)) / 6) ** alpha, total)])
            ended += greedy[-1] == EOS
    assert 0 < ended < 9  # some end by themselves, some at the limit


def test_a_limit_of_one_token_ranks_the_tokens(searchers):
    for prompt, found in zip(PROMPTS, searchers[0](PROMPTS, [1, 1, 1], beams=3, alpha=1.0), strict=True):
        order = np.argsort(-searchers[0].model.logprobs(prompt))[:3]
        assert [tokens for tokens, _, _ in found] == [[int(t)] for t in order]


def test_there_are_no_more_hypotheses_than_sequences(searchers):
    found = searchers[0](PROMPTS, [1, 2, 1], beams=64, alpha=0.6)
    assert [len(of_prompt) for of_prompt in found] == [V, 1 + (V - 1) * V, V]
    assert sorted(tokens for tokens, _, _ in found[0]) == [[t] for t in range(V)]
