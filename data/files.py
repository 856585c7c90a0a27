"""Documents out of text, JSONL, CSV and TSV files."""

import csv
import glob
import hashlib
import io
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from bothways.errors import InputError

SETTLED = 2_000_000_000
"""Nanoseconds after which a second change of a file cannot bear the same time as the first."""
SUFFIXES = (".txt", ".md", ".text", ".jsonl", ".csv", ".tsv")


def looks_like_files(pattern: str) -> bool:
    """Whether a corpus name means files, rather than a dataset's name."""
    return Path(pattern).expanduser().exists() or any(c in pattern for c in "*?[") or pattern.endswith(SUFFIXES)


def matching(pattern: str) -> list[Path]:
    """The files that a path or glob names, sorted; of a directory, every file of a known kind.

    Raises:
      InputError: there are none.
    """
    path = Path(pattern).expanduser()
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.suffix in SUFFIXES]
    elif path.exists():
        found = [path]
    else:
        found = [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]
    if not found:
        raise InputError(f"no file matches {pattern!r}; give a file, a directory or a glob of {', '.join(SUFFIXES)}")
    return sorted(found)


def fingerprint(paths: list[Path], cache: Path, *extra: str) -> str:
    """A hash of the files' contents. A file that has not been touched since it was last read is not read again.

    Args:
      cache: where it is kept what was read, and how the file was then.
    """
    home = cache / "digests.json"
    try:
        known = json.loads(home.read_text())
    except (OSError, json.JSONDecodeError):
        known = {}
    digest, before = hashlib.sha256("\0".join(extra).encode()), dict(known)
    for path in paths:
        stat, where = path.stat(), str(path.absolute())
        touched = max(stat.st_mtime_ns, stat.st_ctime_ns)
        state = [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        found, *then = known.get(where, [""])
        if then != state:
            with path.open("rb") as f:
                found = hashlib.file_digest(f, "sha256").hexdigest()
            known.pop(where, None)
            if time.time_ns() - touched > SETTLED:
                known[where] = [found, *state]
        digest.update(path.name.encode() + bytes.fromhex(found))
    if known != before:
        home.parent.mkdir(parents=True, exist_ok=True)
        partial = home.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(known))
        partial.replace(home)
    return digest.hexdigest()[:16]


def read_utf8(path: Path) -> str:
    """The text of a file.

    Raises:
      InputError: the file cannot be read, or is not UTF-8; says which bytes and where.
    """
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise InputError(f"cannot read {path}: {e.strerror}") from e
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        at = e.start + len(raw) - len(e.object)  # the codec counts from behind a byte order mark
        line = raw.count(b"\n", 0, at) + 1
        raise InputError(
            f"{path} is not UTF-8: bytes {raw[at : at + 4].hex(' ')} at offset {at} (line {line}); "
            "convert it first, for example with iconv -f latin1 -t utf-8"
        ) from e


def records(path: Path) -> Iterator[tuple[int, dict]]:
    """(line number, record) of a JSONL, CSV or TSV file.

    Raises:
      InputError: a line that is not a JSON object, or a table without a header.
    """
    text = read_utf8(path)
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as e:
                raise InputError(f"{path}, line {number}: not JSON ({e.msg}): {line[:60]!r}") from e
            if not isinstance(record, dict):
                raise InputError(f"{path}, line {number}: wanted a JSON object, got {line[:60]!r}")
            yield number, record
    else:
        csv.field_size_limit(2**31 - 1)  # a document may be longer than the reader's 128 KiB
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else ",")
        for row in rows:
            yield rows.line_num, row


def documents(paths: list[Path], text_field: str) -> Iterator[tuple[str, str]]:
    """(name, text): a plain-text file is one document, and so is each record of a JSONL, CSV or TSV file.

    Raises:
      InputError: unreadable files, or records without the field.
    """
    for path in paths:
        if path.suffix not in (".jsonl", ".csv", ".tsv"):
            yield path.name, read_utf8(path)
            continue
        for number, record in records(path):
            yield f"{path.name}:{number}", text_of(record, text_field, "--data.text-field", path, number)


def pairs(paths: list[Path], source_field: str, target_field: str) -> Iterator[tuple[str, str]]:
    """(name, text) of the records' sources and targets in turn: document 2i is a source, 2i + 1 its target.

    Raises:
      InputError: files without fields, records without these two, or an empty text.
    """
    for path in paths:
        if path.suffix not in (".jsonl", ".csv", ".tsv"):
            raise InputError(f"{path}: pairs of source and target come from .jsonl, .csv or .tsv files")
        for number, record in records(path):
            for field, flag in ((source_field, "--data.source-field"), (target_field, "--data.target-field")):
                text = text_of(record, field, flag, path, number)
                if not text.strip():
                    raise InputError(f"{path}, line {number}: the text under {field!r} is empty")
                yield f"{path.name}:{number}", text


def text_of(record: dict, field: str, flag: str, path: Path, number: int) -> str:
    """Raises InputError if the record has no text under this name."""
    text = record.get(field)
    if not isinstance(text, str):
        raise InputError(
            f"{path}, line {number}: no text under {field!r}; the fields are "
            f"{', '.join(map(str, record))}; choose one with {flag}"
        )
    return text
