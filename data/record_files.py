"""Records of parquet files, and of array_record files: UTF-8 text, or JSON objects."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bothways.data.stores import AnyPath, Remote
from bothways.errors import InputError

AT_ONCE = 256
"""Records that are read together."""


def array_record(path: AnyPath) -> Iterator[tuple[int, dict]]:
    """(number, record) of a file, some in memory at a time; of plain text, the record {"text": it}.

    One behind a URL is copied to a temporary file first, since the library reads files of this machine alone.

    Raises:
      InputError: no array_record, a damaged one, or a record that is no UTF-8.
    """
    if isinstance(path, Remote):
        with path.open() as raw, tempfile.NamedTemporaryFile(suffix=".array_record") as here:
            shutil.copyfileobj(raw, here)
            here.flush()
            yield from _records(Path(here.name), path)
    else:
        yield from _records(path, path)


def _records(here: Path, path: AnyPath) -> Iterator[tuple[int, dict]]:
    try:
        from array_record.python.array_record_module import ArrayRecordReader
    except ImportError as e:
        raise InputError(f"{path}: reading array_record needs its package: pip install array-record") from e
    try:
        with contextlib.closing(ArrayRecordReader(str(here))) as reader:  # which says at its end that it was damaged
            count = reader.num_records()
            for begin in range(0, count, AT_ONCE):
                end = min(begin + AT_ONCE, count)
                batch = reader.read(begin, end)
                if len(batch) < end - begin:
                    raise RuntimeError(f"records {begin + 1} to {end} are damaged")
                for number, raw in enumerate(batch, begin + 1):
                    yield number, _record(raw, path, number)
    except RuntimeError as e:
        why = str(e).strip().partition("\n")[0][:160] or "it has no end"
        raise InputError(f"{path} is no whole array_record file ({why}); copy it anew") from e


def _record(raw: bytes, path: AnyPath, number: int) -> dict:
    try:
        text = raw.decode()
    except UnicodeDecodeError as e:
        raise InputError(
            f"{path}, record {number}: neither UTF-8 text nor JSON (bytes {raw[:8].hex(' ')}); a set of TFDS is named by its "
            "TFDS name, not by its files"
        ) from e
    if text.startswith("{"):
        with contextlib.suppress(json.JSONDecodeError):
            return whole_characters(json.loads(text), text, f"{path}, record {number}")
    return {"text": text}


def whole_characters(record: dict, raw: str, where: str) -> dict:
    """The record that this JSON says.

    Raises:
      InputError: it has half of a surrogate pair, as of text that was cut within an emoji: no tokenizer can encode it.
    """
    if "\\ud" in raw or "\\uD" in raw:
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError as e:
            half = ascii(e.object[e.start])[1:-1]
            raise InputError(
                f"{where}: {half} is half of a surrogate pair and no character; take it out, or add the other half"
            ) from e
    return record


def parquet(path: AnyPath) -> Iterator[tuple[int, dict]]:
    """(row number, record) of a parquet file, a batch of rows in memory at a time."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as e:
        raise InputError(f"{path}: reading parquet needs pyarrow: pip install 'bothways[parquet]'") from e
    number = 0
    try:
        with path.open("rb") as raw, pyarrow.parquet.ParquetFile(raw) as file:
            for batch in file.iter_batches(1024):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (pyarrow.ArrowInvalid, OSError) as e:
        raise InputError(f"{path} is no whole parquet file ({str(e).splitlines()[0][:160]}); copy it anew") from e
