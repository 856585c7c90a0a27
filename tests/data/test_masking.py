"""What is hidden: a pure function of (rows, draws), tested as a distribution."""

import functools

import numpy as np
import pytest

from bothways.data.examples import Masking, hide, masked_row, segment_positions
from bothways.data.pipeline import Stacked, training_batches
from bothways.data.rng import ExampleRng
from bothways.data.tokenizer import made_up_vocabulary
from tests.data.helpers import singly

ROWS, LENGTH, SIGMAS = 1000, 61, 4
VOCABULARY = made_up_vocabulary(211)
UNTOUCHED = Masking(mask_token_prob=0.0, random_token_prob=0.0)


def row_of(n: int) -> np.ndarray:
    """Text with special tokens in it, and padding at the end: as much of both as n says."""
    rng = np.random.default_rng([1, n])
    tokens = rng.choice(VOCABULARY.ordinary, LENGTH).astype(np.int32)
    tokens[rng.permutation(LENGTH)[: n % 7]] = rng.integers(1, 5, n % 7)
    tokens[LENGTH - n % 11 :] = VOCABULARY.pad
    return tokens


@functools.cache
def examples_of(masking: Masking, slots: int = LENGTH, seed: int = 0) -> list:
    """(original, masked, chosen positions, targets) of every row."""
    tokens = np.stack([row_of(n) for n in range(ROWS)])
    before = tokens.copy()
    hidden, asked = hide(tokens, ExampleRng(seed, np.arange(ROWS)), VOCABULARY, masking, slots)
    np.testing.assert_array_equal(tokens, before)
    return [
        (*both, one["mask_positions"][one["weights"] > 0], one)
        for *both, one in zip(tokens, hidden, singly(asked), strict=True)
    ]


def draws_of(*numbers: int, seed: int = 0) -> ExampleRng:
    return ExampleRng(seed, np.array(numbers))


def near(count: float, trials: int, share: float) -> bool:
    """Whether a binomial count is within some standard deviations of what is expected."""
    return abs(count - trials * share) <= SIGMAS * np.sqrt(trials * share * (1 - share)) + 1e-9


# ---- which tokens are chosen ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.15, 0.3, 0.4])
def test_the_share_of_text_that_is_chosen_is_the_rate_in_every_row(rate):
    for tokens, _, chosen, _ in examples_of(Masking(rate=rate)):
        text = int((~VOCABULARY.special[tokens]).sum())
        assert len(chosen) == round(rate * text)


def test_one_token_is_chosen_where_the_rate_rounds_to_none():
    _, asked = hide(np.array([[2, 9, 8, 3, 0]]), draws_of(0), VOCABULARY, Masking(rate=0.01), 4)
    assert asked["weights"].sum() == 1


def test_special_tokens_and_padding_are_never_chosen():
    seen = set()
    for tokens, hidden, chosen, _ in examples_of(Masking()):
        assert not VOCABULARY.special[tokens[chosen]].any()
        np.testing.assert_array_equal(hidden[VOCABULARY.special[tokens]], tokens[VOCABULARY.special[tokens]])
        seen |= set(tokens[VOCABULARY.special[tokens]].tolist())
    assert seen == {0, 1, 2, 3, 4}


def test_every_place_with_text_is_chosen_equally_often():
    text, chosen_at = np.zeros(LENGTH), np.zeros(LENGTH)
    for tokens, _, chosen, _ in examples_of(Masking()):
        text += ~VOCABULARY.special[tokens]
        chosen_at[chosen] += 1
    share = chosen_at.sum() / text.sum()
    assert all(near(c, n, share) for c, n in zip(chosen_at, text, strict=True))


def test_a_row_without_text_asks_for_nothing():
    tokens = np.array([[2, 3, 4, 1, 0, 0]], np.int32)
    hidden, asked = hide(tokens, draws_of(0), VOCABULARY, Masking(), 3)
    np.testing.assert_array_equal(hidden, tokens)
    assert {k: v.tolist() for k, v in asked.items()} == {
        "mask_positions": [[0] * 3],
        "targets": [[0] * 3],
        "weights": [[0.0] * 3],
    }


@pytest.mark.parametrize("whole_words", [False, True])
def test_there_are_never_more_chosen_than_slots(whole_words):
    counts = set()
    for _, _, chosen, asked in examples_of(Masking(rate=0.3, whole_words=whole_words), slots=5):
        assert {len(values) for values in asked.values()} == {5}
        counts.add(len(chosen))
    assert max(counts) == 5


# ---- what becomes of them ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mask", "random"), [(0.8, 0.1), (0.5, 0.3), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.0, 0.4)])
def test_chosen_tokens_are_masked_replaced_and_left_in_their_shares(mask, random):
    masked = left = total = 0
    for tokens, hidden, chosen, _ in examples_of(Masking(mask_token_prob=mask, random_token_prob=random)):
        total += len(chosen)
        masked += int((hidden[chosen] == VOCABULARY.mask).sum())
        left += int((hidden[chosen] == tokens[chosen]).sum())
    same_by_chance = random / len(VOCABULARY.ordinary)
    assert total > 5_000
    assert near(masked, total, mask)
    assert near(left, total, 1 - mask - random + same_by_chance)
    assert near(total - masked - left, total, random - same_by_chance)


def test_replacements_are_drawn_evenly_from_the_ordinary_tokens():
    drawn = np.concatenate(
        [hidden[chosen] for _, hidden, chosen, _ in examples_of(Masking(mask_token_prob=0, random_token_prob=1))]
    )
    counts = np.bincount(drawn, minlength=211)
    assert counts[:5].sum() == 0
    expected, cells = len(drawn) / 206, 206
    chi_square = ((counts[5:] - expected) ** 2 / expected).sum()
    assert abs(chi_square - (cells - 1)) < SIGMAS * np.sqrt(2 * (cells - 1))


