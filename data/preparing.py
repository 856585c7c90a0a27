"""Preparing text: from a corpus to a directory of prepared text, in parts that are made in parallel and kept when it is
cut off (data/engine.py)."""

import dataclasses
import hashlib
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bothways.data import corpora, documents, files, mixture, mixture_config, prepared, tokens
from bothways.data.config import VOCABULARY_FILES, DataConfig
from bothways.data.corpora import Corpus
from bothways.data.engine import DONE, Engine, Part, Work, check_beam, engine
from bothways.data.prepared import SETTINGS
from bothways.data.stores import AnyPath, Folder, Remote
from bothways.data.tokenizer import Tokenizer
from bothways.errors import InputError

PARTS = 64
"""Small files are read together in about so many parts, which workers take in turn; a large file is a part of its own."""
PART_BYTES = (2**22, 2**26)
"""The smallest and the largest such part, unpacked."""
PACKED = 3
"""Bytes of text, roughly, for each byte of a compressed file."""
SHARD_TOKENS = 2**23
"""Tokens of a shard; a worker holds one of each split in memory."""


@dataclasses.dataclass(frozen=True)
class PreparedText:
    to: str
    tokens: int
    documents: int
    bytes: int
    shards: int
    seconds: float


def prepare_all(
    cfg: DataConfig, to: str, *, only: Collection[str] | None = None, **options: Any
) -> dict[str, PreparedText]:
    """What a configuration names, as tokens: of one corpus in a directory, as `prepare`; of a mixture, each corpus that is not
    prepared yet in a folder there (mixture_config.folders), all of one vocabulary.

    Args:
      only: these corpora of a mixture.
      options: of `prepare`.

    Returns:
      by corpus, what was made.

    Raises:
      InputError: as `prepare`; two corpora that are prepared with different vocabularies; all are prepared already.
    """
    there = mixture_config.folders(cfg, to)
    if not cfg.mixture:
        return {cfg.corpus: prepare(cfg, to, **options)}
    text = mixture.load(cfg, copied=False, only=only)
    tokenizer = mixture.obtain_tokenizer(cfg, text)
    raw = [(part, corpus) for part, corpus in zip(text.parts, text.corpora, strict=True) if not corpus.store]
    if not raw:
        raise InputError(f"all of data.mixture is prepared already: {cfg.named}")
    return {
        part.corpus: prepare(
            mixture_config.config_of(part, cfg), there[part.corpus], corpus=corpus, tokenizer=tokenizer, **options
        )
        for part, corpus in raw
    }


def prepare(
    cfg: DataConfig,
    to: str,
    *,
    workers: int = 1,
    beam: Sequence[str] = (),
    log: Callable[[str], None] = lambda _: None,
    corpus: Corpus | None = None,
    tokenizer: Tokenizer | None = None,
) -> PreparedText:
    """Tokens of a corpus in a directory, which other commands take as `data.corpus`.

    Args:
      to: a directory or a URL, empty, or with what an earlier call left there.
      workers: processes of this machine.
      beam: options of a runner of Apache Beam, such as --runner=DataflowRunner --project=...; workers are then its own.
      corpus: what the configuration names, where it is loaded already.
      tokenizer: the one to use, whatever the configuration names.

    Raises:
      InputError: text that cannot be read, a directory that holds something else, no Apache Beam.
    """
    began, folder = time.monotonic(), Folder(to)
    if cfg.messages_field:
        raise InputError("conversations need no preparing: train on them with --data.messages-field; leave it out here")
    if cfg.text_fields:
        raise InputError("sets of texts need no preparing: train on them with --data.text-fields; leave it out here")
    if beam:
        check_beam()
    found, names = None, folder.sizes()
    if "manifest.json" in names:
        found = prepared.read_manifest(folder)
    elif names and not folder.sizes(DONE):
        raise InputError(f"--to {to} holds {len(names)} file(s), such as {sorted(names)[0]}; give an empty directory")
    corpus = corpus or corpora.load(cfg, copied=False)
    if corpus.store:
        raise InputError(f"{cfg.corpus} is prepared already; train with --data.corpus {cfg.corpus}")
    if found is not None:
        other = tokenizer is not None and tokenizer.fingerprint != found.tokenizer_fingerprint
        same_text = found.source_fingerprint in (corpus.fingerprint, *corpus.earlier)
        if other or not same_text or not same_settings(found.settings, cfg):
            raise InputError(f"--to {to} holds other prepared text, or of another tokenizer; give an empty directory")
        if tokenizer is None and cfg.tokenizer.endswith(VOCABULARY_FILES):
            found.check_tokenizer(tokens.obtain_tokenizer(cfg, corpus))
        log(f"{to} is prepared already")
        return result_of(found, to, began)
    work = Work(cfg, folder, corpus.fingerprint)
    with engine(workers, beam) as run:
        write(corpus, work, run, tokenizer, log)
    folder.remove(DONE)
    return result_of(prepared.read_manifest(folder), to, began)


