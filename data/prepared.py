"""Prepared text: a directory, on a disk or a bucket, of token ids that describes itself. docs/data.md has the format.

manifest.json            what there is: splits, shards, counts, checksums, source; written last
tokenizer.model          or tokenizer.json and tokenizer_config.json
train-00000-000.ids      a shard's token ids, one after the other, little-endian, of the manifest's dtype
train-00000-000.starts   where its documents begin among them, little-endian 8-byte integers
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bothways.data.config import VOCABULARY_FILES, DataConfig
from bothways.data.documents import CONTINUED
from bothways.data.stores import Folder
from bothways.data.tokenizer import Tokenizer
from bothways.errors import InputError

FORMAT = 1
BLOCK = 2**20
"""Bytes of a shard that have a checksum of their own, and are read from a store at once."""
WHOLE = 2**31
"""A split with up to so many bytes of ids is fetched whole, its rows fully shuffled; of a larger one, blocks are read."""
FETCHES = 8
"""Requests that are under way at a time."""
SETTINGS = ("tokenizer", "vocab_size", "text_field", "source_field", "target_field")


@dataclasses.dataclass(frozen=True)
class Shard:
    name: str
    """Of its files, without .ids and .starts."""
    tokens: int
    documents: int
    bytes: int
    """UTF-8 bytes of its text."""
    crc32: tuple[int, ...]
    """Of each BLOCK of ids."""
    starts_crc32: int


def checksums(ids: bytes | bytearray) -> tuple[int, ...]:
    return tuple(zlib.crc32(ids[i : i + BLOCK]) for i in range(0, len(ids), BLOCK))


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A directory of prepared text, opened."""

    folder: Folder
    name: str
    source_fingerprint: str
    """The fingerprint of the text, as if it were read where it came from."""
    tokenizer_fingerprint: str
    tokenizer_files: tuple[str, ...]
    settings: dict[str, Any]
    dtype: np.dtype
    splits: dict[str, tuple[Shard, ...]]
    cache_bytes: int = 0
    """Of a cache on disk, for a split that is not fetched whole."""

    @property
    def fingerprint(self) -> str:
        """Of the text and its order: rows of a large text come in another order than those of the same text in files."""
        return self.source_fingerprint + ("-blocks" if self.is_large("train") else "")

    @property
    def paired(self) -> bool:
        return bool(self.settings["source_field"])

    def size(self, split: str) -> int:
        return sum(shard.tokens for shard in self.splits[split]) * self.dtype.itemsize

    def is_large(self, split: str) -> bool:
        return self.size(split) > WHOLE

    # ---- its tokenizer -------------------------------------------------------------------------------------------------

    def own_tokenizer(self) -> Tokenizer:
        with tempfile.TemporaryDirectory() as home:
            for name in self.tokenizer_files:
                (Path(home) / name).write_bytes(self.folder.read(name))
            try:
                found = Tokenizer.load(Path(home))
            except InputError as e:
                raise InputError(
                    f"{self.folder}/{self.tokenizer_files[0]} is altered or cut short; prepare the text anew"
                ) from e
        if found.fingerprint != self.tokenizer_fingerprint:
            raise InputError(f"{self.folder}: its tokenizer is not the one of its manifest; prepare the text anew")
        return found

    def tokenizer(self, cfg: DataConfig) -> Tokenizer:
        """The tokenizer that the text was prepared with. Raises InputError if the configuration names another."""
        if cfg.tokenizer.endswith(VOCABULARY_FILES):
            self.check_tokenizer(Tokenizer.load(_path(cfg.tokenizer)))
        else:
            kind, size = self.settings["tokenizer"], self.settings["vocab_size"]
            if not kind.endswith(VOCABULARY_FILES) and (kind, size) != (cfg.tokenizer, cfg.vocab_size):
                raise InputError(
                    f"{self.folder} was prepared with data.tokenizer={kind} data.vocab_size={size}, and this recipe has "
                    f"{cfg.tokenizer} and {cfg.vocab_size}; set --data.tokenizer {kind} --data.vocab-size {size}, or "
                    "prepare the text again"
                )
        return self.own_tokenizer()

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raises InputError if the text was prepared with another tokenizer."""
        if tokenizer.fingerprint != self.tokenizer_fingerprint:
            raise InputError(
                f"{self.folder} was prepared with another tokenizer ({self.tokenizer_fingerprint}) than this run's "
                f"({tokenizer.fingerprint}); prepare the text with this one: --data.tokenizer FILE"
            )

    # ---- its text ------------------------------------------------------------------------------------------------------

    def blocks(self, split: str) -> list[tuple[Shard, int]]:
        """(shard, number in it) of every block of a split."""
        return [(shard, i) for shard in self.splits[split] for i in range(len(shard.crc32))]

    def block(self, shard: Shard, number: int) -> bytes:
        """The bytes of a block. Raises InputError if they are missing, cut short or altered."""
        begin, name = number * BLOCK, f"{shard.name}.ids"
        found = self.folder.read(name, begin, min(begin + BLOCK, shard.tokens * self.dtype.itemsize))
        if zlib.crc32(found) != shard.crc32[number]:
            raise InputError(
                f"{self.folder}/{name} is altered: bytes from {begin} on have another checksum than its manifest says"
            )
        return found

    def starts(self, shard: Shard) -> np.ndarray:
        """[documents] where they begin in the shard."""
        found = self.folder.read(f"{shard.name}.starts", 0, 8 * shard.documents)
        if zlib.crc32(found) != shard.starts_crc32:
            raise InputError(f"{self.folder}/{shard.name}.starts is altered: its checksum is not that of its manifest")
        return np.frombuffer(found, "<i8")

    def pieces(self, split: str) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """Ids, starts of documents among them, and bytes of text, of each shard in turn, read by several requests at a time."""
        with concurrent.futures.ThreadPoolExecutor(FETCHES) as pool:
            for shard in self.splits[split]:
                starts = pool.submit(self.starts, shard)
                ids = pool.map(lambda i, shard=shard: self.block(shard, i), range(len(shard.crc32)))
                yield np.frombuffer(b"".join(ids), self.dtype), starts.result(), shard.bytes

    def open(self, split: str, cache: Path) -> Any:
        """The tokens of a large split: blocks are read when they are wanted."""
        from bothways.data.blocks import open_blocks

        return open_blocks(self, split, cache)

    def documents(self, split: str) -> Iterator[tuple[str, str]]:
        """(name, text) of every document, decoded; one that goes on in the next shard in pieces (data/documents.py)."""
        tokenizer = self.own_tokenizer()
        for shard in self.splits[split]:
            ids = np.frombuffer(b"".join(self.block(shard, i) for i in range(len(shard.crc32))), self.dtype)
            starts = self.starts(shard)
            begins = starts if len(starts) and starts[0] == 0 else np.concatenate([[0], starts])
            for number, document in enumerate(np.split(ids, begins[1:])):
                name = f"{shard.name}:{number}"
                inside = document[int(document[0] == tokenizer.bos) : len(document) - int(document[-1] == tokenizer.eos)]
                goes_on = number == 0 and len(begins) > len(starts)
                yield name + (CONTINUED if goes_on else ""), tokenizer.decode(inside)


def _path(name: str) -> Any:
    from etils import epath

    return epath.Path(name).expanduser()


def at(cfg: DataConfig) -> Prepared | None:
    """The prepared text that a configuration names; None where it names something else.

    Raises:
      InputError: a manifest of another version, altered or cut short, shards that are missing or cut short; text of
        other fields, or held-out text beside its own.
    """
    folder = Folder(cfg.corpus)
    if not folder.could_be() or not folder.exists("manifest.json"):
        return None
    found = read_manifest(folder)
    if cfg.validation:
        raise InputError(f"{folder} is prepared and has its own held-out text; leave out data.validation")
    if found.paired != bool(cfg.source_field):
        fields = (
            f"{found.settings['source_field']} and {found.settings['target_field']}" if found.paired else "plain text"
        )
        raise InputError(
            f"{folder} is prepared from {fields}, and this recipe has data.source_field={cfg.source_field!r}; "
            + ("set both fields" if found.paired else "leave the field out")
        )
    return dataclasses.replace(found, cache_bytes=cfg.cache_gb * 10**9)


def read_manifest(folder: Folder) -> Prepared:
    where = f"{folder}/manifest.json"
    try:
        values = json.loads(folder.read("manifest.json"))
        if values["format"] != FORMAT:
            raise InputError(f"{where} has format {values['format']}, and this version of bothways reads {FORMAT}")
        checksum = values.pop("checksum")
        if checksum != _checksum(values):
            raise InputError(f"{where} is altered: its checksum is another; prepare the text anew")
        splits = {
            split: tuple(Shard(**shard | {"crc32": tuple(shard["crc32"])}) for shard in part["shards"])
            for split, part in values["splits"].items()
        }
        tokenizer = values["tokenizer"]
        found = Prepared(
            folder,
            values["name"],
            values["fingerprint"],
            tokenizer["fingerprint"],
            tuple(tokenizer["files"]),
            values["settings"],
            np.dtype(values["dtype"]),
            splits,
        )
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as e:
        raise InputError(f"{where} is no manifest of prepared text, or is cut short ({e}); prepare the text anew") from e
    sizes = folder.sizes()
    for shards in splits.values():
        for shard in shards:
            for name, size in (
                (f"{shard.name}.ids", shard.tokens * found.dtype.itemsize),
                (f"{shard.name}.starts", 8 * shard.documents),
            ):
                if sizes.get(name) != size:
                    got = f"has {sizes[name]:,} bytes" if name in sizes else "is missing"
                    raise InputError(
                        f"{folder}/{name} {got}, and its manifest says {size:,}; copy it anew, or prepare anew"
                    )
    return found


def write_manifest(folder: Folder, values: dict[str, Any]) -> None:
    values = {"format": FORMAT, "block_bytes": BLOCK} | values
    folder.write("manifest.json", json.dumps(values | {"checksum": _checksum(values)}, indent=1).encode())


def _checksum(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
