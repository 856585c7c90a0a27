"""What is hidden, and which texts stand together: pure functions of (row, generator), tested as distributions."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest

from common.errors import InputError
from data.draws import Draws
from data.examples import Masking, Pairs, hide, masked_row, places_within, sentence_pair, truncated
from data.pipeline import Stacked, training_batches
from data.tokenizer import made_up_vocabulary

ROWS, LENGTH, SIGMAS = 1000, 61, 4
VOCABULARY = made_up_vocabulary(211)
UNTOUCHED = Masking(mask_share=0.0, random_share=0.0)


def row_of(n: int) -> np.ndarray:
    """Text with special tokens in it, and padding at the end: as much of both as n says."""
    rng = np.random.default_rng([1, n])
    tokens = rng.choice(VOCABULARY.ordinary, LENGTH).astype(np.int32)
    tokens[rng.permutation(LENGTH)[: n % 7]] = rng.integers(1, 5, n % 7)
    tokens[LENGTH - n % 11 :] = VOCABULARY.pad
    return tokens


@functools.cache
def examples_of(masking: Masking, slots: int = LENGTH, seed: int = 0) -> list:
    """(original, hidden, chosen places, what is asked) of every row."""
    tokens = np.stack([row_of(n) for n in range(ROWS)])
    before = tokens.copy()
    hidden, asked = hide(tokens, Draws(seed, np.arange(ROWS)), VOCABULARY, masking, slots)
    np.testing.assert_array_equal(tokens, before)
    return [(*both, one["places"][one["weights"] > 0], one) for *both, one in zip(tokens, hidden, singly(asked), strict=True)]


def singly(examples: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    return [dict(zip(examples, values, strict=True)) for values in zip(*examples.values(), strict=True)]


def draws_of(*numbers: int, seed: int = 0) -> Draws:
    return Draws(seed, np.array(numbers))


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
    assert {k: v.tolist() for k, v in asked.items()} == {"places": [[0] * 3], "targets": [[0] * 3], "weights": [[0.0] * 3]}


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
    for tokens, hidden, chosen, _ in examples_of(Masking(mask_share=mask, random_share=random)):
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
        [hidden[chosen] for _, hidden, chosen, _ in examples_of(Masking(mask_share=0, random_share=1))]
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
        assert not asked["places"][n:].any()


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
    seen = [tuple(next(batches)["places"][0]) for _ in range(8)]
    assert len(set(seen)) == 8
    later = training_batches(rows, example, batch_size=1, seed=0, position=5)
    assert [tuple(next(later)["places"][0]) for _ in range(3)] == seen[5:]


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
    np.testing.assert_array_equal(made["positions"], places_within(np.array(read_segments)))
    assert row["tokens"].tolist() == [tokens]


def test_what_is_hidden_in_a_row_is_asked_for_where_it_stands():
    rows = {"tokens": np.stack([row_of(n) for n in range(50)]), "segments": np.ones((50, LENGTH), np.int32)}
    untouched = masked_row(rows, Draws(0, np.arange(50)), VOCABULARY, UNTOUCHED, 9)["tokens"]
    masked = masked_row(rows, Draws(0, np.arange(50)), VOCABULARY, Masking(mask_share=1.0, random_share=0.0), 9)
    for plain, made in zip(untouched, singly(masked), strict=True):
        places = made["places"][made["weights"] > 0]
        np.testing.assert_array_equal(np.flatnonzero((made["tokens"] == 4) & (plain != 4)), places)
        np.testing.assert_array_equal(made["targets"][made["weights"] > 0], plain[places])


# ---- sentence pairs ------------------------------------------------------------------------------------------------

ROOM = 21
PAIR = ROOM + 3


def corpus(sentences: list[list[int]], length: int = PAIR) -> tuple[Pairs, list[range]]:
    """Documents of sentences so long, and the ids of each: no id comes twice, so that a token tells its place."""
    ids, starts, documents, ends, next_id = [], [], [], [], 5
    for lengths in sentences:
        starts.append(len(ids))
        documents.append(range(next_id, next_id + sum(lengths)))
        ends += (next_id + np.cumsum(lengths) - 1).tolist()
        ids += [VOCABULARY.bos, *documents[-1], VOCABULARY.eos]
        next_id += sum(lengths)
    vocabulary = made_up_vocabulary(next_id)
    vocabulary = dataclasses.replace(vocabulary, ends_sentence=np.isin(np.arange(next_id), ends))
    return Pairs(np.array(ids), np.array(starts), length, vocabulary), documents


def even() -> tuple[Pairs, list[range]]:
    """Sentences of 7 tokens, three to a piece: no pair of neighbours is cut."""
    return corpus([[7] * 30, [7] * 12, [7] * 6, [7] * 18])


def uneven() -> tuple[Pairs, list[range]]:
    rng = np.random.default_rng(0)
    return corpus([rng.integers(1, 30, n).tolist() for n in (40, 1, 25, 3, 60)])


def pairs_of(source: Pairs, count: int, masking: Masking = UNTOUCHED, **options) -> list[dict]:
    n = np.arange(count)
    return singly(sentence_pair(source[n % len(source)], Draws(3, n), source, masking, 4, **options))


def piece_of(source: Pairs, index: int) -> list[int]:
    (row,) = singly(source[np.array([index])])
    return source.ids[row["begin"] : row["end"]].tolist()


def texts_of(pair: dict) -> tuple[list[int], list[int]]:
    """A and B, read off a row."""
    tokens = pair["tokens"].tolist()
    first = tokens.index(VOCABULARY.eos)
    second = tokens.index(VOCABULARY.eos, first + 1)
    return tokens[1:first], tokens[first + 1 : second]


def document_of(documents: list[range], text: list[int]) -> int:
    """Number of the one document in which the text stands without a gap."""
    assert text == list(range(text[0], text[0] + len(text)))
    return next(i for i, ids in enumerate(documents) if text[0] in ids and text[-1] in ids)


def test_pieces_begin_at_sentences_and_together_are_the_documents():
    source, documents = even()
    pieces = [piece_of(source, i) for i in range(len(source))]
    assert all((piece[0] - 5) % 7 == 0 for piece in pieces)
    assert list(itertools.chain(*pieces)) == list(itertools.chain(*documents))


def test_no_token_is_in_no_piece_however_long_the_sentences():
    source, documents = uneven()
    pieces = [piece_of(source, i) for i in range(len(source))]
    assert set(itertools.chain(*pieces)) == set(itertools.chain(*documents))
    for i, piece in enumerate(pieces):
        assert document_of(documents, piece) == source.document(i)
        assert source[np.array([i])]["index"] == i
    ends = source.vocabulary.ends_sentence
    begins = [bool(ends[piece[0] - 1]) for piece in pieces]
    assert np.mean(begins) > 0.8  # the others are the middle of a sentence longer than a piece


def test_one_document_is_not_enough():
    with pytest.raises(InputError, match="negatives from another document, and there is 1 document; give more files"):
        corpus([[7, 7, 7]])


def test_a_pair_is_two_texts_between_special_tokens():
    source, _ = uneven()
    lengths = set()
    for pair in pairs_of(source, 300):
        a, b = texts_of(pair)
        real = len(a) + len(b) + 3
        assert real <= PAIR
        assert pair["tokens"].tolist() == [2, *a, 3, *b, 3] + [0] * (PAIR - real)
        assert pair["segments"].tolist() == [1] * real + [0] * (PAIR - real)
        assert pair["types"].tolist() == [0] * (len(a) + 2) + [1] * (len(b) + 1) + [0] * (PAIR - real)
        assert pair["positions"].tolist() == list(range(PAIR))
        assert a
        assert pair["pair_weight"] == 1
        lengths.add(real)
    assert len(lengths) > 3


def test_half_of_the_second_texts_come_from_elsewhere():
    pairs = pairs_of(even()[0], 2000)
    assert near(sum(int(pair["random_next"]) for pair in pairs), 2000, 0.5)


def test_a_true_second_text_is_what_follows_the_first():
    source, _ = even()
    true = 0
    for n, pair in enumerate(pairs_of(source, 400, short_share=0.0)):
        if not pair["random_next"]:
            a, b = texts_of(pair)
            assert a + b == piece_of(source, n % len(source))
            assert len(a) in (7, 14)
            true += 1
    assert true > 100


def test_a_false_second_text_is_a_piece_of_another_document():
    for source, documents in (even(), uneven()):
        found = set()
        for pair in pairs_of(source, 600):
            if pair["random_next"]:
                a, b = (document_of(documents, text) for text in texts_of(pair))
                assert a != b
                found.add(b)
        assert found == set(range(len(documents)))


def test_a_piece_of_one_token_can_only_have_a_false_second_text():
    source, _ = corpus([[1], [7, 7]])
    for n in range(20):
        (pair,) = singly(sentence_pair(source[np.arange(1)], draws_of(n), source, UNTOUCHED, 4))
        assert pair["random_next"] == 1
        assert texts_of(pair)[0] == [5]


def test_about_a_tenth_of_the_pairs_are_short():
    source, _ = corpus([[5 * ROOM], [4 * ROOM]])  # no sentence ends inside: every piece fills a row
    lengths = np.array([pair["segments"].sum() for pair in pairs_of(source, 2000)])
    assert near((lengths < PAIR).sum(), 2000, 0.1 * (1 - 1 / (ROOM - 1)))
    short = lengths[lengths < PAIR]
    assert (short.min(), short.max()) == (5, PAIR - 1)
    assert all(pair["segments"].all() for pair in pairs_of(source, 100, short_share=0.0))


def test_tokens_of_a_pair_are_hidden_as_those_of_a_row():
    source, _ = even()
    shown = pairs_of(source, 300)
    for plain, pair in zip(shown, pairs_of(source, 300, Masking(mask_share=1.0, random_share=0.0)), strict=True):
        places = pair["places"][pair["weights"] > 0]
        assert len(places) == min(4, max(1, round(0.15 * int((plain["tokens"] > 4).sum()))))
        np.testing.assert_array_equal(np.flatnonzero(pair["tokens"] == VOCABULARY.mask), places)
        np.testing.assert_array_equal(pair["targets"][: len(places)], plain["tokens"][places])
        assert pair["random_next"] == plain["random_next"]


# ---- truncation ----------------------------------------------------------------------------------------------------


def one_at_a_time(n: int, m: int, room: int, coins: np.ndarray) -> list[int]:
    """[begin, end, begin, end] of what is left of two texts when the longer loses a token until both fit."""
    ends, lost = [[0, n], [0, m]], [0, 0]
    while (sizes := [end - begin for begin, end in ends]) and sum(sizes) > room:
        i = int(sizes[1] > sizes[0])
        if coins[i, lost[i]]:
            ends[i][0] += 1
        else:
            ends[i][1] -= 1
        lost[i] += 1
    return ends[0] + ends[1]


def test_the_longer_text_loses_tokens_until_both_fit():
    rng = np.random.default_rng(0)
    n, m, room = rng.integers(1, 40, (3, 300))
    coins, zero = rng.integers(0, 2, (300, 2, 80), np.uint8), np.zeros(300, int)
    (a, size_a), (b, size_b) = truncated((zero, n), (zero, m), room, coins)
    for i in range(300):
        wanted = one_at_a_time(n[i], m[i], room[i], coins[i])
        assert [a[i], a[i] + size_a[i], b[i], b[i] + size_b[i]] == wanted


def test_a_pair_loses_from_the_front_and_the_back_alike():
    source, documents = corpus([[200], [90]])  # no sentence ends inside
    front = lost = 0
    for n, pair in enumerate(pairs_of(source, 800, short_share=1.0)):
        begin = documents[source.document(np.array([n % len(source)]))[0]][0]
        piece = piece_of(source, n % len(source))
        a, _ = texts_of(pair)
        if len(a) < (half := len(piece) // 2):
            assert a[0] - begin >= 0
            front, lost = front + a[0] - piece[0], lost + half - len(a)
    assert lost > 2000
    assert near(front, lost, 0.5)
