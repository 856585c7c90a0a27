"""Long documents: read, held out, prepared and tokenized in pieces, and still one document each."""

import dataclasses
import random
import tracemalloc
from pathlib import Path

import pytest

from bothways.data import corpora, documents, files, preparing, tokens
from bothways.data import tokenizer as tokenizers
from bothways.data.documents import Again, continues, hold_out, in_pieces, pieces_of
from tests.data.test_prepared import assert_same, cfg, elsewhere, jsonl, read, texts, vocabulary

__all__ = ["cfg", "vocabulary"]  # fixtures

PIECE = 61


@pytest.fixture
def short_pieces(monkeypatch):
    monkeypatch.setattr(documents, "LONGEST_PIECE", PIECE)
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", 3 * PIECE)


def made_up(seed: int) -> str:
    """Text of up to 700 characters, some of it without line breaks or spaces."""
    rng = random.Random(seed)
    return "".join(rng.choice(["a", "bc", " ", "\n", "\u00e9" * 29, "no break here ", "x" * 90]) for _ in range(seed * 3))


def joined(items) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for name, text in items:
        if continues(name):
            found[-1] = (found[-1][0], found[-1][1] + text)
        else:
            found.append((name, text))
    return found


@pytest.mark.parametrize("seed", range(0, 34, 3))
def test_pieces_are_the_text_whoever_cuts_it(short_pieces, tmp_path, seed):
    text, path = made_up(seed), tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8", newline="")
    with files.text_stream(path) as stream:
        read_in_pieces = list(pieces_of("a", stream.read))
    assert read_in_pieces == list(in_pieces([("a", text)]))
    assert joined(read_in_pieces) == [("a", text)]
    end = 0
    for _, piece in read_in_pieces[:-1]:
        assert PIECE // 2 <= len(piece) <= PIECE
        end += len(piece)
        following = text[end:]
        assert piece.endswith("\n") or "\n" not in piece[PIECE // 2 :]
        assert piece.endswith("\n") or following.startswith(" ") or " " not in piece[PIECE // 2 :]


@pytest.mark.parametrize("count", [1, 3, 39, 40, 61])
def test_what_is_held_out_does_not_depend_on_pieces(monkeypatch, count):
    whole = [(f"d{i}", made_up(i % 37)) for i in range(count)]
    expected = {split: list(found) for split, found in hold_out(whole).items()}
    monkeypatch.setattr(documents, "LONGEST_PIECE", PIECE)
    pieces = Again(lambda: in_pieces(whole))
    assert sum(continues(name) for name, _ in pieces) >= count > 1 or count == 1
    for split, found in hold_out(pieces).items():
        assert [d for d in joined(found) if d[1]] == [d for d in expected[split] if d[1]]


def test_ids_in_pieces_are_those_of_the_whole(cfg, tmp_path, monkeypatch):
    """Here every cut is behind a line break, where a vocabulary that was trained here cuts in any case."""
    for number, count in enumerate((211, 3, 307)):
        (tmp_path / f"{number}.txt").write_text("\n".join(texts(count, number)) + "\n")
    (tmp_path / "long.jsonl").write_bytes(jsonl(["\n".join(texts(101, 7)), "short"]))
    for number, pattern in enumerate(("*.txt", "long.jsonl", "*.jsonl")):
        of = dataclasses.replace(cfg, corpus=str(tmp_path / pattern), cache=f"{cfg.cache}{number}")
        with pytest.MonkeyPatch.context() as patch:
            before = {split: read(of, split) for split in ("train", "test")}
            patch.setattr(documents, "LONGEST_PIECE", 509)
            patch.setattr(tokens, "BATCH_CHARACTERS", 1024)
            patch.setattr(preparing, "SHARD_TOKENS", 997)  # long documents go on in the next shard
            in_parts = dataclasses.replace(of, cache=f"{of.cache}-pieces")
            preparing.prepare(in_parts, str(tmp_path / f"text{number}"))
            there = elsewhere(in_parts, tmp_path / f"text{number}")
            for split, whole in before.items():
                assert_same(whole, read(in_parts, split))
                assert_same(whole, read(there, split))
                found = [joined(corpora.load(c).documents(split)) for c in (of, there)]
                assert [text for _, text in found[0]] == [text for _, text in found[1]]
        assert len(read(of).starts) < 700


def test_much_text_is_read_where_it_lies(cfg, monkeypatch):
    before = {split: read(cfg, split) for split in ("train", "test")}
    monkeypatch.setattr(corpora, "MOST_COPIED", 100)
    in_place = dataclasses.replace(cfg, cache=f"{cfg.cache}-in-place")
    for split, copied in before.items():
        assert_same(copied, read(in_place, split))
    assert corpora.load(in_place).fingerprint == corpora.load(cfg).fingerprint
    assert not (Path(in_place.cache) / "tfds").exists()
    assert (Path(cfg.cache) / "tfds").exists()


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_four_times_the_text_takes_the_same_memory(cfg, tmp_path, monkeypatch, suffix):
    """One document in a file, or many: reading, copying, the vocabulary's sample, and tokens."""
    monkeypatch.setattr(documents, "LONGEST_PIECE", 4096)
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", 16384)
    monkeypatch.setattr(tokenizers, "TRAINING_BYTES", 20_000)
    line, peaks = "\n".join(texts(50)) + "\n", []
    for times in (1, 20, 80):  # the first loads what is loaded once
        path = tmp_path / f"{times}{suffix}"
        path.write_bytes(jsonl([line] * times) if suffix == ".jsonl" else line.encode() * times)
        of = dataclasses.replace(cfg, corpus=str(path), tokenizer="bpe", vocab_size=311, cache=f"{cfg.cache}{times}")
        tracemalloc.start()
        made = read(of)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert made.bytes > 30 * len(line)
    assert peaks[2] < 1.1 * peaks[1], peaks
