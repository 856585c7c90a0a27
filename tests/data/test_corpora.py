"""Corpora: the documents that are read, how they are split, when they are read again, and what is refused."""

import hashlib
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bothways.data import corpora, files, plays
from bothways.data.documents import FEW_DOCUMENTS, hold_out
from bothways.errors import InputError
from tests.data.helpers import STORY, everything, in_all, load

HYPOTHESIS = settings(max_examples=100, deadline=None, database=None, derandomize=True)


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".txt", ".md", ".text"])
def test_a_text_file_is_one_document(tmp_path, cache, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_text(STORY)
    assert in_all(load(path, cache)) == {path.name: STORY}


def test_newlines_and_letters_come_through_as_they_are(tmp_path, cache):
    text = "caf\u00e9\r\n\r\n\U0001f389 \u2581 \x00 end without newline"
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    assert in_all(load(path, cache)) == {"a.txt": text}


def test_a_byte_order_mark_is_no_text(tmp_path, cache):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + STORY.encode())
    assert in_all(load(path, cache)) == {"a.txt": STORY}


RECORDS = ["plain", 'a "quoted", one', "two\nlines", "caf\u00e9 \U0001f389", "x" * 200_000]


def write_table(path: Path, field: str) -> None:
    if path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps({"id": i, field: text}) for i, text in enumerate(RECORDS)) + "\n")
        return
    separator = "\t" if path.suffix == ".tsv" else ","
    rows = [separator.join(["id", field])]
    rows += [f'{i}{separator}"{text}"' for i, text in enumerate(t.replace('"', '""') for t in RECORDS)]
    path.write_bytes(("\r\n".join(rows) + "\r\n").encode())


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
@pytest.mark.parametrize("field", ["text", "body"])
def test_every_record_of_a_table_is_a_document(tmp_path, cache, suffix, field):
    path = tmp_path / f"a{suffix}"
    write_table(path, field)
    whole = in_all(load(path, cache, text_field=field))
    assert list(whole.values()) == RECORDS
    assert all(re.fullmatch(rf"a\{suffix}:\d+", name) for name in whole)


def test_a_glob_and_a_directory_name_many_files(tmp_path, cache):
    folder = tmp_path / "books"
    (folder / "deep").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "deep/c.md", "deep/d.txt", "no.pdf"):
        (folder / name).write_text(f"{name}\n{STORY}")
    assert sorted(in_all(load(folder, cache))) == ["a.txt", "b.txt", "c.md", "d.txt"]
    assert sorted(in_all(load(folder / "*.txt", cache))) == ["a.txt", "b.txt"]
    assert sorted(in_all(load(folder / "**" / "*.txt", cache))) == ["a.txt", "b.txt", "d.txt"]


def test_a_folder_is_read_through_links_whatever_its_endings_case(tmp_path, cache, caplog):
    folder, elsewhere = tmp_path / "books", tmp_path / "elsewhere"
    (folder / "chapter.txt").mkdir(parents=True)
    elsewhere.mkdir()
    for path in (folder / "a.TXT", folder / ".hidden.txt", folder / "notes.doc", elsewhere / "b.txt"):
        path.write_text(f"{path.name}\n{STORY}")
    (folder / "more").symlink_to(elsewhere)
    (elsewhere / "round").symlink_to(folder)
    assert sorted(in_all(load(folder, cache))) == ["a.TXT", "b.txt"]
    assert "left out 1 file(s) of other kinds: .doc" in caplog.text


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_quotation_mark_in_a_tsv_is_a_character(tmp_path, cache, ending):
    texts = ['"To be', "or not", 'to be"', '"said ""he"""', '"whole"']
    path = tmp_path / "a.tsv"
    path.write_bytes(ending.join(["text\tlabel", *(f"{text}\t{i}" for i, text in enumerate(texts)), ""]).encode())
    assert list(in_all(load(path, cache)).values()) == [*texts[:3], 'said "he"', texts[4]]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("text,n\nWell, then,1\n", r"a\.csv, line 2: 3 cells, and the header names 2 \(text, n\)"),
        ('text,n\nfine,1\n"open,2\nnext,3\n', r"a\.csv, line 3: .*end of data"),
        ("text,text\na,b\n", "two columns of the header have the same name"),
    ],
)
def test_a_table_that_would_be_read_wrongly_is_refused(tmp_path, cache, table, message):
    (tmp_path / "a.csv").write_text(table)
    with pytest.raises(InputError, match=message):
        load(tmp_path / "a.csv", cache)