@pytest.mark.parametrize("masking", [Masking(), Masking(rate=0.4, whole_words=True)], ids=["tokens", "words"])
def test_only_chosen_tokens_change_and_their_originals_are_asked_for(masking):
    for tokens, hidden, chosen, asked in examples_of(masking):
        others = np.setdiff1d(np.arange(LENGTH), chosen)
        np.testing.assert_array_equal(hidden[others], tokens[others])
        n = len(chosen)
        assert (np.diff(chosen) > 0).all()
        np.testing.assert_array_equal(asked["targets"][:n], tokens[chosen])
        np.testing.assert_array_equal(asked["weights"], [1.0] * n + [0.0] * (LENGTH - n))
        assert not asked["targets"][n:].any()
        assert not asked["mask_positions"][n:].any()


def test_a_seed_hides_the_same_again_and_another_seed_hides_something_else():
    again = [hide(row_of(n)[None], draws_of(n), VOCABULARY, Masking(), LENGTH)[0] for n in range(50)]
    different = 0
    for n, (first, other) in enumerate(zip(examples_of(Masking())[:50], examples_of(Masking(), seed=1), strict=False)):
        np.testing.assert_array_equal(again[n][0], first[1])  # alone as among others
        different += not np.array_equal(first[2], other[2])
    assert different == 50


def test_every_epoch_hides_other_tokens_of_the_same_row():
    rows = Stacked([{"tokens": row_of(0), "segments": np.ones(LENGTH, np.int32)}])
    example = functools.partial(masked_row, vocabulary=VOCABULARY, masking=Masking(), slots=9)
    batches = training_batches(rows, example, batch_size=1, seed=0)
    seen = [tuple(next(batches)["mask_positions"][0]) for _ in range(8)]
    assert len(set(seen)) == 8
    later = training_batches(rows, example, batch_size=1, seed=0, position=5)
    assert [tuple(next(later)["mask_positions"][0]) for _ in range(3)] == seen[5:]


# ---- whole words ---------------------------------------------------------------------------------------------------


def words_of(tokens: np.ndarray) -> list[list[int]]:
    """Places of every word: it begins at a token that says so, at the start, or behind a special token."""
    words: list[list[int]] = []
    inside = False
    for place, token in enumerate(tokens):
        if VOCABULARY.special[token]:
            inside = False
        elif inside and not VOCABULARY.starts_word[token]:
            words[-1].append(place)
        else:
            words.append([place])
            inside = True
    return words


def test_a_word_is_chosen_whole_or_not_at_all():
    masking, longest = Masking(rate=0.3, whole_words=True), 0
    for tokens, _, chosen, _ in examples_of(masking):
        for word in words_of(tokens):
            share = np.isin(word, chosen).mean()
            assert share in (0, 1)
            longest = max(longest, len(word) * int(share))
    assert longest >= 6


@pytest.mark.parametrize("rate", [0.15, 0.3])
def test_whole_words_take_the_share_of_tokens_that_the_rate_says(rate):
    wanted = taken = 0
    for tokens, _, chosen, _ in examples_of(Masking(rate=rate, whole_words=True)):
        most = max(1, round(rate * (~VOCABULARY.special[tokens]).sum()))
        assert len(chosen) <= most
        wanted += most
        taken += len(chosen)
    assert 0.97 * wanted <= taken


# ---- rows of running text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "segments", "read", "read_segments"),
    [
        ([9, 8, 3, 2, 7, 6], [1, 1, 1, 2, 2, 2], [2, 9, 8, 3, 2, 7], [1, 1, 1, 1, 2, 2]),
        ([2, 9, 8, 7, 6, 5], [1, 1, 1, 1, 1, 1], [2, 9, 8, 7, 6, 5], [1, 1, 1, 1, 1, 1]),
        ([3, 2, 9, 8, 3, 0], [1, 2, 2, 2, 2, 0], [2, 3, 2, 9, 8, 3], [1, 1, 2, 2, 2, 2]),
        ([9, 8, 3, 0, 0, 0], [1, 1, 1, 0, 0, 0], [2, 9, 8, 3, 0, 0], [1, 1, 1, 1, 0, 0]),
    ],
    ids=["middle", "beginning", "end", "padded"],
)
def test_a_row_opens_with_bos_and_keeps_its_documents(tokens, segments, read, read_segments):
    row = {"tokens": np.array([tokens], np.int32), "segments": np.array([segments], np.int32)}
    (made,) = singly(masked_row(row, draws_of(0), VOCABULARY, UNTOUCHED, 3))
    assert made["tokens"].tolist() == read
    assert made["segments"].tolist() == read_segments
    np.testing.assert_array_equal(made["positions"], segment_positions(np.array(read_segments)))
    assert row["tokens"].tolist() == [tokens]


def test_what_is_hidden_in_a_row_is_asked_for_where_it_stands():
    rows = {"tokens": np.stack([row_of(n) for n in range(50)]), "segments": np.ones((50, LENGTH), np.int32)}
    untouched = masked_row(rows, ExampleRng(0, np.arange(50)), VOCABULARY, UNTOUCHED, 9)["tokens"]
    masked = masked_row(
        rows, ExampleRng(0, np.arange(50)), VOCABULARY, Masking(mask_token_prob=1.0, random_token_prob=0.0), 9
    )
    for plain, made in zip(untouched, singly(masked), strict=True):
        at_positions = made["mask_positions"][made["weights"] > 0]
        np.testing.assert_array_equal(np.flatnonzero((made["tokens"] == 4) & (plain != 4)), at_positions)
        np.testing.assert_array_equal(made["targets"][made["weights"] > 0], plain[at_positions])
