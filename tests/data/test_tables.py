"""What tables, folders and file names say: nothing is left out, mixed or misread in silence."""

import gzip
import json
import logging
import os

import numpy as np
import pytest

from bothways.data import files, tasks, tokens
from bothways.data.config import DataConfig
from bothways.data.corpora import load
from bothways.errors import InputError
from tests.data import helpers


def read(path, text: str) -> list[dict]:
    path.write_bytes(text.encode())
    return [record for _, record in files.records(path)]


def test_a_quotation_mark_in_a_tsv_is_a_character(tmp_path):
    rows = read(tmp_path / "q.tsv", 'text\tlabel\n"Tis he\tyes\nand "so"\tno\n"\tno\n')
    assert [r["text"] for r in rows] == ['"Tis he', 'and "so"', '"']


def test_a_tsv_of_a_csv_writer_keeps_its_line_breaks(tmp_path):
    rows = read(tmp_path / "w.tsv", 'text\tlabel\n"two\nlines, ""quoted"""\tyes\nplain\tno\n')
    assert [r["text"] for r in rows] == ['two\nlines, "quoted"', "plain"]


def test_a_csv_row_with_more_cells_than_the_header_is_refused(tmp_path):
    with pytest.raises(
        InputError, match=r"line 2: 3 cells, and the header names 2 \(text, label\); put the text between quot"
    ):
        read(tmp_path / "c.csv", "text,label\nwell, then,yes\n")
    assert read(tmp_path / "c.csv", 'text,label\n"well, then",yes\n') == [{"text": "well, then", "label": "yes"}]


def test_quotation_marks_that_do_not_match_are_refused_with_their_line(tmp_path):
    with pytest.raises(InputError, match="line 3: .*written twice"):
        read(tmp_path / "c.csv", 'text,label\nfine,yes\n"never closed,no\nmore,yes\n')


def test_two_columns_of_one_name_are_refused(tmp_path):
    with pytest.raises(InputError, match="two columns of the header have the same name"):
        read(tmp_path / "c.csv", "text,text\na,b\n")


def test_carriage_returns_and_byte_order_marks_are_no_text(tmp_path):
    assert read(tmp_path / "c.csv", "\ufefftext,label\r\na,b\r\n") == [{"text": "a", "label": "b"}]
    assert read(tmp_path / "t.tsv", "\ufefftext\tlabel\r\na\tb\r\n") == [{"text": "a", "label": "b"}]


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["train.csv", "val.csv", "test.csv"], ["train", "validation", "test"]),
        (["latest.csv", "contest.csv"], ["train", "train"]),
        (["device_reviews.csv", "reviews_dev.csv"], ["train", "validation"]),
        (["TrainingSet.csv", "DevSet.csv"], ["train", "validation"]),
    ],
)
def test_a_split_is_a_whole_word_of_a_files_name(tmp_path, names, wanted):
    found = tasks.splits_of([tmp_path / name for name in names])
    assert [found[tmp_path / name] for name in names] == wanted


def test_a_name_without_a_split_beside_train_is_refused(tmp_path):
    with pytest.raises(InputError, match="latest.csv: beside a file called train, every file's name says its split"):
        tasks.splits_of([tmp_path / "train.csv", tmp_path / "latest.csv"])
    with pytest.raises(InputError, match="names two splits, train and test"):
        tasks.splits_of([tmp_path / "train_test.csv", tmp_path / "x.csv"])


def test_a_label_that_is_no_finite_number_is_refused(tmp_path):
    path = tmp_path / "numbers.csv"
    path.write_text("text,label\n" + "".join(f"word {i},{i / 7:.2f}\n" for i in range(30)) + "bad,nan\n")
    with pytest.raises(InputError, match="the label nan, which is no finite number"):
        tasks.load(str(path))


def test_a_folder_is_read_through_links_and_says_what_it_leaves_out(tmp_path, caplog):
    (tmp_path / "text").mkdir()
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep" / "b.TXT").write_text("b")
    (tmp_path / "text" / "a.txt").write_text("a")
    (tmp_path / "text" / "picture.png").write_bytes(b"x")
    os.symlink(tmp_path / "elsewhere", tmp_path / "text" / "linked")
    os.symlink(tmp_path / "text", tmp_path / "elsewhere" / "circle")
    os.symlink(tmp_path / "nowhere", tmp_path / "text" / "dangling.txt")
    with caplog.at_level(logging.WARNING, "bothways"):
        found = files.matching(str(tmp_path / "text"))
    assert sorted(p.name for p in found) == ["a.txt", "b.TXT"]
    assert "left out 1 file(s) of other kinds: .png" in caplog.text


