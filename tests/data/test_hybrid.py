"""Rows of the hybrid objective: some read forward, the others with tokens hidden and asked for one place before."""

import dataclasses

import numpy as np

from data import examples
from data.tokenizer import made_up_vocabulary

LENGTH, V = 41, 37
VOCABULARY = made_up_vocabulary(V)
MASKING = examples.Masking(rate=0.3, mask_share=1.0, random_share=0.0)


def row(seed: int = 0) -> examples.Example:
    """Two documents, the second from place 17 on."""
    tokens = np.random.default_rng(seed).integers(5, V, LENGTH + 1).astype(np.int32)
    tokens[[16, 17]] = VOCABULARY.eos, VOCABULARY.bos
    return {"tokens": tokens, "segments": np.repeat([1, 2], [17, LENGTH - 16]).astype(np.int32)}


def make(seed: int, share: float, masking: examples.Masking = MASKING) -> examples.Example:
    return examples.hybrid(row(), np.random.default_rng(seed), VOCABULARY, masking, share)


def test_rows_read_forward_are_causal_rows_with_no_prefix():
    plain, got = examples.causal(row(), np.random.default_rng(0)), make(3, 1.0)
    assert got.pop("prefix") == 0
    for name, value in plain.items():
        np.testing.assert_array_equal(got[name], value)


def test_rows_read_both_ways_ask_one_place_before_each_hidden_token():
    whole = row()["tokens"]
    for seed in range(50):
        got = make(seed, 0.0)
        hidden = np.flatnonzero(got["tokens"] != whole[:-1])
        assert got["prefix"] == LENGTH
        np.testing.assert_array_equal(np.flatnonzero(got["weights"]), hidden - 1)
        np.testing.assert_array_equal(got["targets"][hidden - 1], whole[hidden])
        assert (got["tokens"][hidden] == VOCABULARY.mask).all()
        assert not VOCABULARY.special[whole[hidden]].any()
        assert 0 not in hidden  # nothing stands before it that could say it
        candidates = LENGTH - 1 - 2
        assert len(hidden) == round(0.3 * candidates)
        np.testing.assert_allclose(got["weights"][hidden - 1], 1 / 0.3, rtol=1e-6)


def test_hidden_places_are_spread_evenly():
    count = np.zeros(LENGTH)
    for seed in range(2000):
        count[make(seed, 0.0)["weights"] > 0] += 1
    asked = count[count > 0] / 2000
    assert len(asked) == LENGTH - 1 - 2
    assert abs(asked - 0.3).max() < 5 * (0.3 * 0.7 / 2000) ** 0.5 + 0.02  # round(0.3 * 38) / 38 is 0.289


def test_the_share_is_a_probability_per_row():
    forward = sum(make(seed, 0.25)["prefix"] == 0 for seed in range(2000))
    assert abs(forward / 2000 - 0.25) < 4 * (0.25 * 0.75 / 2000) ** 0.5


def test_a_row_of_specials_asks_nothing():
    blank = {"tokens": np.full(LENGTH + 1, VOCABULARY.pad, np.int32), "segments": np.zeros(LENGTH + 1, np.int32)}
    got = examples.hybrid(blank, np.random.default_rng(0), VOCABULARY, dataclasses.replace(MASKING, rate=0.5), 0.0)
    assert got["weights"].sum() == 0
