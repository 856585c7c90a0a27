"""Documents out of text, JSONL, CSV, TSV and parquet files, compressed or not."""

import bz2
import contextlib
import csv
import glob
import gzip
import hashlib
import io
import itertools
import json
import logging
import lzma
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import BinaryIO

import zstandard

from bothways.data import record_files, stores
from bothways.data.config import DataConfig
from bothways.data.documents import pieces_of
from bothways.data.mixture_config import parts_of
from bothways.data.stores import AnyPath, Remote, is_remote
from bothways.data.zstd import Zstd
from bothways.errors import InputError

SETTLED = 2_000_000_000
"""Nanoseconds after which a second change of a file cannot bear the same time as the first."""
PLAIN = (".txt", ".md", ".text")
TABLES = (".jsonl", ".csv", ".tsv", ".parquet", ".array_record")
JSON_LINES = (".ndjson", ".json")
"""Other endings of .jsonl. In a folder a plain .json says something about the text, and is left out; `*.json` takes it."""
PACKED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
"""Endings of compressed files, behind another one, and what fsspec calls them."""
SUFFIXES = (*PLAIN, *TABLES, *(kind + packed for kind in (*PLAIN, *TABLES[:3]) for packed in PACKED))
JSON_ENDINGS = (*JSON_LINES, *(kind + packed for kind in JSON_LINES for packed in PACKED))
ENDINGS = (*SUFFIXES, *JSON_ENDINGS)
"""Of names that are files, although nothing is there."""
LOG = logging.getLogger("bothways")


def kind(path: AnyPath) -> str:
    """How a file is read, by its ending in lower case; of a compressed file, by that before: `.jsonl` of a.JSONL.zst."""
    last = path.suffix.lower()
    if last.startswith(".array_record-"):  # a shard: a.array_record-00000-of-00002
        return ".array_record"
    last = PurePath(path.stem).suffix.lower() if last in PACKED else last
    return ".jsonl" if last in JSON_LINES else last


def is_wanted(path: AnyPath, suffixes: tuple[str, ...]) -> bool:
    """Whether a file in a folder is one of these kinds."""
    return kind(path) in suffixes and path.suffix.lower() != ".json"


def looks_like_files(pattern: str) -> bool:
    """Whether a corpus name means files, rather than a dataset's name."""
    return (
        is_remote(pattern)
        or Path(pattern).expanduser().exists()
        or any(c in pattern for c in "*?[")
        or pattern.lower().endswith(ENDINGS)
    )


def matching(pattern: str, suffixes: tuple[str, ...] = SUFFIXES) -> list[AnyPath]:
    """The files that a path or glob names, sorted; of a directory, every file of a known kind, through links too.

    What a directory holds besides is left out, and a warning says what.

    Raises:
      InputError: there are none.
    """
    if is_remote(pattern):
        return list(stores.matching(pattern, lambda p: is_wanted(p, suffixes), suffixes))
    path = Path(pattern).expanduser()
    if path.is_dir():
        every = list(inside(path))
        found = [p for p in every if is_wanted(p, suffixes)]
        others = sorted({p.suffix.lower() or p.name for p in every if not is_wanted(p, suffixes)})
        if others:
            LOG.warning(
                "%s: left out %d file(s) of other kinds: %s", path, len(every) - len(found), ", ".join(others[:8])
            )
    elif path.exists():
        found = [path]
    else:
        found = [Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file()]
    if not found:
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise InputError(
            f"no file matches {pattern!r}{where}; give a file, a directory or a glob of {', '.join(suffixes)}"
        )
    return sorted(found)


def inside(folder: Path) -> Iterator[Path]:
    """Every file below a folder, behind linked folders too; hidden ones are left out, and so are links in a circle."""
    seen: set[str] = set()
    for home, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(home)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (path for name in names if not name.startswith(".") and (path := Path(home, name)).is_file())


def fingerprint(contents: list[str], *extra: str, names: Sequence[str] = ()) -> str:
    """One hash of the files' contents, in their order.

    Args:
      names: of the files, which were hashed too before the same text under another name counted as the same.
    """
    digest = hashlib.sha256("\0".join(extra).encode())
    for content, name in zip(contents, names or [""] * len(contents), strict=True):
        digest.update(name.encode() + bytes.fromhex(content))
    return digest.hexdigest()[:16]


