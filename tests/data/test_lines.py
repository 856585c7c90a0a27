"""Lines that commands read: of any system's text files, and of tables."""

import io
import json

import pytest

from bothways.commands.shared import read_lines
from bothways.errors import InputError

TEXTS = ["the king", "caf\u00e9, x"]


@pytest.mark.parametrize("raw", [b"the king\ncaf\xc3\xa9, x\n", b"\xef\xbb\xbfthe king\r\ncaf\xc3\xa9, x\r\n"])
def test_lines_are_the_same_from_any_system(tmp_path, monkeypatch, raw):
    (tmp_path / "a.txt").write_bytes(raw)
    assert read_lines(tmp_path / "a.txt") == TEXTS
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw)))
    assert read_lines(None) == TEXTS


def test_of_a_table_the_texts_are_read_and_not_its_header(tmp_path):
    (tmp_path / "a.csv").write_text('label,text\nx,the king\ny,"caf\u00e9, x"\n')
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text, "text_b": "b"}) + "\n" for text in TEXTS))
    assert read_lines(tmp_path / "a.csv") == read_lines(tmp_path / "a.jsonl") == TEXTS
    assert read_lines(tmp_path / "a.jsonl", ("text", "text_b")) == [f"{text}\tb" for text in TEXTS]
    assert read_lines(tmp_path / "a.csv", ("text", "text_b")) == TEXTS


def test_a_table_without_texts_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("body\nthe king\n")
    with pytest.raises(InputError, match=r"a\.csv, line 2: no text under 'text'; the fields are body"):
        read_lines(tmp_path / "a.csv")
