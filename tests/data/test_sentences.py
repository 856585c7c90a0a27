"""Which texts stand together: a pure function of (pieces, draws), tested as a distribution."""

import dataclasses
import itertools

import numpy as np
import pytest

from bothways.data.examples import Masking, Pairs, sentence_pair, truncated
from bothways.data.rng import ExampleRng
from bothways.data.tokenizer import made_up_vocabulary
from bothways.data.tokens import Tokens
from bothways.errors import InputError
from tests.data.helpers import singly

ROOM = 21
PAIR = ROOM + 3
VOCABULARY = made_up_vocabulary(211)
UNTOUCHED = Masking(mask_token_prob=0.0, random_token_prob=0.0)


def near(count: float, trials: int, share: float) -> bool:
    """Whether a binomial count is within some standard deviations of what is expected."""
    return abs(count - trials * share) <= 4 * np.sqrt(trials * share * (1 - share)) + 1e-9


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
    return Pairs(Tokens(np.array(ids), np.array(starts), 0), length, vocabulary), documents


def even() -> tuple[Pairs, list[range]]:
    """Sentences of 7 tokens, three to a piece: no pair of neighbours is cut."""
    return corpus([[7] * 30, [7] * 12, [7] * 6, [7] * 18])


def uneven() -> tuple[Pairs, list[range]]:
    rng = np.random.default_rng(0)
    return corpus([rng.integers(1, 30, n).tolist() for n in (40, 1, 25, 3, 60)])


def pairs_of(source: Pairs, count: int, masking: Masking = UNTOUCHED, **options) -> list[dict]:
    n = np.arange(count)
    return singly(sentence_pair(source[n % len(source)], ExampleRng(3, n), source, masking, 4, **options))


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
        (pair,) = singly(sentence_pair(source[np.arange(1)], ExampleRng(0, np.array([n])), source, UNTOUCHED, 4))
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
    for plain, pair in zip(
        shown, pairs_of(source, 300, Masking(mask_token_prob=1.0, random_token_prob=0.0)), strict=True
    ):
        at_positions = pair["mask_positions"][pair["weights"] > 0]
        assert len(at_positions) == min(4, max(1, round(0.15 * int((plain["tokens"] > 4).sum()))))
        np.testing.assert_array_equal(np.flatnonzero(pair["tokens"] == VOCABULARY.mask), at_positions)
        np.testing.assert_array_equal(pair["targets"][: len(at_positions)], plain["tokens"][at_positions])
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
