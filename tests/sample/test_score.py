"""Scores of texts: the sum of what the model says of every token, each counted once."""

import numpy as np
import pytest

from bothways.sample import score
from bothways.sample.score import causal_logprobs, windows


@pytest.mark.parametrize("context", range(2, 20))
def test_windows_score_every_token_once_with_half_a_context_behind_it(context):
    for length in range(100):
        scored = []
        for begin, end, first in windows(length, context):
            assert 0 <= begin < end <= length
            assert end - begin <= context
            assert begin < first < end
            assert begin == 0 or first - begin >= context // 2
            scored += range(first, end)
        assert scored == list(range(1, length))


@pytest.mark.parametrize("context", [2, 5, 8])
def test_a_text_within_the_context_is_one_window(context):
    assert [windows(n, context) for n in range(2, context + 1)] == [[(0, n, 1)] for n in range(2, context + 1)]
    assert len(windows(context + 1, context)) == 2


def sequences_of(lengths: list[int], vocabulary: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocabulary, n).tolist() for n in lengths]


def total(gpt, tokens: list[int], first: int = 1) -> float:
    """Sum over tokens[first:] of their log-probabilities, from one full pass."""
    return float(sum(gpt.logprobs(tokens)[t - 1, tokens[t]] for t in range(first, len(tokens))))


def test_a_ragged_batch_is_scored_as_by_full_passes(gpt):
    sequences = sequences_of([9, 2, 23, 1, 16, 17, 3, 22, 12, 5, 20], gpt.module.cfg.vocab_size)
    found = causal_logprobs(gpt.module, gpt.params, sequences, gpt.module.cfg.context_length)
    np.testing.assert_allclose(found, [total(gpt, tokens) for tokens in sequences], rtol=1e-4, atol=1e-5)
    assert found[3] == 0  # nothing comes before the only token


def test_batches_of_any_size_give_the_same(gpt):
    sequences = sequences_of([9, 2, 23, 1, 16, 17, 3, 22, 60], gpt.module.cfg.vocab_size)
    whole = causal_logprobs(gpt.module, gpt.params, sequences, gpt.module.cfg.context_length)
    found = causal_logprobs(gpt.module, gpt.params, sequences, gpt.module.cfg.context_length, memory=30_000)
    np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-5)


def test_texts_longer_than_the_context_are_scored_by_half_windows(gpt):
    context = gpt.module.cfg.context_length
    sequences = sequences_of([24, 30, 34, 35, 84], gpt.module.cfg.vocab_size, seed=1)
    expected = []
    for tokens in sequences:
        nats, begin, at = total(gpt, tokens[:context]), 0, context
        while at < len(tokens):
            begin += context // 2
            nats += total(gpt, tokens[begin : begin + context], first=at - begin)
            at = begin + context
        expected.append(nats)
    np.testing.assert_allclose(causal_logprobs(gpt.module, gpt.params, sequences, context), expected, rtol=1e-4)


@pytest.mark.parametrize("more", [0, 1])
def test_the_last_token_is_predicted_and_not_read(gpt, monkeypatch, more):
    """A row is never longer than the context, whose length suits kernels better than one more."""
    shapes, real, context = [], score.next_token_logprobs, gpt.module.cfg.context_length
    monkeypatch.setattr(score, "next_token_logprobs", lambda *args: shapes.append(args[2]["tokens"].shape) or real(*args))
    sequences = sequences_of([context + more, 9], gpt.module.cfg.vocab_size)
    found = causal_logprobs(gpt.module, gpt.params, sequences, context + more)
    assert max(shape[1] for shape in shapes) == context
    for tokens, nats in zip(sequences, found, strict=True):
        logprobs = gpt.logprobs(tokens[:-1])
        assert nats == pytest.approx(sum(logprobs[t - 1, tokens[t]] for t in range(1, len(tokens))), rel=1e-4)


def test_nothing_to_score_gives_nothing(gpt):
    assert causal_logprobs(gpt.module, gpt.params, [], gpt.module.cfg.context_length) == []
    assert causal_logprobs(gpt.module, gpt.params, [[4]], gpt.module.cfg.context_length) == [0.0]
