"""Labelled items as model inputs, and scores as answers."""

import dataclasses
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bothways.data import tokenizer as tokenizers
from bothways.data.task_examples import TaskRows, collated, decisions, encode, wrap
from bothways.data.tasks import Task
from bothways.errors import InputError
from bothways.rundir import TaskInfo
from tests.corpus import made_up_text

HYPOTHESIS = settings(max_examples=150, deadline=None, database=None, derandomize=True)


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train([made_up_text(60)], "bpe", 390)


# ---- layout --------------------------------------------------------------------------------------------------------


def test_one_text_stands_between_bos_and_eos(tokenizer):
    bos, eos = tokenizer.bos, tokenizer.eos
    found = wrap([7, 8, 9], None, tokenizer, 8)
    assert found["tokens"].tolist() == [bos, 7, 8, 9, eos]
    assert found["segments"].tolist() == [1] * 5
    assert found["types"].tolist() == [0] * 5
    assert {value.dtype for value in found.values()} == {np.dtype(np.int32)}


def test_the_second_text_has_its_own_type_and_eos(tokenizer):
    bos, eos = tokenizer.bos, tokenizer.eos
    found = wrap([7, 8], [9], tokenizer, 8)
    assert found["tokens"].tolist() == [bos, 7, 8, eos, 9, eos]
    assert found["segments"].tolist() == [1] * 6
    assert found["types"].tolist() == [0, 0, 0, 0, 1, 1]


def test_what_fills_a_batch_is_no_text(tokenizer):
    item = {"text": "who", "text_b": "the king", "answers": []}
    short, long = (
        encode(item | {"text_b": text}, "span", (), tokenizer, 32)[0] for text in ("the king", "the king " * 5)
    )
    n, m = len(short["tokens"]), len(long["tokens"])
    batch = collated([short, long], m + 2, tokenizer.pad)
    assert {name: values.shape for name, values in batch.items() if values.ndim == 1} == dict.fromkeys(
        ("start", "end", "null", "weight"), (2,)
    )
    for name, fill in {"tokens": tokenizer.pad, "segments": 0, "types": 0, "begin_char": -1, "end_char": -1}.items():
        assert batch[name][0].tolist() == [*short[name], *[fill] * (m + 2 - n)]
        assert batch[name][1].tolist() == [*long[name], fill, fill]


@HYPOTHESIS
@given(st.integers(0, 30), st.none() | st.integers(0, 30), st.integers(5, 24))
def test_the_longer_text_loses_its_end(tokenizer, n, m, length):
    a, b = list(range(100, 100 + n)), None if m is None else list(range(200, 200 + m))
    row = wrap(a, b, tokenizer, length)
    ids = [int(t) for t, s in zip(row["tokens"], row["segments"], strict=True) if s]
    kept_a, kept_b = [t for t in ids if 100 <= t < 200], [t for t in ids if t >= 200]
    assert kept_a == a[: len(kept_a)]
    assert kept_b == (b or [])[: len(kept_b)]
    room = length - (2 if b is None else 3)
    assert len(kept_a) + len(kept_b) == min(room, n + (m or 0))
    if len(kept_a) < n:
        assert len(kept_a) + 1 >= len(kept_b)
    if len(kept_b) < (m or 0):
        assert len(kept_b) >= len(kept_a)
    assert all(len(values) == len(ids) <= length for values in row.values())


def test_labels_of_texts(tokenizer):
    labels = ("bad", "good")
    (named,) = encode({"text": "the dog", "label": "good"}, "classify", labels, tokenizer, 12)
    assert (named["label"], named["weight"]) == (1, 1)
    (number,) = encode({"text": "the dog", "text_b": "a cat", "label": 0.25}, "regress", (), tokenizer, 12)
    assert (number["label"], number["label"].dtype, number["types"].max()) == (0.25, np.float32, 1)
    (asked,) = encode({"text": "the dog"}, "classify", labels, tokenizer, 12)
    np.testing.assert_array_equal(asked["tokens"], named["tokens"])


def test_every_choice_stands_behind_the_question(tokenizer):
    item = {"text": "the dog", "choices": ["sees", "the cat", "king"], "label": 2}
    (found,) = encode(item, "choice", (), tokenizer, 14)
    assert found["label"] == 2
    for i, choice in enumerate(item["choices"]):
        alone = wrap(tokenizer.encode("the dog"), tokenizer.encode(choice), tokenizer, 14)
        for name, values in alone.items():
            fill = [tokenizer.pad if name == "tokens" else 0] * (found[name].shape[1] - len(values))
            np.testing.assert_array_equal(found[name][i], [*values, *fill])


