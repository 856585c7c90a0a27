"""Rows of tokens: every token is predicted once, documents stay apart, and what is prepared once is read again."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bothways.data import tokens as token_files
from bothways.data.config import DataConfig
from bothways.data.corpora import Corpus
from bothways.data.examples import causal, segment_positions
from bothways.data.rng import ExampleRng
from bothways.data.tokens import Rows, Tokens
from bothways.errors import InputError
from tests.data.helpers import singly

HYPOTHESIS = settings(max_examples=150, deadline=None, database=None, derandomize=True)
PAD, BOS, EOS = 0, 2, 3
NO_DRAWS = ExampleRng(0, np.arange(1))

# Documents are lists of tokens without bos and eos, each token of the text another number.
documents = st.lists(st.integers(1, 12), min_size=1, max_size=9)


def make(sizes: list[int]) -> tuple[Tokens, list[list[int]]]:
    """Documents of these sizes, all their tokens different, and the row of them all."""
    found, following = [], 10
    for size in sizes:
        found.append([BOS, *range(following, following + size), EOS])
        following += size
    starts = np.cumsum([0] + [len(d) for d in found])[:-1]
    ids = np.array([token for document in found for token in document], np.uint16)
    return Tokens(ids, starts.astype(np.int64), bytes=sum(sizes)), found


def every(source) -> dict[str, np.ndarray]:
    return source[np.arange(len(source))]


@given(documents, st.integers(1, 11), st.lists(st.integers(0, 99), max_size=5))
@HYPOTHESIS
def test_rows_read_together_in_any_order_are_those_read_alone(sizes, length, picks):
    rows = Rows(make(sizes)[0], length, PAD, padded=True)
    picks = np.array(picks, int) % len(rows)
    together = rows[picks]
    for n, i in enumerate(picks):
        alone = rows[np.array([i])]
        for name in ("tokens", "segments"):
            np.testing.assert_array_equal(together[name][n], alone[name][0])


@given(documents, st.integers(1, 11))
@HYPOTHESIS
def test_every_token_but_the_first_of_its_document_is_predicted_once(sizes, length):
    tokens, found = make(sizes)
    predicted = []
    for example in singly(causal(every(Rows(tokens, length, PAD, padded=True)), NO_DRAWS)):
        for before, target, weight in zip(example["tokens"], example["targets"], example["weights"], strict=True):
            assert weight in (0, 1)
            if weight:
                predicted.append((int(before), int(target)))
    wanted = [pair for document in found for pair in zip(document, document[1:], strict=False)]
    assert sorted(predicted) == sorted(wanted)


@given(documents, st.integers(1, 11))
@HYPOTHESIS
def test_the_next_document_is_never_predicted_from_the_last(sizes, length):
    tokens, _ = make(sizes)
    for example in singly(causal(every(Rows(tokens, length, PAD, padded=True)), NO_DRAWS)):
        crossing = (example["tokens"] == EOS) | (example["targets"] == BOS) | (example["targets"] == PAD)
        np.testing.assert_array_equal(example["weights"] == 0, crossing)


@given(documents, st.integers(1, 11))
@HYPOTHESIS
def test_segments_and_positions_start_again_with_every_document(sizes, length):
    tokens, _ = make(sizes)
    for example in singly(causal(every(Rows(tokens, length, PAD, padded=True)), NO_DRAWS)):
        segment, position = 1, -1
        for token, in_segment, at in zip(example["tokens"], example["segments"], example["positions"], strict=True):
            if token == PAD:
                assert in_segment == 0
                continue
            new = token == BOS and position >= 0
            segment, position = (segment + 1, 0) if new else (segment, position + 1)
            assert (in_segment, at) == (segment, position)


@given(documents, st.integers(1, 11))
@HYPOTHESIS
def test_together_documents_are_one_segment_and_all_is_predicted(sizes, length):
    tokens, _ = make(sizes)
    weights = 0
    for row in singly(every(Rows(tokens, length, PAD, separate=False, padded=True))):
        example = {name: x[0] for name, x in causal({k: x[None] for k, x in row.items()}, NO_DRAWS).items()}
        real = row["tokens"] != PAD
        np.testing.assert_array_equal(row["segments"], real)
        np.testing.assert_array_equal(example["positions"][real[:-1]], np.arange(real[:-1].sum()))
        np.testing.assert_array_equal(example["weights"], real[1:])
        weights += example["weights"].sum()
    assert weights == len(tokens.ids) - 1


@given(documents, st.integers(1, 11))
@HYPOTHESIS
def test_rows_cover_the_text_and_overlap_by_one_token(sizes, length):
    tokens, _ = make(sizes)
    rows = list(every(Rows(tokens, length, PAD, padded=True))["tokens"])
    assert all(len(row) == length + 1 for row in rows)
    assert all(a[-1] == b[0] for a, b in zip(rows, rows[1:], strict=False))
    joined = np.concatenate([rows[0], *(row[1:] for row in rows[1:])])
    np.testing.assert_array_equal(joined[: len(tokens.ids)], tokens.ids)
    assert (joined[len(tokens.ids) :] == PAD).all()
    assert len(joined) - len(tokens.ids) < length


def test_without_padding_only_whole_rows_are_kept():
    tokens, _ = make([5, 3, 4])  # 18 tokens
    assert [len(Rows(tokens, n, PAD)) for n in (17, 16, 9, 8, 4)] == [1, 1, 1, 2, 4]
    assert [len(Rows(tokens, n, PAD, padded=True)) for n in (17, 16, 9, 8, 4)] == [1, 2, 2, 3, 5]
    for n in (16, 9, 8, 4):
        whole, padded = Rows(tokens, n, PAD), Rows(tokens, n, PAD, padded=True)
        np.testing.assert_array_equal(every(whole)["tokens"], every(padded)["tokens"][: len(whole)])
        assert (every(whole)["segments"] > 0).all()


def test_a_row_drawn_by_hand():
    tokens, _ = make([3, 1])
    (example,) = singly(causal(every(Rows(tokens, 9, PAD, padded=True)), NO_DRAWS))
    expected = {
        "tokens": [2, 10, 11, 12, 3, 2, 13, 3, 0],
        "targets": [10, 11, 12, 3, 2, 13, 3, 0, 0],
        "segments": [1, 1, 1, 1, 1, 2, 2, 2, 0],
        "positions": [0, 1, 2, 3, 4, 0, 1, 2, 0],
        "weights": [1, 1, 1, 1, 0, 1, 1, 0, 0],
    }
    assert {name: values.tolist() for name, values in example.items()} == expected
    assert {values.dtype for name, values in example.items() if name != "weights"} == {np.dtype(np.int32)}
    assert example["weights"].dtype == np.float32


@pytest.mark.parametrize(
    ("segments", "at_positions"),
    [
        ([1], [0]),
        ([1, 1, 1], [0, 1, 2]),
        ([1, 2, 3], [0, 0, 0]),
        ([1, 1, 2, 0, 0], [0, 1, 0, 0, 1]),
        ([3, 3, 4, 4], [0, 1, 0, 1]),
    ],
)
def test_places_within_count_from_the_start_of_each_segment(segments, at_positions):
    assert segment_positions(np.array(segments)).tolist() == at_positions


def test_too_little_text_for_one_row_is_refused():
    tokens, _ = make([5])
    assert len(Rows(tokens, 6, PAD)) == 1
    assert len(Rows(tokens, 7, PAD, padded=True)) == 1
    with pytest.raises(InputError, match=r"the text has 7 tokens, less than one row of model\.context_length=7"):
        Rows(tokens, 7, PAD)


# ---- token files ---------------------------------------------------------------------------------------------------


class Words:
    """A tokenizer with one id for every word: the word itself, a number."""

    pad, bos, eos = PAD, BOS, EOS

    def __init__(self, size: int, fingerprint: str = "words"):
        self.size, self.fingerprint, self.of_targets = size, fingerprint, self

    def __len__(self) -> int:
        return self.size

    def encode_arrays(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array([int(word) for word in text.split()], np.int32) for text in texts]


@dataclasses.dataclass
class RowSource:
    """A corpus in memory that counts how often it is read."""

    splits: dict[str, list[str]]
    reads: int = 0

    def read(self, split: str):
        self.reads += 1
        return iter([(f"{split}:{i}", text) for i, text in enumerate(self.splits[split])])

    def corpus(self, fingerprint: str = "a") -> Corpus:
        return Corpus("some/corpus", fingerprint, self.read)


def same(a: Tokens, b: Tokens) -> None:
    np.testing.assert_array_equal(a.ids, b.ids)
    np.testing.assert_array_equal(a.starts, b.starts)
    assert (a.ids.dtype, a.bytes) == (b.ids.dtype, b.bytes)


def test_a_split_becomes_its_documents_in_order(tmp_path):
    source = RowSource({"train": ["10 11 12", "", "13", " 14 15"]})
    found = token_files.prepare(source.corpus(), "train", Words(100), str(tmp_path))
    assert found.ids.tolist() == [2, 10, 11, 12, 3, 2, 13, 3, 2, 14, 15, 3]
    assert found.starts.tolist() == [0, 5, 8]
    assert found.bytes == len("10 11 12" + "13" + " 14 15")
    paired = dataclasses.replace(RowSource({"train": ["10", "", "11", "12", "", "13", "14", "15"]}).corpus(), paired=True)
    found = token_files.prepare(paired, "train", Words(100), str(tmp_path))
    assert found.ids.tolist() == [2, 11, 3, 2, 12, 3, 2, 14, 3, 2, 15, 3]  # sources stay with their targets


def test_more_documents_than_are_encoded_at_once_are_all_there(tmp_path, monkeypatch):
    texts = [str(i) for i in range(10, 20)]
    whole = token_files.prepare(RowSource({"train": texts}).corpus(), "train", Words(100), str(tmp_path / "whole"))
    for size in (1, 3, 5, 10):
        monkeypatch.setattr(token_files, "BATCH", size)
        part = token_files.prepare(RowSource({"train": texts}).corpus(), "train", Words(100), str(tmp_path / str(size)))
        same(part, whole)
    assert whole.ids[1::3].tolist() == list(range(10, 20))


@pytest.mark.parametrize(
    ("size", "dtype"), [(100, "uint16"), (2**16, "uint16"), (2**16 + 1, "uint32"), (300_000, "uint32")]
)
def test_ids_take_two_bytes_where_the_vocabulary_allows(tmp_path, size, dtype):
    found = token_files.prepare(RowSource({"train": [f"10 {size - 1}"]}).corpus(), "train", Words(size), str(tmp_path))
    assert found.ids.dtype == dtype
    assert found.ids.tolist() == [2, 10, size - 1, 3]


def test_prepared_tokens_are_read_again_and_are_the_same(tmp_path):
    source = RowSource({"train": ["10 11", "12"], "test": ["13"]})
    fresh = token_files.prepare(source.corpus(), "train", Words(100), str(tmp_path / "a"))
    again = token_files.prepare(source.corpus(), "train", Words(100), str(tmp_path / "a"))
    assert source.reads == 1
    same(again, fresh)
    same(token_files.prepare(source.corpus(), "train", Words(100), str(tmp_path / "b")), fresh)
    assert source.reads == 2


def test_other_text_another_tokenizer_or_split_is_prepared_anew(tmp_path):
    source = RowSource({"train": ["10 11"], "test": ["13"]})
    token_files.prepare(source.corpus("a"), "train", Words(100), str(tmp_path))
    source.splits["train"] = ["20 21"]
    assert 20 in token_files.prepare(source.corpus("b"), "train", Words(100), str(tmp_path)).ids
    assert 20 in token_files.prepare(source.corpus("a"), "train", Words(100, "other words"), str(tmp_path)).ids
    assert 13 in token_files.prepare(source.corpus("a"), "test", Words(100), str(tmp_path)).ids
    assert source.reads == 4
    assert 10 in token_files.prepare(source.corpus("a"), "train", Words(100), str(tmp_path)).ids


def test_an_interrupted_preparation_leaves_nothing_that_is_taken_for_whole(tmp_path):
    def breaks(split):
        yield "a", "10 11"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        token_files.prepare(Corpus("c", "a", breaks), "train", Words(100), str(tmp_path))
    assert list((tmp_path / "tokens").iterdir()) == []
    found = token_files.prepare(
        Corpus("c", "a", RowSource({"train": ["10 11", "12"]}).read), "train", Words(100), str(tmp_path)
    )
    assert found.starts.tolist() == [0, 4]


def test_two_processes_may_prepare_the_same_split(tmp_path, monkeypatch):
    source = RowSource({"train": ["10 11", "12"]})
    write = token_files._write

    def slower(*arguments):
        monkeypatch.setattr(token_files, "_write", write)
        token_files.prepare(source.corpus(), "train", Words(100), str(tmp_path))
        write(*arguments)

    monkeypatch.setattr(token_files, "_write", slower)
    found = token_files.prepare(source.corpus(), "train", Words(100), str(tmp_path))
    assert found.ids.tolist() == [2, 10, 11, 3, 2, 12, 3]
    assert len(list((tmp_path / "tokens").iterdir())) == 1


def test_an_empty_split_is_refused(tmp_path):
    for _ in range(2):
        with pytest.raises(InputError, match="the validation split of some/corpus is empty"):
            token_files.prepare(RowSource({"validation": ["", ""]}).corpus(), "validation", Words(100), str(tmp_path))


def test_a_tokenizer_is_trained_once_and_kept(tmp_path, monkeypatch):
    source = RowSource({"train": ["the quick brown fox\njumps over the lazy dog\n"] * 3})
    cfg = DataConfig(tokenizer="char", vocab_size=300, cache=str(tmp_path / "cache"))
    first = token_files.obtain_tokenizer(cfg, source.corpus())
    once = source.reads  # to count its bytes, and to train
    assert token_files.obtain_tokenizer(cfg, source.corpus()).fingerprint == first.fingerprint
    assert source.reads == once
    smaller = token_files.obtain_tokenizer(dataclasses.replace(cfg, vocab_size=270), source.corpus())
    other = token_files.obtain_tokenizer(cfg, source.corpus("b"))
    assert source.reads == 3 * once
    assert len(smaller) == 270
    assert other.fingerprint == first.fingerprint
    named = dataclasses.replace(cfg, tokenizer=str(tmp_path / "mine.model"))
    smaller.save(tmp_path / "mine.model")
    assert token_files.obtain_tokenizer(named, source.corpus()).fingerprint == smaller.fingerprint


def test_prepared_tokens_say_what_they_are(tmp_path):
    token_files.prepare(RowSource({"train": ["10 11"]}).corpus(), "train", Words(100), str(tmp_path))
    (home,) = (tmp_path / "tokens").iterdir()
    assert home.name.startswith("some-corpus-train-")
    assert json.loads((home / "meta.json").read_text()) == {"dtype": "uint16", "tokens": 4, "bytes": 5}
