"""Rows of the hybrid objective: some causal, the others with masked tokens that are predicted one position earlier."""

import dataclasses

import numpy as np

from bothways.data import examples
from bothways.data.rng import ExampleRng
from bothways.data.tokenizer import made_up_vocabulary

LENGTH, V = 41, 37
VOCABULARY = made_up_vocabulary(V)
MASKING = examples.Masking(rate=0.3, mask_token_prob=1.0, random_token_prob=0.0)


def row(seed: int = 0) -> examples.Example:
    """Two documents, the second from place 17 on."""
    tokens = np.random.default_rng(seed).integers(5, V, LENGTH + 1).astype(np.int32)
    tokens[[16, 17]] = VOCABULARY.eos, VOCABULARY.bos
    return {"tokens": tokens, "segments": np.repeat([1, 2], [17, LENGTH - 16]).astype(np.int32)}


def make(seed: int, share: float, masking: examples.Masking = MASKING) -> examples.Example:
    return many([seed], share, masking, row())


def many(seeds, share: float, masking: examples.Masking = MASKING, one=None) -> examples.Example:
    """As drawn for these examples of one row; of one example without its first axis."""
    rows = {name: np.stack([x] * len(seeds)) for name, x in (one or row()).items()}
    made = examples.hybrid(rows, ExampleRng(1, np.array(seeds)), VOCABULARY, masking, share)
    return {name: x[0] for name, x in made.items()} if len(seeds) == 1 else made


def test_rows_read_forward_are_causal_rows_with_no_prefix():
    plain = examples.causal({name: x[None] for name, x in row().items()}, ExampleRng(0, np.arange(1)))
    got = make(3, 1.0)
    assert got.pop("prefix") == 0
    for name, value in plain.items():
        np.testing.assert_array_equal(got[name], value[0])


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
    count = (many(range(2000), 0.0)["weights"] > 0).sum(axis=0)
    masked = count[count > 0] / 2000
    assert len(masked) == LENGTH - 1 - 2
    assert abs(masked - 0.3).max() < 5 * (0.3 * 0.7 / 2000) ** 0.5 + 0.02  # round(0.3 * 38) / 38 is 0.289


def test_the_share_is_a_probability_per_row():
    forward = (many(range(2000), 0.25)["prefix"] == 0).sum()
    assert abs(forward / 2000 - 0.25) < 4 * (0.25 * 0.75 / 2000) ** 0.5


def test_a_row_of_specials_asks_nothing():
    blank = {"tokens": np.full(LENGTH + 1, VOCABULARY.pad, np.int32), "segments": np.zeros(LENGTH + 1, np.int32)}
    got = many([0], 0.0, dataclasses.replace(MASKING, rate=0.5), blank)
    assert got["weights"].sum() == 0