def test_choices_must_be_as_many_in_every_item(tokenizer):
    items = [{"text": "t", "choices": ["a", "b", "c"][:n], "label": 0} for n in (3, 2)]
    with pytest.raises(InputError, match="the same number of choices"):
        TaskRows(items, Task("x", "choice", {"train": items}, (), ("accuracy",)), tokenizer, 12)


# ---- tags ----------------------------------------------------------------------------------------------------------

WORDS = st.lists(st.sampled_from("the king zebra caf\u00e9 [MASK] queen's X , storm".split()), min_size=1, max_size=12)


@HYPOTHESIS
@given(WORDS, st.integers(5, 40), st.data())
def test_a_tag_stands_at_the_first_piece_of_its_word(tokenizer, words, length, data):
    labels = ("B-x", "I-x", "O")
    tags = [data.draw(st.sampled_from(labels)) for _ in words]
    windows = encode({"words": words, "label": tags}, "tag", labels, tokenizer, length)
    pieces = [tokenizer.encode((" " if i else "") + w)[: length - 2] for i, w in enumerate(words)]
    asked = []
    for found in windows:
        at = np.flatnonzero(found["weight"])
        assert len(at)
        assert (np.delete(found["word"], at) == -1).all()
        for position, word in zip(at, found["word"][at], strict=True):
            assert labels[found["label"][position]] == tags[word]
            assert found["tokens"][position] == pieces[word][0]
            assert found["tokens"][position : position + len(pieces[word])].tolist() == pieces[word]
        asked += found["word"][at].tolist()
    assert asked == list(range(len(words)))  # every word once, in order
    if sum(map(len, pieces)) <= length - 2:
        assert len(windows) == 1


def test_a_word_without_pieces_keeps_its_tag(tokenizer):
    class Dropping:
        """A vocabulary that has nothing for a zero-width space, as WordPiece has not."""

        unk, bos, eos, pad = tokenizer.unk, tokenizer.bos, tokenizer.eos, tokenizer.pad
        frame = tokenizer.frame

        def encode(self, text: str) -> list[int]:
            return tokenizer.encode(text.replace(" \u200b", ""))

    words = ["the", "\u200b", "king", "\u200b"]
    (found,) = encode({"words": words, "label": ["O", "B-x", "I-x", "O"]}, "tag", ("B-x", "I-x", "O"), Dropping(), 32)
    at = np.flatnonzero(found["weight"])
    assert found["word"][at].tolist() == [0, 1, 2, 3]
    assert found["label"][at].tolist() == [2, 0, 1, 2]
    assert found["tokens"][at[1]] == tokenizer.unk


def test_a_word_in_a_long_sentence_has_context_on_both_sides(tokenizer):
    words, length = ["king"] * 40, 18
    windows = encode({"words": words}, "tag", ("O",), tokenizer, length)
    assert len(windows) > 3
    for found in windows[1:-1]:
        at = np.flatnonzero(found["word"] >= 0)
        assert at[0] > 3
        assert at[-1] < length - 4


# ---- spans ---------------------------------------------------------------------------------------------------------

DOCUMENT = st.lists(
    st.sampled_from([*"the king sees a zebra in caf\u00e9 \U0001f389 \n ? castle.".split(" "), "[MASK]"]),
    min_size=1,
    max_size=60,
)


