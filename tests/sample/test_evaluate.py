"""Figures of held-out text: the bootstrap that keeps nothing per row, and what a split of any size costs."""

import dataclasses
import itertools
import tracemalloc

import jax
import numpy as np
import pytest

import bothways
from bothways import rundir
from bothways.data import mixture
from bothways.data.metrics import Ratio
from bothways.data.tokens import Tokens
from bothways.errors import InputError
from bothways.sample import evaluate as figures
from tests.train.bodies import write


def test_poisson_bootstrap_agrees_with_the_bootstrap_that_draws_rows():
    rng = np.random.default_rng(3)
    below = rng.integers(5, 40, 211).astype(float)
    above = below * rng.gamma(4, 0.5, 211)
    ratio = Ratio(seed=1)
    for begin in range(0, 211, 37):
        ratio.add(above[begin : begin + 37], below[begin : begin + 37])
    picks = rng.integers(0, 211, (2000, 211))
    drawn = np.percentile(above[picks].sum(1) / below[picks].sum(1), [2.5, 97.5])
    assert ratio.value == pytest.approx(above.sum() / below.sum())
    width = drawn[1] - drawn[0]
    np.testing.assert_allclose(ratio.interval(), drawn, atol=0.1 * width)


def test_unigram_of_a_sample_in_blocks_is_that_of_the_whole():
    rng = np.random.default_rng(0)
    ids = rng.choice(7, 2**20, p=np.arange(1, 8) / 28).astype(np.uint16)
    whole, sample = figures.unigram_logprobs(ids, 11), figures.unigram_logprobs(ids, 11, most=2**18)
    np.testing.assert_allclose(whole[:7], sample[:7], atol=0.03)
    assert np.isfinite(sample).all()
    few = figures.unigram_logprobs(ids[:5], 11)
    np.testing.assert_allclose(np.exp(few), (np.bincount(ids[:5], minlength=11) + 1) / 16)


def test_spread_holds_twice_the_limit_and_reaches_from_first_to_last():
    assert figures.spread(range(3), 5) == [0, 1, 2]
    found = figures.spread(range(1000), 10)
    assert len(found) == 10
    assert found[0] == 0
    assert found[-1] > 850
    assert max(np.diff(found)) <= 3 * min(np.diff(found))


@pytest.fixture(scope="module")
def models(tiny_recipe, tmp_path_factory):
    """A causal and a masked run of the tiny recipe, with weights drawn at random."""
    found, data = {}, tiny_recipe.data
    tokenizer = mixture.obtain_tokenizer(data, mixture.load(data))
    for kind, recipe in (("causal", tiny_recipe), ("masked", masked_of(tiny_recipe))):
        home, rng = tmp_path_factory.mktemp("evaluate") / kind, np.random.default_rng(0)
        recipe = dataclasses.replace(
            recipe, model=dataclasses.replace(recipe.model, vocab_size=len(tokenizer)).resolved()
        )
        params = jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(s.dtype), rundir.param_shapes(recipe))  # noqa: B023
        write(rundir.Run(home, recipe, tokenizer, rundir.module_of(recipe), params, 0), home)
        found[kind] = bothways.load(home)
    return found


def masked_of(recipe):
    return dataclasses.replace(
        recipe,
        family="bert",
        objective=dataclasses.replace(recipe.objective, kind="masked"),
    )


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_memory_of_evaluation_does_not_grow_with_the_split(models, kind):
    """A split of one million tokens and one four times as long: the same peak, but for noise."""
    model = models[kind]
    compute = figures.causal_figures if kind == "causal" else figures.masked_figures
    peaks = []
    for count in (2**18, 2**20):
        ids = np.full(count, model.tokenizer.encode("the")[0], np.uint16)
        ids[::97] = model.tokenizer.bos
        held = Tokens(ids, np.arange(0, count, 97), count)
        rest = () if kind == "causal" else (held,)
        with tracing() as peak:
            found = compute(model, "validation", held, *rest, 64)
        assert {figure.resampled for figure in found} == {"rows"}
        peaks.append(peak())
    assert peaks[1] < 1.5 * peaks[0] + 2**20


class tracing:
    def __enter__(self):
        tracemalloc.start()
        tracemalloc.reset_peak()
        return lambda: self.peak

    def __exit__(self, *_):
        self.peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()


def test_rows_are_read_as_many_at_a_time_as_fit_and_no_more(models, monkeypatch):
    """However the rows are put into batches, the figures are the same."""
    for model in models.values():
        whole = figures.evaluate(model, ["validation"])
        with monkeypatch.context() as m:
            m.setattr(figures, "rows_of", lambda _: 1)
            m.setattr(figures, "READ_AHEAD", model.recipe.model.context_length)
            single = figures.evaluate(model, ["validation"])
        for a, b in itertools.zip_longest(whole, single):
            assert a.metric == b.metric
            assert a.n == b.n
            assert a.value == pytest.approx(b.value, rel=1e-4)


def test_limit_reads_that_many_rows(models):
    found = {f.metric: f for f in figures.evaluate(models["masked"], ["validation"], limit=3)}
    assert found["mlm"].n == 3
    assert found["bits_per_byte"].n == 3
    assert figures.evaluate(models["masked"], ["validation"])[0].n > 3


def test_a_split_in_which_nothing_is_predicted_is_bad_input(models):
    model = models["causal"]
    only_starts = Tokens(np.full(30, model.tokenizer.bos, np.uint16), np.arange(30), 30)
    with pytest.raises(InputError, match="no token that the model predicts"):
        figures.causal_figures(model, "validation", only_starts, 0)


def test_conversations_are_read_some_at_a_time_with_the_same_figures(models, monkeypatch):
    """However many there are, in memory is a part of them; those without an answer count for nothing."""
    model, rng = models["causal"], np.random.default_rng(1)
    ids = rng.integers(5, 60, 23 * 13).astype(np.uint16)
    scored = np.arange(len(ids)) % 5 > 2
    scored[: 13 * 7] = False  # a whole part without an answer
    held = Tokens(ids, np.arange(0, len(ids), 13), len(ids), scored=scored)
    whole = figures.conversation_figures(model, "validation", held, 0)
    together, real = [], figures.scoring.causal_logprobs

    def counted(module, params, rows, *rest, **more):
        together.append(len(rows))
        return real(module, params, rows, *rest, **more)

    monkeypatch.setattr(figures, "READ_AHEAD", 2 * model.recipe.model.context_length)
    monkeypatch.setattr(figures.scoring, "causal_logprobs", counted)
    parts = figures.conversation_figures(model, "validation", held, 0)
    assert max(together) <= 2 * 3  # two conversations, of three answers at most
    for a, b in zip(whole, parts, strict=True):
        assert (a.metric, a.n) == (b.metric, b.n)
        np.testing.assert_allclose([a.value, *a.interval], [b.value, *b.interval], rtol=1e-5)