def contents(paths: Sequence[AnyPath], cache: Path) -> list[str]:
    """The SHA-256 of each file. One that has not been touched since it was last read is not read again.

    Args:
      cache: where it is kept what was read, and how the file was then.
    """
    home = cache / "digests.json"
    try:
        known = json.loads(home.read_text())
    except (OSError, json.JSONDecodeError):
        known = {}
    found_all, before = [], dict(known)
    for path in paths:
        if isinstance(path, Remote):  # what its store says of it, since it may be terabytes
            found_all.append(path.state())
            continue
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
        found_all.append(found)
    if known != before:
        home.parent.mkdir(parents=True, exist_ok=True)
        partial = home.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(known))
        partial.replace(home)
    return found_all


@contextlib.contextmanager
def opened(path: AnyPath) -> Iterator[BinaryIO]:
    """What is in a file, unpacked, as a stream of bytes: little of it is in memory at a time.

    Raises:
      InputError: it cannot be read, or is compressed and cut short or damaged; here, and while it is read inside.
    """
    packed = PACKED.get(path.suffix.lower())
    try:
        with path.open("rb") as raw:
            if packed == "zstd":
                yield io.BufferedReader(Zstd(raw), 2**20)
            elif packed:
                with {"gzip": gzip, "bz2": bz2, "xz": lzma}[packed].open(raw, "rb") as stream:
                    yield stream
            else:
                yield raw
    except (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, gzip.BadGzipFile) as e:
        raise InputError(f"{path} is cut short or damaged ({e}); copy it anew") from e
    except OSError as e:
        damaged = path.suffix.lower() in PACKED and e.errno is None
        raise InputError(
            f"{path} is damaged ({e}); copy it anew" if damaged else f"cannot read {path}: {e.strerror or e}"
        ) from e


def file_at(name: str) -> AnyPath:
    """One file that a field names, on a disk or behind a URL."""
    return Remote(name) if is_remote(name) else Path(name).expanduser()


def read_utf8(path: AnyPath) -> str:
    """The text of a file.

    Raises:
      InputError: the file cannot be read, or is not UTF-8; says which bytes and where.
    """
    return "".join(text_lines(path, "\n"))


def text_lines(path: AnyPath, newline: str = "") -> Iterator[str]:
    """The lines of a file with their ends, one in memory at a time.

    Args:
      newline: "" for the ends of any system, "\\n" for that alone.

    Raises:
      InputError: the file cannot be read, or is not UTF-8; says which bytes and where.
    """
    with text_stream(path, newline) as text:
        yield from text


@contextlib.contextmanager
def text_stream(path: AnyPath, newline: str = "\n") -> Iterator[io.TextIOWrapper]:
    """The text of a file, to be read in parts. Raises InputError as text_lines does."""
    try:
        with opened(path) as stream, io.TextIOWrapper(stream, "utf-8-sig", newline=newline) as text:
            yield text
    except UnicodeDecodeError as e:
        raise InputError(_where_not_utf8(path)) from e


def _where_not_utf8(path: AnyPath) -> str:
    """The first bytes of a file that are no UTF-8; it is read once more for that, if it is no pipe."""
    offset = 0
    with contextlib.nullcontext(()) if isinstance(path, Path) and not path.is_file() else opened(path) as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode()
            except UnicodeDecodeError as e:
                return (
                    f"{path} is not UTF-8: bytes {line[e.start : e.start + 4].hex(' ')} at offset {offset + e.start} "
                    f"(line {number}); convert it first, for example with iconv -f latin1 -t utf-8"
                )
            offset += len(line)
    return f"{path} is not UTF-8"