@HYPOTHESIS
@given(DOCUMENT, st.integers(0, 10_000), st.integers(1, 4), st.integers(24, 60))
def test_windows_of_a_document_hold_its_answer(tokenizer, words, at, size, length):
    at %= len(words)
    first = len(" ".join(words[:at])) + (at > 0)
    text = " ".join(words[at : at + size])
    document, question = " ".join(words), "the dog ?"
    item = {"text": question, "text_b": document, "answers": [(first, text)]}
    assert document[first : first + len(text)] == text
    windows = encode(item, "span", (), tokenizer, length)
    asked = tokenizer.encode(question)
    room = length - len(asked) - 3
    pieces = tokenizer.encode_with_offsets(document)
    inside = [i for i, (_, b, e) in enumerate(pieces) if b < first + len(text) and e > first]

    covered, last = set(), -1
    for window in windows:
        positions = np.flatnonzero(window["begin_char"] >= 0)
        assert positions[0] == len(asked) + 2
        assert (np.diff(positions) == 1).all()
        assert len(positions) <= room
        assert (window["types"][positions] == 1).all()
        assert (window["end_char"] >= 0).sum() == len(positions)
        assert window["tokens"][: positions[0]].tolist() == [tokenizer.bos, *asked, tokenizer.eos]
        assert window["tokens"][positions[-1] + 1] == tokenizer.eos
        spans = list(
            zip(window["tokens"][positions], window["begin_char"][positions], window["end_char"][positions], strict=True)
        )
        begin = next(i for i in range(last + 1, len(pieces)) if pieces[i : i + len(spans)] == spans)
        assert not covered or begin < max(covered) + 1  # windows overlap
        covered |= set(range(begin, begin + len(spans)))
        last = begin
        start, end = int(window["start"]), int(window["end"])
        if begin <= inside[0] and inside[-1] < begin + len(spans):
            assert start
        if start:
            assert positions[0] <= start <= end <= positions[-1]
            found = document[window["begin_char"][start] : window["end_char"][end]]
            assert text in found
            assert found.strip() == text.strip() or len(found) <= len(text) + 2
        else:
            assert end == 0
            assert not spans[0][1] <= first <= first + len(text) <= spans[-1][2]
    assert covered == set(range(len(pieces)))
    if len(inside) <= room - room // 2:
        assert any(window["start"] for window in windows)


def test_a_question_without_an_answer_points_at_bos(tokenizer):
    item = {"text": "who", "text_b": "the king " * 20, "answers": []}
    for window in encode(item, "span", (), tokenizer, 24):
        assert (window["start"], window["end"], window["null"]) == (0, 0, 0)


def test_a_decoder_says_that_there_is_no_answer_where_it_has_seen_the_whole_window(tokenizer):
    item = {"text": "who", "text_b": "the king " * 20, "answers": []}
    for window in encode(item, "span", (), tokenizer, 24, "last"):
        assert window["start"] == window["end"] == window["null"] == (window["segments"] > 0).sum() - 1
        assert window["tokens"][window["null"]] == tokenizer.eos


def test_a_question_that_leaves_no_room_is_refused(tokenizer):
    with pytest.raises(InputError, match=r"leaves \d of 24 for its document; use a longer --length"):
        encode({"text": "king queen " * 9, "text_b": "the king"}, "span", (), tokenizer, 24)


def test_rows_know_their_items(tokenizer):
    items = [{"text": "who", "text_b": "the king " * n, "answers": []} for n in (1, 20, 2)]
    rows = TaskRows(items, Task("x", "span", {"train": items}, (), ()), tokenizer, 24)
    assert sorted(set(rows.item_of)) == [0, 1, 2]
    assert rows.item_of.count(1) > 1
    assert len(rows) == len(rows.item_of)


# ---- decisions -----------------------------------------------------------------------------------------------------


def info(kind: str, *labels: str) -> TaskInfo:
    return TaskInfo("x", kind, labels, 24, ())


def test_the_most_likely_label():
    scores = np.log([[0.2, 0.7, 0.1], [0.5, 0.2, 0.3]])
    found = decisions(info("classify", "a", "b", "c"), scores, [{}] * 2, [0, 1], [{}] * 2)
    assert found == [("b", pytest.approx(0.7)), ("a", pytest.approx(0.5))]


def test_a_number_is_itself():
    assert decisions(info("regress"), [np.array([0.5]), np.array([-2.0])], [{}] * 2, [0, 1], [{}] * 2) == [
        (0.5, None),
        (-2.0, None),
    ]


def test_the_most_likely_choice_of_each_item():
    scores = np.log([[0.25, 0.75], [0.6, 0.4]])
    found = decisions(info("choice"), scores, [{}] * 2, [0, 1], [{}] * 2)
    assert found == [(1, pytest.approx(0.75)), (0, pytest.approx(0.6))]


def test_tags_are_read_where_words_begin():
    scores = np.log([[[0.9, 0.1], [0.2, 0.8], [0.9, 0.1], [0.6, 0.4]]])
    examples = [{"word": np.array([-1, 0, -1, 1])}]
    ((labels, p),) = decisions(info("tag", "B-x", "O"), scores, examples, [0], [{}])
    assert (labels, p) == (["O", "B-x"], [pytest.approx(0.8), pytest.approx(0.6)])