def test_the_same_text_under_another_name_is_the_same_corpus(tmp_path, cache):
    (tmp_path / "a.txt").write_text(STORY)
    before = load(tmp_path / "a.txt", cache)
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert load(tmp_path / "b.txt", cache).fingerprint == before.fingerprint
    by_name = hashlib.sha256(b"text\0" + b"1" + b"a.txt" + hashlib.sha256(STORY.encode()).digest()).hexdigest()[:16]
    assert before.earlier == (by_name,)  # what runs of older versions know it by


def test_the_same_bytes_as_another_kind_of_file_are_another_corpus(tmp_path, cache):
    lines = "".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(60))
    (tmp_path / "a.txt").write_text(lines)
    plain = load(tmp_path / "a.txt", cache)
    assert len(everything(plain)["train"]) == 1
    (tmp_path / "a.txt").rename(tmp_path / "a.jsonl")
    table = load(tmp_path / "a.jsonl", cache)
    assert table.fingerprint != plain.fingerprint
    assert plain.fingerprint in table.earlier  # older versions knew it by that
    assert len(everything(table)["train"]) == 54


# ---- splits --------------------------------------------------------------------------------------------------------


def test_of_many_documents_whole_ones_are_held_out(tmp_path, cache):
    path = tmp_path / "a.jsonl"
    texts = [f"document {i}\n" * 20 for i in range(60)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    splits = everything(load(path, cache))
    assert [text for _, text in splits["validation"]] == [texts[i] for i in (18, 38, 58)]
    assert [text for _, text in splits["test"]] == [texts[i] for i in (19, 39, 59)]
    assert [text for _, text in splits["train"]] == [text for i, text in enumerate(texts) if i % 20 < 18]


def test_of_few_documents_the_end_is_held_out(tmp_path, cache):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name + STORY)
    splits = everything(load(tmp_path / "?.txt", cache))
    for i, name in enumerate(("a.txt", "b.txt")):
        parts = [splits[split][i] for split in ("train", "validation", "test")]
        assert [part[0] for part in parts] == [name] * 3
        assert "".join(part[1] for part in parts) == name + STORY
        assert all(part[1].endswith("\n") for part in parts)


@given(st.lists(st.text(st.sampled_from("ab \n"), min_size=1, max_size=60), min_size=1, max_size=45))
@HYPOTHESIS
def test_splits_are_disjoint_and_cover_everything(texts):
    names = [(str(i), text) for i, text in enumerate(texts)]
    parts = {split: list(documents) for split, documents in hold_out(names).items()}
    joined = dict.fromkeys((name for name, _ in names), "")
    for split in ("train", "validation", "test"):
        for name, text in parts[split]:
            joined[name] += text
    assert joined == dict(names)
    if len(texts) >= FEW_DOCUMENTS:
        assert sum(map(len, parts.values())) == len(texts)


@given(st.text(st.sampled_from("abcdefgh\n"), min_size=100, max_size=1000) | st.just("title\n" + "x" * 2000))
@HYPOTHESIS
def test_about_a_tenth_of_a_text_is_held_out_wherever_its_lines_end(text):
    parts = {split: "".join(t for _, t in documents) for split, documents in hold_out([("a", text)]).items()}
    assert 0.83 < len(parts["train"]) / len(text) <= 0.9
    assert 0 < len(parts["validation"]) <= 0.11 * len(text)
    assert 0.04 < len(parts["test"]) / len(text) <= 0.11


def test_a_validation_file_is_held_out_instead(tmp_path, cache):
    (tmp_path / "train.txt").write_text(STORY)
    (tmp_path / "held.txt").write_text("held out\n")
    splits = everything(load(tmp_path / "train.txt", cache, validation=str(tmp_path / "held.txt")))
    held = [("held.txt", "held out\n")]
    assert splits == {"train": [("train.txt", STORY)], "validation": held, "test": held}


# ---- reading again -------------------------------------------------------------------------------------------------