def write(corpus: Corpus, work: Work, run: Engine, tokenizer: Tokenizer | None, log: Callable[[str], None]) -> None:
    """Shards, tokenizer and manifest of a corpus."""
    cfg, folder, parts = work.cfg, work.to, parts_of(corpus, work, run, log)
    tokenizer = tokenizer or tokens.obtain_tokenizer(cfg, corpus)
    with tempfile.TemporaryDirectory() as home:
        tokenizer.save_in(Path(home))
        own = {path.name: path.read_bytes() for path in sorted(Path(home).iterdir())}
    for name, content in own.items():
        folder.write(f"{DONE}/{name}", content)
    key = hashlib.sha256(f"{corpus.fingerprint} {tokenizer.fingerprint} {prepared.FORMAT}".encode()).hexdigest()[:16]
    done = run(tokenise, dataclasses.replace(work, key=key, vocabulary=tuple(own)), parts)
    splits = {split: [shard for part in done for shard in part["shards"].get(split, [])] for split in Corpus.splits}
    if not splits["train"]:
        raise InputError(f"the corpus {cfg.corpus!r} is empty: no text to train on")
    for name, content in own.items():
        folder.write(name, content)
    text = {
        "name": corpus.name,
        "fingerprint": corpus.fingerprint,
        "dtype": tokens.dtype_for(tokenizer).str,
        "tokenizer": {
            "fingerprint": tokenizer.fingerprint,
            "files": list(own),
            "size": len(tokenizer),
            "bos": tokenizer.bos,
            "eos": tokenizer.eos,
        },
        "settings": settings_of(cfg),
        "source": {"corpus": cfg.corpus, "validation": cfg.validation, "files": len(corpus.paths)},
        "splits": {
            split: {name: sum(s[name] for s in shards) for name in ("tokens", "documents", "bytes")} | {"shards": shards}
            for split, shards in splits.items()
        },
    }
    prepared.write_manifest(folder, text)


def settings_of(cfg: DataConfig) -> dict[str, Any]:
    settings = {name: getattr(cfg, name) for name in SETTINGS}
    return settings | {"tokenizer": os.path.basename(cfg.tokenizer)}


def same_settings(settings: dict[str, Any], cfg: DataConfig) -> bool:
    return settings == settings_of(cfg)


def result_of(text: prepared.Prepared, to: str, began: float) -> PreparedText:
    every = [shard for shards in text.splits.values() for shard in shards]
    counts = (sum(getattr(shard, name) for shard in every) for name in ("tokens", "documents", "bytes"))
    return PreparedText(to, *counts, len(every), time.monotonic() - began)


# ---- parts ---------------------------------------------------------------------------------------------------------


