"""Scores become a token: the right tokens are kept, and drawn as often as they should be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bothways.errors import InputError
from bothways.sample.sampling_params import GROUP, SamplingParams, filter_logits, sample_token

# Token:        0     1     2     3     4     5
P = np.array([0.10, 0.40, 0.04, 0.25, 0.06, 0.15])  # in order: 1, 3, 5, 0, 4, 2
KEEP = jax.jit(filter_logits)
CHOOSE = jax.jit(sample_token)
DRAWS = 8192
CRITICAL = 35.0  # chi-square of 5 degrees of freedom exceeds it once in a million times


def kept(p: np.ndarray, **filters) -> list[set[int]]:
    logits = jnp.log(jnp.atleast_2d(jnp.asarray(p, jnp.float32)))
    return [
        set(np.flatnonzero(np.isfinite(row)).tolist()) for row in np.asarray(KEEP(logits, SamplingParams.make(**filters)))
    ]


def draw(logits: np.ndarray, seed: int = 0, **settings) -> tuple[np.ndarray, np.ndarray]:
    keys = jax.random.split(jax.random.key(seed), DRAWS)
    tokens, logprobs = CHOOSE(
        jnp.tile(jnp.asarray(logits, jnp.float32), (DRAWS, 1)), keys, SamplingParams.make(**settings)
    )
    return np.asarray(tokens), np.asarray(logprobs)


def chi_square(tokens: np.ndarray, p: np.ndarray) -> float:
    assert set(np.unique(tokens)) <= set(np.flatnonzero(p))
    seen, wanted = np.bincount(tokens, minlength=len(p))[p > 0], DRAWS * p[p > 0] / p.sum()
    return float(((seen - wanted) ** 2 / wanted).sum())


def test_draws_over_many_groups_follow_the_distribution():
    V = 3 * GROUP + 5  # the last group is padded
    p = np.random.default_rng(0).dirichlet(np.full(V, 0.3))
    p[7] = p[GROUP : GROUP + 9] = p[-3:] = 0.0
    p /= p.sum()
    with np.errstate(divide="ignore"):
        tokens, logprobs = draw(np.log(p))
    often = p * DRAWS > 5
    seen = np.bincount(tokens, minlength=V)
    assert not seen[p == 0].any()
    seen, wanted = [*seen[often], seen[~often].sum()], [*(DRAWS * p[often]), DRAWS * p[~often].sum()]
    square = sum((s - w) ** 2 / w for s, w in zip(seen, wanted, strict=True))
    assert square < often.sum() + 5 * np.sqrt(2 * often.sum())  # mean and 5 standard deviations of chi-square
    np.testing.assert_allclose(logprobs, np.log(p[tokens]), atol=1e-5)


def test_scores_of_a_model_that_diverged_give_a_token_of_the_vocabulary():
    assert set(draw(np.full(7, np.nan))[0]) == {0}


def test_zeros_of_both_signs_are_equally_likely():
    logits = np.array([-1.0, -0.0, 0.0, -0.0, 0.0])
    found = np.asarray(KEEP(jnp.asarray(logits, jnp.float32)[None], SamplingParams.make(top_k=2)))
    assert set(np.flatnonzero(np.isfinite(found[0]))) == {1, 2}


def test_one_token_of_all_the_probability_is_always_drawn():
    scores = np.full(2 * GROUP, -np.inf)
    scores[GROUP - 1] = 3.0
    assert set(draw(scores)[0]) == {GROUP - 1}


@pytest.mark.parametrize(
    ("filters", "tokens"),
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 3}, {1, 3, 5}),
        ({"top_k": 5}, {1, 3, 5, 0, 4}),
        ({"top_k": 6}, {0, 1, 2, 3, 4, 5}),
        ({"top_k": 100}, {0, 1, 2, 3, 4, 5}),
        ({"top_p": 0.01}, {1}),
        ({"top_p": 0.39}, {1}),
        ({"top_p": 0.41}, {1, 3}),
        ({"top_p": 0.64}, {1, 3}),
        ({"top_p": 0.66}, {1, 3, 5}),
        ({"top_p": 0.95}, {1, 3, 5, 0, 4}),
        ({"top_p": 0.97}, {0, 1, 2, 3, 4, 5}),
        ({"min_p": 0.09}, {0, 1, 2, 3, 4, 5}),
        ({"min_p": 0.11}, {1, 3, 5, 0, 4}),
        ({"min_p": 0.16}, {1, 3, 5, 0}),
        ({"min_p": 0.5}, {1, 3}),
        ({"min_p": 1.0}, {1}),
        ({"top_k": 2, "top_p": 0.6}, {1}),  # of 0.40 and 0.25 alone the first has more than 0.6
        ({"top_k": 2, "top_p": 0.63}, {1, 3}),
        ({"top_k": 3, "min_p": 0.5}, {1, 3}),
        ({"top_p": 0.66, "min_p": 0.5}, {1, 3}),
        ({"top_p": 0.41, "min_p": 0.1}, {1, 3}),
    ],
)
def test_filters_keep_exactly_the_right_tokens(filters, tokens):
    assert kept(P, **filters) == [tokens]


def test_filters_look_at_every_row_by_itself():
    rows = np.stack([P, P[::-1], np.full(6, 1 / 6) + np.arange(6) / 1000])
    assert kept(rows, top_k=2) == [{1, 3}, {4, 2}, {5, 4}]
    assert kept(rows, top_p=0.66) == [{1, 3, 5}, {4, 2, 0}, {5, 4, 3, 2}]


@pytest.mark.parametrize(
    "filters", [{"top_k": 7}, {"top_p": 0.5}, {"min_p": 0.3}, {"top_k": 11, "top_p": 0.9}, {"top_p": 1.0}]
)
def test_filters_keep_what_a_sort_would_keep_ties_included(filters):
    """Whole numbers as scores: every value is there several times, zeros of both signs and minus infinity too."""
    rng = np.random.default_rng(3)
    logits = rng.integers(-4, 3, (13, 97)).astype(np.float32)
    logits[rng.random(logits.shape) < 0.1] = -np.inf
    logits[rng.random(logits.shape) < 0.1] = -0.0
    found = np.isfinite(np.asarray(KEEP(jnp.asarray(logits), SamplingParams.make(**filters))))
    for row, mine in zip(logits.astype(np.float64), found, strict=True):
        order = np.argsort(-row, kind="stable")[: filters.get("top_k") or None]
        p = np.exp(row[order]) / np.exp(row[order]).sum()
        keep = (np.cumsum(p) - p < filters.get("top_p", 1.0)) & (p >= filters.get("min_p", 0.0) * p[0]) & (p > 0)
        assert set(np.flatnonzero(mine)) == set(order[keep])


def test_every_row_may_have_numbers_of_its_own():
    own = [{"top_k": 2}, {"top_p": 0.66}, {}, {"min_p": 0.3, "top_p": 0.9}, {"top_k": 4, "top_p": 0.5}]
    each = [SamplingParams.make(**filters) for filters in own]
    together = jax.tree.map(lambda *x: jnp.stack(x)[:, None], *(method.replace(filtered=True) for method in each))
    logits = jnp.log(jnp.tile(jnp.asarray(P, jnp.float32), (len(own), 1)))
    found = [set(np.flatnonzero(np.isfinite(row))) for row in np.asarray(KEEP(logits, together))]
    assert found == [kept(P, **filters)[0] for filters in own]


def test_kept_tokens_keep_their_scores():
    logits = jnp.log(jnp.asarray(P, jnp.float32))[None]
    out = np.asarray(KEEP(logits, SamplingParams.make(top_p=0.66)))
    np.testing.assert_array_equal(out[0, [1, 3, 5]], np.asarray(logits)[0, [1, 3, 5]])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution_at_a_temperature(temperature):
    wanted = P ** (1 / temperature) / (P ** (1 / temperature)).sum()
    tokens, _ = draw(np.log(P), temperature=temperature)
    assert chi_square(tokens, wanted) < CRITICAL
    others = [P ** (1 / t) / (P ** (1 / t)).sum() for t in (0.5, 1.0, 2.0) if t != temperature]
    assert all(chi_square(tokens, other) > CRITICAL for other in others)


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({"top_k": 3}, [1, 3, 5]),
        ({"top_p": 0.66}, [1, 3, 5]),
        ({"min_p": 0.16, "temperature": 1.0}, [1, 3, 5, 0]),
        ({"top_p": 0.66, "temperature": 0.5}, [1, 3]),  # filters look at what the temperature made of it: 0.60, 0.23, ...
        ({"top_p": 0.66, "temperature": 4.0}, [1, 3, 5, 0]),
        ({"min_p": 0.5, "temperature": 2.0}, [1, 3, 5, 0]),
    ],
)
def test_filtered_draws_follow_what_is_left(settings, tokens):
    wanted = np.zeros(6)
    wanted[tokens] = P[tokens] ** (1 / settings.get("temperature", 1.0))
    drawn, _ = draw(np.log(P), seed=1, **settings)
    assert set(drawn.tolist()) == set(tokens)
    assert chi_square(drawn, wanted) < CRITICAL


@pytest.mark.parametrize(
    "settings", [{"greedy": True}, {"temperature": 0.0}, {"top_k": 1}, {"greedy": True, "top_p": 0.5}]
)
def test_greedy_is_the_most_likely_token_whatever_the_key(settings):
    logits = np.random.default_rng(0).normal(size=(DRAWS, 6)).astype(np.float32)
    tokens, _ = CHOOSE(logits, jax.random.split(jax.random.key(3), DRAWS), SamplingParams.make(**settings))
    np.testing.assert_array_equal(tokens, logits.argmax(axis=1))


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.3}, {"temperature": 3.0, "top_k": 2}, {"min_p": 0.5}, {"greedy": True}]
)
def test_the_logprob_is_that_of_the_unmodified_distribution(settings):
    shifted = np.log(P) + 7.0  # scores need not be normalised
    tokens, logprobs = draw(shifted, **settings)
    np.testing.assert_allclose(logprobs, np.log(P)[tokens], rtol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"top_k": 2}, {"greedy": True}])
def test_a_token_that_is_never_drawn(settings):
    """And the others keep the log-probability that the model gives them."""
    top = int(P.argmax())
    tokens, logprobs = draw(np.log(P), never=top, **settings)
    assert top not in set(tokens.tolist())
    np.testing.assert_allclose(logprobs, np.log(P)[tokens], rtol=1e-5)


def test_a_row_depends_on_its_own_key_and_scores_only():
    logits = np.random.default_rng(1).normal(size=(DRAWS, 6)).astype(np.float32)
    keys = jax.random.split(jax.random.key(5), DRAWS)
    method = SamplingParams.make(top_p=0.9)
    together, _ = CHOOSE(logits, keys, method)
    order = np.random.default_rng(2).permutation(DRAWS)
    shuffled, _ = CHOOSE(logits[order], keys[order], method)
    np.testing.assert_array_equal(np.asarray(together)[order], shuffled)
    assert len(set(draw(np.log(P), seed=0)[0][:50].tolist())) > 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": -1}, "top-k is -1"),
        ({"top_k": 2**40}, "top-k is 10"),
        ({"top_p": 0.0}, "top-p is 0.0"),
        ({"top_p": 1.1}, "top-p is 1.1"),
        ({"top_p": float("nan")}, "top-p is nan"),
        ({"min_p": -0.1}, "min-p is -0.1"),
        ({"min_p": 1.1}, "min-p is 1.1"),
    ],
)
def test_numbers_out_of_range_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        SamplingParams.make(**settings)


def test_other_numbers_need_no_new_compilation():
    keys, logits = jax.random.split(jax.random.key(0), 2), jnp.zeros((2, 6))
    counted = jax.jit(lambda *arguments: sample_token(*arguments))
    for settings in ({"top_k": 3}, {"top_k": 4, "top_p": 0.5}, {"min_p": 0.2, "temperature": 0.7}):
        counted(logits, keys, SamplingParams.make(**settings))
    assert counted._cache_size() == 1
    counted(logits, keys, SamplingParams.make(greedy=True))
    assert counted._cache_size() == 2
