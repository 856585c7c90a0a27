"""Preparing text: from a corpus to a directory of prepared text, in parts that are made in parallel and kept when it is
cut off. The engine is Apache Beam where there is more than one worker."""

import dataclasses
import functools
import hashlib
import json
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bothways.data import corpora, documents, files, mixture, mixture_config, prepared, tokens
from bothways.data import tokenizer as tokenizers
from bothways.data.config import DataConfig
from bothways.data.corpora import Corpus
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
SHARD_TOKENS = 2**24
"""Tokens of a shard; a worker holds one of each split in memory."""
DONE = "parts"
"""The folder in which finished parts are written down until all are."""


@dataclasses.dataclass(frozen=True)
class PreparedText:
    to: str
    tokens: int
    documents: int
    bytes: int
    shards: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the work. Either files whose documents are dealt to splits by their number, from `first` on; or a split."""

    number: int
    paths: tuple[AnyPath, ...] = ()
    first: int = 0
    split: str = ""


@dataclasses.dataclass(frozen=True)
class Work:
    """What a worker must know."""

    cfg: DataConfig
    to: Folder
    key: str
    """Of the text and the tokenizer: what was done under another key is not used."""


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
    raw = [part for part, corpus in zip(text.parts, text.corpora, strict=True) if not corpus.store]
    if not raw:
        raise InputError(f"all of data.mixture is prepared already: {cfg.named}")
    return {
        part.corpus: prepare(mixture_config.config_of(part, cfg), there[part.corpus], tokenizer=tokenizer, **options)
        for part in raw
    }


def prepare(
    cfg: DataConfig,
    to: str,
    *,
    workers: int = 1,
    beam: Sequence[str] = (),
    log: Callable[[str], None] = lambda _: None,
    tokenizer: Tokenizer | None = None,
) -> PreparedText:
    """Tokens of a corpus in a directory, which other commands take as `data.corpus`.

    Args:
      to: a directory or a URL, empty, or with what an earlier call left there.
      workers: processes; of more than one, Apache Beam's.
      beam: options of another runner of Beam, such as --runner=DataflowRunner --project=...; workers are then its own.
      tokenizer: the one to use, whatever the configuration names.

    Raises:
      InputError: text that cannot be read, a directory that holds something else, no Apache Beam.
    """
    began, folder = time.monotonic(), Folder(to)
    if cfg.messages_field:
        raise InputError("conversations need no preparing: train on them with --data.messages-field; leave it out here")
    if workers > 1 or beam:
        check_beam()
    found, names = None, folder.sizes()
    if "manifest.json" in names:
        found = prepared.read_manifest(folder)
    elif names and not folder.sizes(DONE):
        raise InputError(f"--to {to} holds {len(names)} file(s), such as {sorted(names)[0]}; give an empty directory")
    corpus = corpora.load(cfg, copied=False)
    if corpus.store:
        raise InputError(f"{cfg.corpus} is prepared already; train with --data.corpus {cfg.corpus}")
    if found is not None:
        other = tokenizer is not None and tokenizer.fingerprint != found.tokenizer_fingerprint
        if other or found.source_fingerprint != corpus.fingerprint or not same_settings(found.settings, cfg):
            raise InputError(f"--to {to} holds other prepared text, or of another tokenizer; give an empty directory")
        log(f"{to} is prepared already")
        return result_of(found, to, began)
    engine = functools.partial(run_in_parallel, workers=workers, options=beam)
    work = Work(cfg, folder, corpus.fingerprint)
    parts = parts_of(corpus, work, engine, log)
    tokenizer = tokenizer or tokens.obtain_tokenizer(cfg, corpus)
    with tempfile.TemporaryDirectory() as home:
        tokenizer.save_in(Path(home))
        own = {path.name: path.read_bytes() for path in sorted(Path(home).iterdir())}
    for name, content in own.items():
        folder.write(f"{DONE}/{name}", content)
    key = hashlib.sha256(f"{corpus.fingerprint} {tokenizer.fingerprint} {prepared.FORMAT}".encode()).hexdigest()[:16]
    done = engine(tokenise, dataclasses.replace(work, key=key), parts)
    splits = {split: [shard for part in done for shard in part["shards"].get(split, [])] for split in Corpus.splits}
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
    if not splits["train"]:
        raise InputError(f"the corpus {cfg.corpus!r} is empty: no text to train on")
    prepared.write_manifest(folder, text)
    folder.remove(DONE)
    return result_of(prepared.read_manifest(folder), to, began)


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


def parts_of(corpus: Corpus, work: Work, engine: Callable[..., list[dict]], log: Callable[[str], None]) -> list[Part]:
    """The parts of the work. Documents of files are counted first, in parallel: which are held out goes by their number."""
    by_split = [Part(i, split=split) for i, split in enumerate(Corpus.splits)]
    if not corpus.paths:
        return by_split
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
    counts = [done["documents"] for done in engine(count, work, parts)]
    if sum(counts) < documents.FEW_DOCUMENTS and not work.cfg.source_field:
        return by_split
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
        for name in work.to.sizes(DONE):
            if name.startswith("tokenizer"):
                (Path(home) / name).write_bytes(work.to.read(f"{DONE}/{name}"))
        tokenizer = Tokenizer.load(Path(home))
    paired = bool(work.cfg.source_field)
    if part.split:
        texts = corpora.load(work.cfg, copied=False).documents(part.split)
        return {"shards": {part.split: write_shards(work, part, part.split, texts, tokenizer)}}
    shards: dict[str, list[dict]] = {}
    writers: dict[str, ShardWriter] = {s: ShardWriter(work, part, s, tokenizer, paired) for s in Corpus.splits}
    for number, (name, text) in documents.numbered(in_order(part, work.cfg), part.first):
        writers[documents.held_out_in(number, paired)].add(name, text)
    for split, writer in writers.items():
        shards[split] = writer.finished()
    return {"shards": shards}


def in_order(part: Part, cfg: DataConfig) -> documents.Documents:
    """The documents of a part's files, long ones in pieces."""
    found = corpora.read(part.paths, cfg)
    return found if cfg.source_field else documents.in_pieces(found)


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
        self.ids: list[np.ndarray] = []
        self.starts: list[np.ndarray] = []
        self.tokens = self.bytes = 0

    def add(self, name: str, text: str) -> None:
        if made := self.encoder.add(name, text):
            self._take(*made)

    def _take(self, ids: np.ndarray, starts: np.ndarray, size: int) -> None:
        self.ids.append(ids)
        self.starts.append(starts + self.tokens)
        self.tokens, self.bytes = self.tokens + len(ids), self.bytes + size
        if self.tokens >= SHARD_TOKENS:
            self._write()

    def _write(self) -> None:
        name = f"{self.split}-{self.part.number:05d}-{len(self.shards):03d}"
        ids = np.concatenate(self.ids).tobytes()
        starts = np.concatenate(self.starts).astype("<i8").tobytes()
        self.work.to.write(f"{name}.ids", ids)
        self.work.to.write(f"{name}.starts", starts)
        self.shards.append(
            {
                "name": name,
                "tokens": self.tokens,
                "documents": len(starts) // 8,
                "bytes": self.bytes,
                "crc32": prepared.checksums(ids),
                "starts_crc32": zlib.crc32(starts),
            }
        )
        self._begin()

    def finished(self) -> list[dict]:
        """The descriptions of all shards, the last one written."""
        self._take(*self.encoder.flush())
        if self.tokens:
            self._write()
        return self.shards


