"""What is searched, what is searched for, and which answers are right: BEIR's files (arXiv 2104.08663), and others like them.

corpus.jsonl     {"_id", "title", "text"} a line
queries.jsonl    {"_id", "text"} a line
qrels/test.tsv   query-id, corpus-id, score: whole numbers, 0 for a wrong answer
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bothways.data import files
from bothways.errors import InputError

Right = dict[str, dict[str, int]]
"""Query -> document -> how right it is; of a query what is named, 0 included."""
IDS = ("_id", "id")


def corpus_of(home: Path) -> Path:
    """The file of documents: itself, or the one in BEIR's directory. Raises InputError where there is none."""
    return _inside(home, "corpus.jsonl") if home.is_dir() else _there(home)


def _inside(home: Path, name: str) -> Path:
    if not (home / name).is_file():
        raise InputError(f"{home} has no {name}; a directory holds corpus.jsonl, queries.jsonl and qrels/test.tsv")
    return home / name


def _there(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"no file {path}")
    return path


def texts(path: Path) -> Iterator[tuple[str, str]]:
    """(id, text) of every text of a file: of tables the fields `_id` (or `id`), `text` and maybe `title`, which is put before
    the text; of other files every line, by its number from 1. One is in memory at a time, and the ids.

    Raises:
      InputError: no such fields, an empty text, or two equal ids.
    """
    seen: dict[str, int] = {}
    for number, name, text in _read(path):
        if not text.strip():
            raise InputError(f"{path}, line {number}: the text of {name!r} is empty; leave it out")
        if name in seen:
            raise InputError(f"{path}, line {number}: the id {name!r} stands in line {seen[name]} too; ids must differ")
        seen[name] = number
        yield name, text
    if not seen:
        raise InputError(f"{path} is empty; give a text a line, or a record with _id and text")


def _read(path: Path) -> Iterator[tuple[int, str, str]]:
    if files.kind(path) not in files.TABLES:
        for number, line in enumerate(files.text_lines(path), 1):
            yield number, str(number), line.strip("\r\n")
        return
    for number, record in files.records(path):
        name = next((record[key] for key in IDS if record.get(key) is not None), None)
        if isinstance(name, bool) or not isinstance(name, str | int):
            raise InputError(
                f"{path}, line {number}: no id under _id or id; the fields are {', '.join(map(str, record))}"
            )
        title, text = record.get("title"), files.text_of(record, "text", "a column of that name", path, number)
        yield number, str(name), f"{title} {text}" if isinstance(title, str) and title.strip() else text


def is_whole(text: str) -> bool:
    return text.strip().lstrip("-").isdecimal()


def right_answers(path: Path) -> Right:
    """A file of right answers. Raises InputError for a line without its three cells, or that comes twice."""
    found: Right = {}
    for number, record in files.records(_there(path)):
        if is_whole(str(list(record)[-1])):
            raise InputError(f"{path}: its first line is an answer; it must name the columns: query-id, corpus-id, score")
        cells = list(record.values())
        if len(cells) != 3 or not all(isinstance(cell, str) for cell in cells):
            raise InputError(f"{path}, line {number}: wanted query-id, corpus-id and score, with tabs between")
        query, document, score = cells
        if not is_whole(score):
            raise InputError(f"{path}, line {number}: the score is {score!r}; it must be a whole number, 0 for wrong")
        if document in found.setdefault(query, {}):
            raise InputError(f"{path}, line {number}: query {query!r} and document {document!r} come twice")
        found[query][document] = int(score)
    if not found:
        raise InputError(f"{path} names no right answer")
    return found


@dataclasses.dataclass(frozen=True)
class Collection:
    """What is searched, what is searched for, and the right answers, if they are known."""

    corpus: Path
    queries: dict[str, str]
    right: Right

    def documents(self) -> Iterator[tuple[str, str]]:
        """(id, text) of every document, read anew."""
        return texts(self.corpus)


def collection(corpus: Path, queries: Path | None, qrels: Path | None, split: str = "test") -> Collection:
    """The collection of these files; of BEIR's directory what is not given lies in it.

    Of a directory only the queries of a split are asked, which are those that its file names.

    Raises:
      InputError: files that are not there or not as `texts` and `right_answers` want them, a query without a right answer, or
        a right answer for a query that is not there.
    """
    home = corpus
    if not home.is_dir() and queries is None:
        raise InputError(f"{corpus} is a file of documents; name a file of queries after it, or give BEIR's directory")
    of = dict(texts(_there(queries) if queries else _inside(home, "queries.jsonl")))
    path = qrels or (home / "qrels" / f"{split}.tsv" if home.is_dir() and queries is None else None)
    if path is None:
        return Collection(corpus_of(corpus), of, {})
    right = right_answers(path)
    if unknown := [query for query in right if query not in of]:
        raise InputError(f"{path} has answers for the query {unknown[0]!r}, which is not among the queries")
    known = set(right)
    if qrels is None:
        others = [right_answers(other) for other in sorted(path.parent.glob("*.tsv")) if other != path]
        known |= {query for other in others for query in other}
        asked = {query: text for query, text in of.items() if query in right or query not in known}
    else:
        asked = of
    for query in asked:
        if not any(score > 0 for score in right.get(query, {}).values()):
            raise InputError(
                f"the query {query!r} has no right answer in {path}: how well it is answered has no measure; leave it out"
            )
    return Collection(corpus_of(corpus), asked, right)


def check_answers(right: Right, documents: Mapping[str, Any]) -> None:
    """Raises InputError for a right answer that is not among the documents."""
    for query, answers in right.items():
        for document, score in answers.items():
            if score > 0 and document not in documents:
                raise InputError(f"the right answer {document!r} of the query {query!r} is not among the documents")


def write_beir(
    home: Path, documents: Iterable[tuple[str, str]], queries: Iterable[tuple[str, str]], right: dict[str, Right]
) -> None:
    """BEIR's directory, whole or not at all.

    Args:
      documents, queries: (id, text).
      right: the right answers of each split.

    Raises:
      InputError: there is something there.
    """
    if home.exists():
        raise InputError(f"there is something at {home}; name a directory that is not there yet")
    partial = home.with_name(f".{home.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "qrels").mkdir(parents=True)
    line: Callable[[dict], str] = lambda record: json.dumps(record, ensure_ascii=False) + "\n"  # noqa: E731
    with (partial / "corpus.jsonl").open("w", encoding="utf-8") as out:
        out.writelines(line({"_id": name, "title": "", "text": text}) for name, text in documents)
    with (partial / "queries.jsonl").open("w", encoding="utf-8") as out:
        out.writelines(line({"_id": name, "text": text}) for name, text in queries)
    for split, answers in right.items():
        with (partial / "qrels" / f"{split}.tsv").open("w", encoding="utf-8") as out:
            out.write("query-id\tcorpus-id\tscore\n")
            out.writelines(f"{query}\t{name}\t{score}\n" for query, of in answers.items() for name, score in of.items())
    partial.rename(home)
