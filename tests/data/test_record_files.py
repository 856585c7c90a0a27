"""array_record as a source: records of text or JSON, and what is refused."""

import json

import fsspec
import pytest

from bothways.data import corpora, files
from bothways.data.config import DataConfig
from bothways.errors import InputError
from tests.data.helpers import everything, load

writer = pytest.importorskip("array_record.python.array_record_module", reason="array_record is not built here")


def write(path, records) -> None:
    made = writer.ArrayRecordWriter(str(path), "group_size:7")
    for record in records:
        made.write(record)
    made.close()


TEXTS = [f"document {i},\nof two lines \u00e9\u2581" for i in range(601)]


@pytest.mark.parametrize("name", ["a.array_record", "a.array_record-00000-of-00001"])
@pytest.mark.parametrize("json_too", [False, True])
def test_each_record_is_a_document(tmp_path, name, json_too):
    write(tmp_path / name, [json.dumps({"text": t}).encode() if json_too else t.encode() for t in TEXTS])
    found = everything(load(tmp_path, tmp_path / "cache"))
    assert [text for _, text in found["validation"]] == TEXTS[18::20]
    assert sorted(text for documents in found.values() for _, text in documents) == sorted(TEXTS)


def test_behind_a_url_and_by_another_field(tmp_path):
    write(tmp_path / "a.array_record", [json.dumps({"body": t}).encode() for t in TEXTS])
    fsspec.filesystem("memory").pipe_file("/ar/a.array_record", (tmp_path / "a.array_record").read_bytes())
    found = load("memory://ar/a.array_record", tmp_path / "cache", text_field="body")
    assert [text for _, text in found.documents("test")] == TEXTS[19::20]
    with pytest.raises(InputError, match="line 1: no text under 'text'; the fields are body; choose one with"):
        list(files.documents([tmp_path / "a.array_record"], "text"))


@pytest.mark.parametrize("how", ["cut short", "altered", "another kind", "empty", "bytes"])
def test_what_is_no_array_record_is_refused(tmp_path, how):
    path = tmp_path / "a.array_record"
    write(path, [b"\xff\xfe"] if how == "bytes" else [t.encode() for t in TEXTS])
    raw = bytearray(path.read_bytes())
    raw[next(i for i in range(1000, len(raw)) if raw[i])] ^= 255
    whole = path.read_bytes()
    path.write_bytes(
        {"cut short": whole[: len(whole) // 2], "altered": raw, "another kind": b"text\n" * 9, "empty": b""}.get(
            how, whole
        )
    )
    with pytest.raises(
        InputError, match="record 1: neither UTF-8" if how == "bytes" else "is no whole array_record file"
    ):
        corpora.load(DataConfig(corpus=str(path), cache=str(tmp_path / "cache")))
    assert not list((tmp_path / "cache").glob("tfds/text/*/1.0.0"))