def test_unchanged_files_are_prepared_once(tmp_path, cache, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text(STORY)
    first = load(path, cache)
    before = everything(first)

    def prepared_again(*_, **__):
        raise AssertionError("the corpus was prepared a second time")

    monkeypatch.setattr(corpora, "hold_out", prepared_again)
    path.touch()
    again = load(path, cache)
    assert again.fingerprint == first.fingerprint
    assert everything(again) == before
    path.write_text(STORY + "more\n")
    with pytest.raises(AssertionError, match="second time"):
        load(path, cache)


def test_a_file_that_was_not_touched_is_not_read_again(tmp_path, cache, monkeypatch):
    path, digests = tmp_path / "a.txt", []
    path.write_text(STORY)
    digest = files.hashlib.file_digest
    monkeypatch.setattr(files.hashlib, "file_digest", lambda *a: digests.append(a) or digest(*a))
    first = load(path, cache)
    load(path, cache)
    assert len(digests) == 2  # just written: another change might bear the same time
    monkeypatch.setattr(files, "SETTLED", -1)
    load(path, cache)
    monkeypatch.setattr(files, "documents", None)
    assert load(path, cache).fingerprint == first.fingerprint
    assert len(digests) == 3
    monkeypatch.undo()
    path.write_text(STORY.replace("story", "novel"))
    assert load(path, cache).fingerprint != first.fingerprint


def test_a_changed_file_is_another_corpus(tmp_path, cache):
    path = tmp_path / "a.txt"
    path.write_text(STORY)
    first = load(path, cache)
    path.write_text(STORY.replace("story", "novel"))  # the same size
    second = load(path, cache)
    assert second.fingerprint != first.fingerprint
    assert in_all(second) == {"a.txt": STORY.replace("story", "novel")}
    assert in_all(first) == {"a.txt": STORY}


def test_validation_files_and_the_text_field_are_part_of_the_fingerprint(tmp_path, cache):
    path, held = tmp_path / "a.jsonl", tmp_path / "held.jsonl"
    path.write_text(json.dumps({"text": "one", "body": "two"}))
    held.write_text(json.dumps({"text": "three", "body": "four"}))
    found = [load(path, cache), load(path, cache, text_field="body"), load(path, cache, validation=str(held))]
    found.append(load(tmp_path / "*.jsonl", cache))
    held.write_text(json.dumps({"text": "five", "body": "six"}))
    found.append(load(path, cache, validation=str(held)))
    assert len({corpus.fingerprint for corpus in found}) == len(found)
    assert [text for _, text in found[-1].documents("validation")] == ["five"]


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_bytes_that_are_not_utf8_are_shown_with_their_place(tmp_path, cache, mark):
    path = tmp_path / "latin.txt"
    path.write_bytes(mark + b"first line\nsecond line\nun caf\xe9 noir\n")
    at = len(mark) + 29
    with pytest.raises(InputError, match=rf"latin\.txt is not UTF-8: bytes e9 20 6e 6f at offset {at} \(line 3\)"):
        load(path, cache)


@pytest.mark.parametrize("text", ["", " \n\n\t "])
def test_an_empty_corpus_is_refused(tmp_path, cache, text):
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text(STORY)
    with pytest.raises(InputError, match=r"is empty: 1 file\(s\), no text"):
        load(tmp_path / "a.txt", cache)
    with pytest.raises(InputError, match=r"data\.validation .* is empty"):
        load(tmp_path / "b.txt", cache, validation=str(tmp_path / "a.txt"))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv"])
def test_a_missing_field_is_refused_with_those_that_are_there(tmp_path, cache, suffix):
    path = tmp_path / f"a{suffix}"
    write_table(path, "body")
    with pytest.raises(InputError, match=rf"a\{suffix}, line \d: no text under 'text'; the fields are id, body;"):
        load(path, cache)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', "line 3: not JSON"),
        ('["a list"]', "line 3: wanted a JSON object"),
        ('{"text": 3}', "no text under"),
        (r'{"text": "caf\u00e9 \ud83d"}', r"line 3: \\ud83d is half of a surrogate pair"),
    ],
)
def test_a_bad_json_line_is_refused_with_its_number(tmp_path, cache, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "fine"}}\n\n{line}\n')
    with pytest.raises(InputError, match=message):
        load(path, cache)


def test_a_pattern_without_files_is_refused(tmp_path, cache):
    (tmp_path / "a.pdf").write_text(STORY)
    for pattern in (tmp_path / "*.txt", tmp_path / "absent.txt", tmp_path):
        with pytest.raises(InputError, match="no file matches"):
            load(pattern, cache)