def parts_of(corpus: Corpus, work: Work, run: Engine, log: Callable[[str], None]) -> list[Part]:
    """The parts of the work. Documents of files are counted first, in parallel: which are held out goes by their number."""
    if not corpus.paths:
        return [Part(i, splits=(split,)) for i, split in enumerate(Corpus.splits)]
    sizes = [size_of(path) for path in corpus.paths]
    enough = min(max(sum(sizes) // PARTS, PART_BYTES[0]), PART_BYTES[1])  # whatever the workers: they may change
    groups, filled = [[]], 0
    for path, size in zip(corpus.paths, sizes, strict=True):
        if filled >= enough:
            groups, filled = [*groups, []], 0
        groups[-1].append(path)
        filled += size
    parts = [Part(i, tuple(group)) for i, group in enumerate(groups)]
    log(f"counts the documents of {len(corpus.paths)} file(s) in {len(parts)} part(s)")
    counts = [done["documents"] for done in run(count, work, parts)]
    if sum(counts) < documents.FEW_DOCUMENTS and not work.cfg.source_field:
        return [Part(0, splits=Corpus.splits)]  # where few are cut is found out once
    firsts = np.cumsum([0, *counts])
    return [dataclasses.replace(part, first=int(first)) for part, first in zip(parts, firsts, strict=False)]


def size_of(path: AnyPath) -> int:
    """Bytes of its text, roughly."""
    size = path.size() if isinstance(path, Remote) else path.stat().st_size
    return size * (PACKED if path.suffix.lower() in files.PACKED else 1)


def count(work: Work, part: Part) -> dict[str, Any]:
    """How many documents, sources and targets each of their own, its files hold."""
    found = corpora.read(part.paths, work.cfg)
    return {"documents": sum(not documents.continues(name) for name, _ in found)}


def tokenise(work: Work, part: Part) -> dict[str, Any]:
    """Writes the shards of a part; their descriptions, by split."""
    with tempfile.TemporaryDirectory() as home:
        for name in work.vocabulary:  # not what an earlier call with another tokenizer left there
            (Path(home) / name).write_bytes(work.to.read(f"{DONE}/{name}"))
        tokenizer = Tokenizer.load(Path(home))
    paired = bool(work.cfg.source_field)
    if part.splits:
        corpus = corpora.load(work.cfg, copied=False)
        found = {split: write_shards(work, part, split, corpus.documents(split), tokenizer) for split in part.splits}
        return {"shards": found}
    shards: dict[str, list[dict]] = {}
    writers: dict[str, ShardWriter] = {s: ShardWriter(work, part, s, tokenizer, paired) for s in Corpus.splits}
    texts = corpora.read(part.paths, work.cfg)
    for number, (name, text) in documents.numbered(texts if paired else documents.in_pieces(texts), part.first):
        writers[documents.held_out_in(number, paired)].add(name, text)
    for split, writer in writers.items():
        shards[split] = writer.finished()
    return {"shards": shards}


def write_shards(work: Work, part: Part, split: str, texts: documents.Documents, tokenizer: Tokenizer) -> list[dict]:
    writer = ShardWriter(work, part, split, tokenizer, bool(work.cfg.source_field))
    for name, text in texts:
        writer.add(name, text)
    return writer.finished()


class ShardWriter:
    """Documents of one split of one part, into shards of about SHARD_TOKENS."""

    def __init__(self, work: Work, part: Part, split: str, tokenizer: Tokenizer, paired: bool):
        self.work, self.part, self.split = work, part, split
        self.encoder = tokens.Encoder(tokenizer, paired)
        self.shards: list[dict] = []
        self._begin()

    def _begin(self) -> None:
        self.ids, self.starts = bytearray(), bytearray()
        self.tokens = self.bytes = 0

    def add(self, name: str, text: str) -> None:
        if made := self.encoder.add(name, text):
            self._take(*made)

    def _take(self, ids: np.ndarray, starts: np.ndarray, size: int) -> None:
        self.ids += ids.tobytes()
        self.starts += (starts + self.tokens).astype("<i8").tobytes()
        self.tokens, self.bytes = self.tokens + len(ids), self.bytes + size
        if self.tokens >= SHARD_TOKENS:
            self._write()

    def _write(self) -> None:
        name = f"{self.split}-{self.part.number:05d}-{len(self.shards):03d}"
        self.work.to.write(f"{name}.ids", self.ids)
        self.work.to.write(f"{name}.starts", self.starts)
        self.shards.append(
            {
                "name": name,
                "tokens": self.tokens,
                "documents": len(self.starts) // 8,
                "bytes": self.bytes,
                "crc32": prepared.checksums(self.ids),
                "starts_crc32": zlib.crc32(self.starts),
            }
        )
        self._begin()

    def finished(self) -> list[dict]:
        """The descriptions of all shards, the last one written."""
        self._take(*self.encoder.flush())
        if self.tokens:
            self._write()
        return self.shards