def records(path: AnyPath) -> Iterator[tuple[int, dict]]:
    """(line number, record) of a JSONL, CSV, TSV, parquet or array_record file, one in memory at a time.

    Raises:
      InputError: a line that is not a JSON object, a table whose rows have more cells than its header, or whose
        quotation marks do not match.
    """
    if kind(path) == ".parquet":
        yield from record_files.parquet(path)
        return
    if kind(path) == ".array_record":
        yield from record_files.array_record(path)
        return
    if kind(path) == ".jsonl":
        for number, line in enumerate(text_lines(path, "\n"), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as e:
                raise InputError(
                    f"{path}, line {number}: not JSON ({e.msg}): {line[:60].rstrip()!r}; write one object per line"
                ) from e
            if not isinstance(record, dict):
                raise InputError(f"{path}, line {number}: wanted a JSON object, got {line[:60].rstrip()!r}")
            yield number, record_files.whole_characters(record, line, f"{path}, line {number}")
        return
    header: list[str] | None = None
    for number, row in (tab_separated if kind(path) == ".tsv" else comma_separated)(path):
        if header is None:
            header = row
            if len(set(header)) < len(header):
                raise InputError(f"{path}: two columns of the header have the same name: {', '.join(header)}")
        elif len(row) > len(header):
            raise InputError(
                f"{path}, line {number}: {len(row)} cells, and the header names {len(header)} ({', '.join(header)}); "
                f"put the text between quotation marks, or write JSONL: {str(row)[:80]}"
            )
        else:
            yield number, dict(itertools.zip_longest(header, row))  # a row cut short has None


def extras_for(cfg: DataConfig) -> tuple[str, ...]:
    """Which of this package's optional dependencies reading a corpus needs, by the names of pyproject.toml."""
    names = [part.corpus for part in parts_of(cfg)]
    demo = ("demo",) if {"shakespeare", "bibles"} & set(names) else ()
    parquet = ("parquet",) if any(".parquet" in name.lower() for name in (*names, cfg.validation)) else ()
    return demo + parquet


def comma_separated(path: AnyPath, delimiter: str = ",") -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of every row that is not empty (RFC 4180)."""
    csv.field_size_limit(2**31 - 1)  # a document may be longer than the reader's 128 KiB
    rows = csv.reader(text_lines(path), strict=True, delimiter=delimiter)
    began = 1
    try:
        for row in rows:
            if row:
                yield rows.line_num, row
            began = rows.line_num + 1
    except csv.Error as e:
        raise InputError(f"{path}, line {began}: {e}; a quotation mark inside of quoted text is written twice") from e


def tab_separated(path: AnyPath) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of every row. Where each line has a cell for every column, a quotation mark is a character
    like others, but in a cell that only a CSV writer makes; else the file is a CSV writer's, with line breaks in its cells.
    The file is gone through twice.
    """

    def split() -> Iterator[tuple[int, list[str]]]:
        for number, line in enumerate(text_lines(path, "\n"), 1):
            if line.strip():
                yield number, line.removesuffix("\n").removesuffix("\r").split("\t")

    widths, marks, quoted = set(), False, None
    for _, cells in split():
        quoted = all(map(is_quoted, cells)) if quoted is None else quoted
        widths.add(len(cells))
        marks = marks or any('"' in cell for cell in cells)
    if len(widths) > 1 and marks:
        yield from comma_separated(path, "\t")
        return
    for number, cells in split():
        yield number, [c[1:-1].replace('""', '"') if is_quoted(c) and (quoted or '""' in c[1:-1]) else c for c in cells]


def is_quoted(cell: str) -> bool:
    """Whether a cell stands between quotation marks, and those inside of it are doubled."""
    return len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in cell[1:-1].replace('""', "")


def documents(paths: Sequence[AnyPath], text_field: str) -> Iterator[tuple[str, str]]:
    """(name, text): a plain-text file is one document, a long one in pieces, and so is each record of a table.

    Raises:
      InputError: unreadable files, or records without the field.
    """
    for path in paths:
        if kind(path) not in TABLES:
            with text_stream(path) as text:
                yield from pieces_of(path.name, text.read)
            continue
        for number, record in records(path):
            yield f"{path.name}:{number}", text_of(record, text_field, "--data.text-field", path, number)


def pairs(paths: Sequence[AnyPath], source_field: str, target_field: str) -> Iterator[tuple[str, str]]:
    """(name, text) of the records' sources and targets in turn: document 2i is a source, 2i + 1 its target.

    Raises:
      InputError: files without fields, records without these two, or an empty text.
    """
    for path in paths:
        if kind(path) not in TABLES:
            raise InputError(f"{path}: pairs of source and target come from {', '.join(TABLES)} files")
        for number, record in records(path):
            for field, flag in ((source_field, "--data.source-field"), (target_field, "--data.target-field")):
                text = text_of(record, field, flag, path, number)
                if not text.strip():
                    raise InputError(f"{path}, line {number}: the text under {field!r} is empty")
                yield f"{path.name}:{number}", text


def text_of(record: dict, field: str, flag: str, path: AnyPath, number: int) -> str:
    """Raises InputError if the record has no text under this name."""
    text = record.get(field)
    if not isinstance(text, str):
        raise InputError(
            f"{path}, line {number}: no text under {field!r}; the fields are "
            f"{', '.join(map(str, record))}; choose one with {flag}"
        )
    return text


def line_of(record: dict, columns: tuple[str, ...], path: AnyPath, number: int) -> str:
    """The texts under these columns with tabs between, of those after the first as many as there are.

    Raises:
      InputError: no text under the first, or a text that a line cannot hold.
    """
    text_of(record, columns[0], "a column of that name", path, number)
    texts = [record[name] for name in columns if isinstance(record.get(name), str)]
    for name, text in zip(columns, texts, strict=False):
        if not text.strip() or (len(columns) > 1 and "\t" in text):
            raise InputError(
                f"{path}, line {number}: the text under {name!r} is {'empty' if not text.strip() else 'cut by a tab'}"
            )
    return "\t".join(texts)