def test_held_out_text_that_is_in_the_corpus_by_another_path_is_refused(tmp_path, cache_dir):
    for name, text in (("a", "one text\n" * 50), ("b", "another\n" * 50)):
        (tmp_path / f"{name}.txt").write_text(text)
    (tmp_path / "copy.txt").write_text("one text\n" * 50)
    cfg = DataConfig(corpus=str(tmp_path / "[ab].txt"), validation=str(tmp_path / "copy.txt"), cache=str(cache_dir))
    with pytest.raises(InputError, match="is in data.corpus as .*a.txt and in data.validation"):
        load(cfg)


def test_the_same_text_under_another_name_is_the_same_text(tmp_path, cache_dir):
    made = []
    for name in ("first.txt", "second.txt"):
        (tmp_path / name).write_text("the same words\n" * 60)
        made.append(load(DataConfig(corpus=str(tmp_path / name), cache=str(cache_dir))))
    assert made[0].fingerprint == made[1].fingerprint
    assert set(made[0].earlier).isdisjoint(made[1].earlier)  # runs of before, that hashed names too, still know theirs


def test_prepared_text_follows_the_umask(text_file, tmp_path):
    from bothways.data import tokenizer

    cfg = DataConfig(corpus=str(text_file), tokenizer="unigram", vocab_size=320, cache=str(tmp_path))
    corpus = load(cfg)
    vocabulary = tokenizer.train((text for _, text in corpus.read("train")), "unigram", 320)
    before = os.umask(0o027)
    try:
        home = tokens.prepare(corpus, "train", vocabulary, str(tmp_path)).home
    finally:
        os.umask(before)
    assert home.stat().st_mode & 0o777 == 0o750


def test_a_line_longer_than_sentencepiece_takes_is_trained_on():
    from bothways.data import tokenizer

    words = np.random.default_rng(0).choice(["king", "queen", "storm", "castle", "sword"], 60_000)
    one_line = " ".join(words)
    vocabulary = tokenizer.train([one_line], "unigram", 280)
    assert vocabulary.decode(vocabulary.encode(one_line[:200])) == one_line[:200]
    letters = [vocabulary.piece(i) for i in vocabulary.encode("king queen storm")]
    assert "".join(letters) == "king queen storm"  # in pieces of this text, not in bytes


def test_jsonl_of_other_capitals_is_jsonl(tmp_path):
    assert read(tmp_path / "a.JSONL", json.dumps({"text": "a"}) + "\r\n") == [{"text": "a"}]


@pytest.mark.parametrize("name", ["a.json", "a.ndjson", "a.json.gz", "A.JSON"])
def test_lines_of_json_are_records_under_other_names_too(tmp_path, cache_dir, name):
    lines = "".join(json.dumps({"text": f"document {n}"}) + "\n" for n in range(30))
    (tmp_path / name).write_bytes(gzip.compress(lines.encode()) if name.endswith("gz") else lines.encode())
    for pattern in (name, "*" + name[1:]):
        assert [*helpers.in_all(helpers.load(tmp_path / pattern, cache_dir)).values()] == [
            f"document {n}" for n in range(30)
        ]


def test_one_array_of_json_is_refused_and_a_folders_json_is_left_out(tmp_path, cache_dir, caplog):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "info.json").write_text('[\n{"text": "a"}\n]\n')
    (tmp_path / "text" / "b.jsonl").write_text('{"text": "document"}\n')
    assert helpers.in_all(helpers.load(tmp_path / "text", cache_dir)) == {"b.jsonl:1": "document"}
    assert "left out 1 file(s) of other kinds: .json" in caplog.text
    with pytest.raises(InputError, match="line 1: not JSON .* write one object per line"):
        helpers.in_all(helpers.load(tmp_path / "text" / "info.json", cache_dir))


def test_what_was_trained_on_json_as_plain_text_is_another_corpus(tmp_path, cache_dir):
    for name in ("a.json", "a.jsonl"):
        (tmp_path / name).write_text('{"text": "document"}\n')
    as_named, as_usual = (helpers.load(tmp_path / name, cache_dir) for name in ("a.json", "a.jsonl"))
    assert as_named.fingerprint == as_usual.fingerprint
    assert not as_named.earlier
    assert as_usual.earlier