def window(text: str, first: int, before: int = 3, length: int = 16) -> dict:
    """A window whose tokens are the characters of `text`, which begins at character `first` of its document."""
    begin, end = np.full(length, -1), np.full(length, -1)
    begin[before : before + len(text)] = first + np.arange(len(text))
    end[before : before + len(text)] = first + np.arange(len(text)) + 1
    return {"begin_char": begin, "end_char": end, "null": 0}


def span_scores(example: dict, high: dict[tuple[int, int], float]) -> np.ndarray:
    """[T, 2]: zero where a place may answer, far below elsewhere, and what is said by (place, 0 start or 1 end)."""
    scores = np.where((example["begin_char"] >= 0)[:, None], np.zeros(2), -1e30)
    scores[0] = 0
    for at, value in high.items():
        scores[at] = value
    return scores


DOC = [{"text_b": "abcdefghij"}]


def test_a_span_is_cut_out_of_its_document():
    example = window("abcdefghij", 0)
    scores = span_scores(example, {(3 + 2, 0): 6.0, (3 + 4, 1): 6.0})
    ((text, p),) = decisions(info("span"), scores[None], [example], [0], DOC)
    assert text == "cde"
    assert p == pytest.approx((np.exp(6) / (np.exp(6) + 10)) ** 2)


def test_a_span_never_ends_before_it_starts_nor_grows_too_long():
    example = window("abcdefghij", 0)
    backwards = span_scores(example, {(3 + 4, 0): 6.0, (3 + 2, 1): 6.0, (3 + 6, 1): 5.0})
    assert decisions(info("span"), backwards[None], [example], [0], DOC)[0][0] == "efg"
    far = span_scores(example, {(3, 0): 6.0, (3 + 3, 1): 6.0, (3 + 2, 1): 5.0})
    assert decisions(info("span"), far[None], [example], [0], DOC, longest=4)[0][0] == "abcd"
    assert decisions(info("span"), far[None], [example], [0], DOC, longest=3)[0][0] == "abc"


def test_no_answer_where_bos_is_likelier():
    example = window("abcdefghij", 0)
    scores = span_scores(example, {(0, 0): 7.0, (0, 1): 6.0, (5, 0): 6.0, (6, 1): 6.0})
    ((text, p),) = decisions(info("span"), scores[None], [example], [0], DOC)
    assert text == ""
    assert 0 < p < 1


def test_a_task_whose_questions_all_have_answers_is_never_answered_with_none():
    example = window("abcdefghij", 0)
    scores = span_scores(example, {(0, 0): 7.0, (0, 1): 6.0, (5, 0): 6.0, (6, 1): 6.0})
    always = dataclasses.replace(info("span"), no_answer=False)
    assert decisions(always, scores[None], [example], [0], DOC)[0][0] == "cd"


def test_the_best_window_of_each_document_answers():
    examples = [window("abcdef", 0), window("efghij", 4), window("xyz", 0)]
    nothing = {(0, 0): 9.0, (0, 1): 9.0}
    scores = [
        span_scores(examples[0], nothing),
        span_scores(examples[1], {(3 + 1, 0): 5.0, (3 + 2, 1): 5.0}),
        span_scores(examples[2], {(3, 0): 1.0, (3, 1): 1.0}),
    ]
    found = decisions(info("span"), np.stack(scores), examples, [0, 0, 1], [*DOC, {"text_b": "xyz"}])
    assert [text for text, _ in found] == ["fg", "x"]


def test_decisions_undo_encoding(tokenizer):
    """Scores that point at the right positions give the right answers."""
    rng = random.Random(0)
    words = "the king sees a zebra in caf\u00e9 castle".split()
    for _ in range(30):
        document = [rng.choice(words) for _ in range(rng.randint(1, 40))]
        at = rng.randrange(len(document))
        first = len(" ".join(document[:at])) + (at > 0)
        item = {"text": "who ?", "text_b": " ".join(document), "answers": [(first, document[at])]}
        examples = encode(item, "span", (), tokenizer, 32)
        scores = [span_scores(e, {(int(e["start"]), 0): 9.0, (int(e["end"]), 1): 9.0}) for e in examples]
        here = [i for i, e in enumerate(examples) if e["start"]]
        for i in here:
            scores[i][0] = 0
        for i in set(range(len(examples))) - set(here):
            scores[i][0] = 17.9  # a window without the answer may be sure of it, as long as one that has it is not
        scores[here[0]] += 0.1
        ((text, _),) = decisions(info("span"), scores, examples, [0] * len(examples), [item])
        assert text == document[at]