# ---- the engine ----------------------------------------------------------------------------------------------------


def check_beam() -> None:
    """Raises InputError where Apache Beam is not installed."""
    try:
        import apache_beam  # noqa: F401
    except ImportError as e:
        raise InputError("more than one worker is Apache Beam's: pip install 'bothways[prepare]', or --workers 1") from e


def run_in_parallel(
    function: Callable[[Work, Part], dict], work: Work, parts: Sequence[Part], *, workers: int, options: Sequence[str]
) -> list[dict]:
    """What a function gives for each part. Each is written down where the work goes, and not done again."""
    where = {part.number: f"{DONE}/{function.__name__}-{part.number:05d}.json" for part in parts}
    step = functools.partial(one, function, work)
    known = work.to.sizes(DONE)

    def is_done(part: Part) -> bool:
        name = where[part.number]
        return os.path.basename(name) in known and "result" in (finished(work, part, name) or {})

    missing = [part for part in parts if not is_done(part)]
    if (workers <= 1 and not options) or len(missing) <= 1:
        for part in missing:
            step(part)
    elif missing:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions

        here = ["--runner=DirectRunner", "--direct_running_mode=multi_processing", f"--direct_num_workers={workers}"]
        here += ["--default_sdk_harness_log_level=ERROR"]  # or each worker writes a page about itself
        with beam.Pipeline(options=PipelineOptions(list(options) or here)) as pipeline:
            _ = pipeline | beam.Create(missing) | beam.Reshuffle() | beam.Map(step)
    done = []
    for part in parts:
        result = finished(work, part, where[part.number]) or {
            "error": f"part {part.number} was not finished; run it again"
        }
        if "error" in result:
            raise InputError(result["error"])
        done.append(result["result"])
    return done


def one(function: Callable[[Work, Part], dict], work: Work, part: Part) -> None:
    """Does one part in a worker. What is wrong with the text is written down too, for the process that waits."""
    try:
        with tokenizers.one_thread():  # a worker is one core
            result = {"result": function(work, part)}
    except InputError as e:
        result = {"error": str(e)}
    name = f"{DONE}/{function.__name__}-{part.number:05d}.json"
    work.to.write(name, json.dumps({"key": key_of(work, part)} | result).encode())


def finished(work: Work, part: Part, name: str) -> dict | None:
    """What was written down of a part; None where it is of other work."""
    try:
        found = json.loads(work.to.read(name))
    except (InputError, json.JSONDecodeError):
        return None
    return found if found.get("key") == key_of(work, part) else None


def key_of(work: Work, part: Part) -> str:
    """What was done under another key is not used."""
    return f"{work.key} {part.number} {part.first} {part.split} {len(part.paths)}"
