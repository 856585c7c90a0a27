"""Documents out of text, JSONL, CSV, TSV and parquet files, compressed or not."""

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
from pathlib import Path

import fsspec
import zstandard

from bothways.data.config import DataConfig
from bothways.errors import InputError

SETTLED = 2_000_000_000
"""Nanoseconds after which a second change of a file cannot bear the same time as the first."""
PLAIN = (".txt", ".md", ".text")
TABLES = (".jsonl", ".csv", ".tsv", ".parquet")
PACKED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
"""Endings of compressed files, behind another one, and what fsspec calls them."""
SUFFIXES = (*PLAIN, *TABLES, *(kind + packed for kind in (*PLAIN, *TABLES[:3]) for packed in PACKED))
LOG = logging.getLogger("bothways")


def kind(path: Path) -> str:
    """How a file is read, by its ending in lower case; of a compressed file, by that before: `.jsonl` of a.JSONL.zst."""
    last = path.suffix.lower()
    return Path(path.stem).suffix.lower() if last in PACKED else last


def looks_like_files(pattern: str) -> bool:
    """Whether a corpus name means files, rather than a dataset's name."""
    return Path(pattern).expanduser().exists() or any(c in pattern for c in "*?[") or pattern.lower().endswith(SUFFIXES)


def matching(pattern: str, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """The files that a path or glob names, sorted; of a directory, every file of a known kind, through links too.

    What a directory holds besides is left out, and a warning says what.

    Raises:
      InputError: there are none.
    """
    path = Path(pattern).expanduser()
    if path.is_dir():
        every = list(inside(path))
        found = [p for p in every if kind(p) in suffixes]
        others = sorted({kind(p) or p.name for p in every} - set(suffixes))
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


def contents(paths: list[Path], cache: Path) -> list[str]:
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


def read_bytes(path: Path) -> bytes:
    """What is in a file, unpacked. Raises InputError if it cannot be read, or is compressed and cut short or damaged."""
    packed = PACKED.get(path.suffix.lower())
    try:
        if packed == "zstd":
            return unpack_zstd(path.read_bytes())
        with fsspec.open(str(path), "rb", compression=packed) as f:
            return f.read()
    except (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, gzip.BadGzipFile) as e:
        raise InputError(f"{path} is cut short or damaged ({e}); copy it anew") from e
    except OSError as e:
        damaged = path.suffix.lower() in PACKED and e.errno is None
        raise InputError(
            f"{path} is damaged ({e}); copy it anew" if damaged else f"cannot read {path}: {e.strerror}"
        ) from e


def unpack_zstd(raw: bytes) -> bytes:
    """All frames of a .zst. Raises EOFError if the last has no end: the library's own reader takes that for the end of
    the text, and the end of the first frame too."""
    parts = []
    while raw:
        frame = zstandard.ZstdDecompressor().decompressobj()
        parts.append(frame.decompress(raw))
        if not frame.eof:
            raise EOFError("the last frame has no end")
        raw = frame.unused_data
    return b"".join(parts)


def read_utf8(path: Path) -> str:
    """The text of a file.

    Raises:
      InputError: the file cannot be read, or is not UTF-8; says which bytes and where.
    """
    raw = read_bytes(path)
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
      InputError: a line that is not a JSON object, a table whose rows have more cells than its header, or whose
        quotation marks do not match.
    """
    if kind(path) == ".parquet":
        yield from parquet_records(path)
        return
    text = read_utf8(path)
    if kind(path) == ".jsonl":
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
        return
    header: list[str] | None = None
    for number, row in (tab_separated if kind(path) == ".tsv" else comma_separated)(text, path):
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
    demo = ("demo",) if cfg.corpus in ("shakespeare", "bibles") else ()
    parquet = ("parquet",) if any(".parquet" in name.lower() for name in (cfg.corpus, cfg.validation)) else ()
    return demo + parquet


def parquet_records(path: Path) -> Iterator[tuple[int, dict]]:
    """(row number, record) of a parquet file, a batch of rows in memory at a time."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as e:
        raise InputError(f"{path}: reading parquet needs pyarrow: pip install 'bothways[parquet]'") from e
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (pyarrow.ArrowInvalid, OSError) as e:
        raise InputError(f"{path} is no whole parquet file ({str(e).splitlines()[0][:160]}); copy it anew") from e


def comma_separated(text: str, path: Path, delimiter: str = ",") -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of every row that is not empty (RFC 4180)."""
    csv.field_size_limit(2**31 - 1)  # a document may be longer than the reader's 128 KiB
    rows = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    began = 1
    try:
        for row in rows:
            if row:
                yield rows.line_num, row
            began = rows.line_num + 1
    except csv.Error as e:
        raise InputError(f"{path}, line {began}: {e}; a quotation mark inside of quoted text is written twice") from e


def tab_separated(text: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of every row. Where each line has a cell for every column, a quotation mark is a character
    like others, but in a cell that only a CSV writer makes; else the file is a CSV writer's, with line breaks in its cells.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    rows = [(number, line.split("\t")) for number, line in enumerate(lines, 1) if line.strip()]
    if len({len(cells) for _, cells in rows}) > 1 and '"' in text:
        yield from comma_separated(text, path, "\t")
        return
    quoted = bool(rows) and all(is_quoted(cell) for cell in rows[0][1])
    for number, cells in rows:
        yield number, [c[1:-1].replace('""', '"') if is_quoted(c) and (quoted or '""' in c[1:-1]) else c for c in cells]


def is_quoted(cell: str) -> bool:
    """Whether a cell stands between quotation marks, and those inside of it are doubled."""
    return len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in cell[1:-1].replace('""', "")


def documents(paths: list[Path], text_field: str) -> Iterator[tuple[str, str]]:
    """(name, text): a plain-text file is one document, and so is each record of a JSONL, CSV or TSV file.

    Raises:
      InputError: unreadable files, or records without the field.
    """
    for path in paths:
        if kind(path) not in TABLES:
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
        if kind(path) not in TABLES:
            raise InputError(f"{path}: pairs of source and target come from {', '.join(TABLES)} files")
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


def line_of(record: dict, columns: tuple[str, ...], path: Path, number: int) -> str:
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
