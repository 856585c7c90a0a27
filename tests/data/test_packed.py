"""Compressed files and parquet, hold-out without holding all, and vocabularies from the whole of a large text."""

import bz2
import gzip
import json
import lzma

import numpy as np
import pytest
import zstandard

from bothways.data import files, tokenizer
from bothways.data.documents import FEW_DOCUMENTS, Again, hold_out
from bothways.errors import InputError
from tests.data.helpers import STORY, everything, in_all, load

PACK = {".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
TEXTS = [f"document {i} of caf\u00e9 {'long ' * i}" for i in range(43)]


@pytest.mark.parametrize("ending", PACK)
def test_compressed_files_are_read_as_what_they_hold(tmp_path, ending):
    jsonl = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "plain.jsonl").write_text(jsonl)
    (tmp_path / f"a.jsonl{ending}").write_bytes(PACK[ending](jsonl.encode()))
    (tmp_path / f"b.txt{ending.upper()}").write_bytes(PACK[ending](STORY.encode()))
    packed = everything(load(tmp_path / f"a.jsonl{ending}", tmp_path / "cache"))
    plain = everything(load(tmp_path / "plain.jsonl", tmp_path / "cache"))
    assert {s: [t for _, t in d] for s, d in packed.items()} == {s: [t for _, t in d] for s, d in plain.items()}
    assert list(in_all(load(tmp_path / f"b.txt{ending.upper()}", tmp_path / "cache")).values()) == [STORY]


@pytest.mark.parametrize("ending", PACK)
def test_files_that_were_compressed_in_parts_are_read_whole(tmp_path, ending):
    lines = STORY.splitlines(keepends=True)
    parts = ["".join(lines[:40]), "".join(lines[40:])]
    (tmp_path / f"a.txt{ending}").write_bytes(b"".join(PACK[ending](part.encode()) for part in parts))
    assert list(in_all(load(tmp_path / f"a.txt{ending}", tmp_path / "cache")).values()) == [STORY]


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b"no such format" + raw])
def test_a_damaged_file_is_refused_and_nothing_is_kept(tmp_path, ending, damage):
    path, noise = tmp_path / f"a.txt{ending}", np.random.default_rng(0).integers(0, 64, 50_000, np.uint8) + 32
    path.write_bytes(damage(PACK[ending](noise.tobytes())))
    with pytest.raises(InputError, match=rf"a\.txt\{ending} is (cut short or )?damaged"):
        load(path, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.array_record*"))


def test_parquet_is_read_by_column(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"body": TEXTS, "n": list(range(len(TEXTS)))}), path)
    whole = everything(load(path, tmp_path / "cache", text_field="body"))
    assert sorted(text for part in whole.values() for _, text in part) == sorted(TEXTS)
    with pytest.raises(InputError, match="no text under 'text'; the fields are body, n"):
        load(path, tmp_path / "cache")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"a\.parquet is no whole parquet file"):
        load(path, tmp_path / "cache", text_field="body")


def test_hold_out_holds_no_more_documents_than_it_must():
    alive, most = 0, 0

    class Text(str):
        def __new__(cls, *args):
            nonlocal alive, most
            alive += 1
            most = max(most, alive)
            return super().__new__(cls, *args)

        def __del__(self):
            nonlocal alive
            alive -= 1

    def read():
        return ((str(i), Text(i)) for i in range(2000))

    splits = hold_out(Again(read))
    counts = {split: sum(1 for _ in documents) for split, documents in splits.items()}
    assert counts == {"train": 1800, "validation": 100, "test": 100}
    assert most <= FEW_DOCUMENTS + 2


def test_a_vocabulary_is_trained_on_lines_of_the_whole_text():
    texts = [f"{i}" for i in range(10_000)]
    taken = [int(line) for line in tokenizer.lines(texts, 0.1)]
    assert taken == [int(line) for line in tokenizer.lines(texts, 0.1)]
    assert 850 < len(taken) < 1150
    assert min(np.bincount(np.array(taken) // 1000)) > 60  # from every part


def test_the_kind_of_a_file_is_behind_its_compression(tmp_path):
    assert files.kind(tmp_path / "a.JSONL.Zst") == ".jsonl"
    assert files.looks_like_files("gone/a.csv.gz")