def test_a_file_cannot_be_held_out_from_itself(tmp_path, cache):
    (tmp_path / "a.txt").write_text(STORY)
    with pytest.raises(InputError, match=r"a\.txt is in data\.corpus and in data\.validation"):
        load(tmp_path / "a.txt", cache, validation=str(tmp_path / "*.txt"))
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "copy.txt").write_text(STORY)
    with pytest.raises(InputError, match=r"copy\.txt is in data\.corpus as .*a\.txt and in data\.validation"):
        load(tmp_path / "a.txt", cache, validation=str(tmp_path / "held"))


# ---- the embedded plays --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shakespeare(tmp_path_factory) -> dict[str, list[tuple[str, str]]]:
    return everything(load("shakespeare", tmp_path_factory.mktemp("plays")))


def test_six_plays_are_held_out_whole_one_of_each_genre(shakespeare):
    genre = {name: genre for name, genre, _ in plays.plays()}
    names = {split: [name for name, _ in documents] for split, documents in shakespeare.items()}
    held = names["validation"] + names["test"]
    assert len(names["validation"]) == len(names["test"]) == 3
    assert sorted(genre[name] for name in held) == sorted(set(genre.values()))
    assert len(held) == 6
    assert not set(held) & set(names["train"])
    assert sorted(names["train"] + held) == sorted(genre)
    assert len(genre) == 38
    assert set().union(*plays.HELD_OUT.values()) == set(held)


def test_no_speech_of_a_held_out_play_is_in_training(shakespeare):
    def speeches(split):
        parts = [part.strip() for _, text in shakespeare[split] for part in re.split(r"^[^\n]+:\n", text, flags=re.M)]
        return {part for part in parts if len(part) > 80}

    train = speeches("train")
    assert len(train) > 10_000
    assert not train & speeches("validation")
    assert not train & speeches("test")


def test_plays_are_plain_text_with_speakers(shakespeare):
    for documents in shakespeare.values():
        for name, text in documents:
            assert len(re.findall(r"^[A-Z][A-Za-z' ]+:$", text, flags=re.M)) > 200, name
            assert not re.search(r"[*_#\\\r]|[ \t]$|\n\n\n", text, flags=re.M), name
            assert text.endswith("\n")


def test_stage_directions_are_in_brackets_and_speech_is_not(shakespeare):
    for documents in shakespeare.values():
        for name, text in documents:
            for paragraph in text.split("\n\n"):
                brackets = re.sub(r"[^\[\]]", "", paragraph).replace("[]", "")
                unclosed = paragraph == "[Burthen [dispersedly, within]"  # so it is in the source
                assert not brackets or unclosed, (name, paragraph)
            directions = re.findall(r"\[([^\]]*)\]", text)
            assert any(direction.startswith(("Exit", "Exeunt")) for direction in directions), name
            assert not any("\n\n" in direction for direction in directions), name


@pytest.mark.parametrize(
    ("markdown", "text"),
    [
        ("**ROMEO**  \r\nShall I  \r\nhear?\r\n", "ROMEO:\nShall I\nhear?\n"),
        ("_Enter a KING and  \na Queen_\n\n\n\nHo", "[Enter a KING and\na Queen]\n\nHo\n"),
        (r"__\[Awaking]_", "[Awaking]\n"),
        ("a [Within]_\n\n_Exit_", "a [Within]\n\n[Exit]\n"),
        ("a_ b\n\n_Exit_\n\nc", "a_ b\n\n[Exit]\n\nc\n"),
        ("*Sound a horn.*", "[Sound a horn.]\n"),
        ("*[He draws his sword.]*", "[He draws his sword.]\n"),
        ("## ACT I\n\n### SCENE I.", "ACT I\n\nSCENE I.\n"),
        (r"knight,'\--every 1\. 2", "knight,'--every 1. 2\n"),
    ],
)
def test_markdown_becomes_plain(markdown, text):
    assert plays.plain(markdown) == text


def test_the_plays_have_their_own_validation(tmp_path, cache):
    (tmp_path / "a.txt").write_text(STORY)
    with pytest.raises(InputError, match="shakespeare has its own held-out text"):
        load("shakespeare", cache, validation=str(tmp_path / "a.txt"))
