"""Corpora: named splits of documents, prepared once through TFDS as array_record files."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bothways.data import bibles, contrasts, conversations, files, plays
from bothways.data import prepared as prepared_text
from bothways.data.config import DataConfig
from bothways.data.documents import SPLITS, Again, Documents, hold_out, in_pieces, with_text
from bothways.data.in_order import InOrder
from bothways.errors import InputError
from bothways.locks import locked

if TYPE_CHECKING:
    from bothways.data.prepared import Prepared

MOST_COPIED = 2**26
"""Bytes of uncompressed files on a disk that are copied into the cache: more take longer to copy than to read again."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text under a name. `fingerprint` changes when the text does."""

    name: str
    fingerprint: str
    read: Callable[[str], Documents]
    splits: tuple[str, ...] = SPLITS
    earlier: tuple[str, ...] = ()
    """Fingerprints that the same text had in runs of older versions."""
    paired: bool = False
    """Document 2i is a source, 2i + 1 its target."""
    conversations: bool = False
    """Documents are conversations (data/conversations.py)."""
    sides: int = 0
    """Documents are sets of so many texts to be told apart (data/contrasts.py); 0: they are not."""
    prompts: tuple[str, str] = ("", "")
    """What is put before the first text of such a set, and before its others."""
    store: "Prepared | None" = None
    """Where its tokens are, of text that is prepared (data/prepared.py)."""
    paths: tuple[files.AnyPath, ...] = ()
    """The files that it is read from, where its splits are drawn from all of them by `held_out_in`."""

    def documents(self, split: str) -> Documents:
        """(name, text) of every document of a split, long ones in pieces (data/documents.py)."""
        whole = self.paired or self.conversations or self.sides
        return self.read(split) if whole else in_pieces(self.read(split))


@contextlib.contextmanager
def quiet_tfds() -> Iterator[Any]:
    """TFDS without its progress bars and warnings, and on array_record, so that it needs no TensorFlow.

    Everything that is changed for it is put back: other code of the process may use TFDS too.
    """
    silent = "TF_CPP_MIN_LOG_LEVEL" not in os.environ  # read when a library of TensorFlow's is loaded
    if silent:
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import downloader
    from tensorflow_datasets.core.utils import tqdm_utils

    retries, bars = downloader.MAX_RETRIES, tqdm_utils._active
    downloader.MAX_RETRIES = 1  # where there is no network, say so within seconds
    tfds.disable_progress_bar()
    loggers = [logging.getLogger(name) for name in ("absl", "urllib3")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(None):
            yield tfds
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        downloader.MAX_RETRIES = retries
        tfds.display_progress_bar(bars)
        if silent:
            os.environ.pop("TF_CPP_MIN_LOG_LEVEL", None)


def prepared(name: str, key: str, splits: Callable[[], Mapping[str, Iterable[tuple[str, str]]]], cache: Path) -> Corpus:
    """A corpus written once to `cache` by a TFDS builder whose config is named after `key`, and read back.

    `splits` is asked for only where nothing is prepared yet. TFDS reuses a prepared directory by its name alone; the
    key in the name is what makes a changed file count.
    """
    with quiet_tfds() as tfds:

        class Text(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            """Documents: a name and a text."""

            VERSION = tfds.core.Version("1.0.0")
            name = "text"

            def _info(self):
                features = {"name": tfds.features.Text(), "text": tfds.features.Text()}
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
                )

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(documents) for split, documents in found.items()}

            def _generate_examples(self, documents):
                for i, (document, text) in enumerate(documents):
                    yield i, {"name": document, "text": text}

        config = tfds.core.BuilderConfig(name=f"{name}-{key}", version="1.0.0")
        with locked(cache / "tfds" / f".{name}-{key}.lock", f"prepares {name} in {cache}"):
            # Made here, since it looks for what is prepared only once.
            builder = Text(data_dir=str(cache / "tfds"), config=config, file_format="array_record")
            found = {} if builder.data_path.exists() else splits()
            from tensorflow_datasets.core import shuffle

            own, shuffle.Shuffler = shuffle.Shuffler, InOrder
            try:
                builder.download_and_prepare()  # of two at once the second would fail at its end
            finally:
                shuffle.Shuffler = own

    def read(split: str) -> Documents:
        for record in builder.as_data_source(split):
            yield record["name"].decode(), record["text"].decode()

    return Corpus(name, key, read)


def load(cfg: DataConfig, *, copied: bool = True) -> Corpus:
    """The corpus that a configuration names.

    Args:
      copied: text of files is copied once into the cache, and read from there, unless it is quicker to read where it lies;
        else it is read where it lies.

    Raises:
      InputError: no such corpus, unreadable or empty files, a dataset that cannot be had here (and why).
    """
    if cfg.mixture:
        raise InputError(
            f"one corpus is read here, and data.mixture has {len(cfg.mixture)}; set --data.corpus to one of them"
        )
    cache = Path(cfg.cache).expanduser()
    if cfg.messages_field:
        corpus = from_conversations(cfg, cache, copied)
    elif cfg.corpus == "shakespeare":
        found = list(plays.plays())
        key = hashlib.sha256("\0".join(text for _, _, text in found).encode()).hexdigest()[:16]

        def splits() -> dict[str, Documents]:
            parts: dict[str, list[tuple[str, str]]] = {split: [] for split in Corpus.splits}
            for name, _, text in found:
                parts[plays.split_of(name)].append((name, text))
            return {split: iter(part) for split, part in parts.items()}

        corpus = prepared("shakespeare", key, splits, cache)
    elif cfg.corpus == "bibles":
        corpus = from_bibles(cfg, cache)
    elif store := prepared_text.at(cfg):
        corpus = Corpus(store.name, store.fingerprint, store.documents, store=store)
    elif cfg.corpus.startswith("hf:"):
        corpus = from_hugging_face(cfg, cache, copied)
    elif files.looks_like_files(cfg.corpus):
        corpus = from_files(cfg, cache, copied)
    else:
        corpus = from_tfds(cfg)
    if cfg.corpus in ("shakespeare", "bibles"):
        if cfg.validation:
            raise InputError(f"data.validation is for files and TFDS names; {cfg.corpus} has its own held-out text")
        if (cfg.corpus == "bibles") != bool(cfg.source_field or cfg.text_fields):
            raise InputError(
                "the corpus 'bibles' is pairs: set --data.source-field kjv --data.target-field web, or --data.text-fields kjv web"
                if cfg.corpus == "bibles"
                else "the corpus 'shakespeare' is plain text and has no pairs; leave out source_field, target_field, text_fields"
            )
    kind = {"paired": bool(cfg.source_field), "conversations": bool(cfg.messages_field), "sides": len(cfg.text_fields)}
    return dataclasses.replace(corpus, **kind, prompts=(cfg.query_prompt, cfg.document_prompt))


def from_conversations(cfg: DataConfig, cache: Path, copied: bool) -> Corpus:
    """Conversations of files, or those made from the plays. Raises InputError for any other corpus."""
    if cfg.corpus != "shakespeare":
        if cfg.corpus.startswith("hf:") or not files.looks_like_files(cfg.corpus):
            raise InputError(
                f"data.messages_field: conversations come from .jsonl or .parquet files or the corpus shakespeare; "
                f"data.corpus is {cfg.corpus!r}"
            )
        return from_files(cfg, cache, copied)
    found = list(conversations.of_plays())
    key = hashlib.sha256("\0".join(text for *_, text in found).encode()).hexdigest()[:16]

    def splits() -> dict[str, Documents]:
        return {split: iter([(name, text) for s, name, text in found if s == split]) for split in Corpus.splits}

    return prepared("shakespeare-conversations", key, splits, cache)


def from_bibles(cfg: DataConfig, cache: Path) -> Corpus:
    sets = bool(cfg.text_fields)
    if sets and (len(cfg.text_fields) != 2 or cfg.score_field):
        raise InputError("the corpus 'bibles' has two versions and no scores: set --data.text-fields kjv web")
    versions = cfg.text_fields if sets else (cfg.source_field or "kjv", cfg.target_field or "web")
    found = list(bibles.verses(*versions))
    key = hashlib.sha256("\0".join(f"{a}\0{b}" for _, a, b in found).encode()).hexdigest()[:16]

    def splits() -> dict[str, Documents]:
        parts: dict[str, list[tuple[str, str]]] = {split: [] for split in Corpus.splits}
        for number, *texts in found:
            texts = [contrasts.document(texts)] if sets else texts
            parts[bibles.split_of(number)] += [(str(number), text) for text in texts]
        return {split: iter(part) for split, part in parts.items()}

    return prepared("bibles-sets" if sets else "bibles", key, splits, cache)


def from_files(cfg: DataConfig, cache: Path, copied: bool) -> Corpus:
    paths = files.matching(cfg.corpus)
    held = files.matching(cfg.validation) if cfg.validation else []
    contents = files.contents(paths + held, cache)
    copies = dict(zip(contents, paths, strict=False))
    for path, content in zip(held, contents[len(paths) :], strict=True):
        if content in copies:
            same = "" if copies[content] == path else f" as {copies[content]}"
            raise InputError(f"{path} is in data.corpus{same} and in data.validation; hold out other text")

    what, names = (*hashed_fields(cfg), str(len(paths))), [path.name for path in paths + held]
    tables = [kind if (kind := files.kind(path)) in files.TABLES else "" for path in paths + held]  # other text
    of_names = (tables,) if any(n.lower().endswith(files.JSON_ENDINGS) for n in names) else (tables, (), names)
    key, *earlier = dict.fromkeys(files.fingerprint(contents, *what, names=n) for n in of_names)

    @functools.cache  # where few documents are cut is found out once
    def splits() -> dict[str, Again]:
        found, validation = Again(lambda: read(paths, cfg)), Again(lambda: read(held, cfg))
        if next(iter(found), None) is None:
            raise InputError(f"the corpus {cfg.corpus!r} is empty: {len(paths)} file(s), no text")
        if held and next(iter(validation), None) is None:
            raise InputError(f"data.validation {cfg.validation!r} is empty: {len(held)} file(s), no text")
        if held:
            return {"train": found, "validation": validation, "test": validation}
        return hold_out(found, paired=bool(cfg.source_field), whole=bool(cfg.messages_field or cfg.text_fields))

    if copied and (any(map(is_slow, paths + held)) or sum(path.stat().st_size for path in paths + held) <= MOST_COPIED):
        return dataclasses.replace(prepared("files", key, splits, cache), earlier=tuple(earlier))
    whole = () if held else tuple(paths)
    return Corpus("files", key, lambda split: iter(splits()[split]), earlier=tuple(earlier), paths=whole)


def is_slow(path: files.AnyPath) -> bool:
    """Whether a file takes long to read again: one behind a URL, or compressed."""
    return isinstance(path, files.Remote) or path.suffix.lower() in files.PACKED


def read(paths: Sequence[files.AnyPath], cfg: DataConfig) -> Documents:
    """(name, text) of the documents in files, those without text left out."""
    if cfg.messages_field:
        return conversations.read(paths, cfg.messages_field)
    if cfg.text_fields:
        return contrasts.read(paths, cfg)
    if cfg.source_field:
        return files.pairs(paths, cfg.source_field, cfg.target_field)
    return with_text(files.documents(paths, cfg.text_field))


def from_hugging_face(cfg: DataConfig, cache: Path, copied: bool) -> Corpus:
    """A set of the `datasets` library, `hf:NAME` or `hf:NAME:CONFIG`, streamed. Splits it lacks are held out of train."""
    try:
        import datasets
    except ImportError as e:
        raise InputError(f"{cfg.corpus} needs the datasets library: pip install 'bothways[hf]'") from e
    if cfg.validation:
        raise InputError(
            f"data.validation is for files and TFDS names; {cfg.corpus} has its own splits, or a part held out"
        )
    name, _, config = cfg.corpus.removeprefix("hf:").partition(":")
    try:
        builder = datasets.load_dataset_builder(name, config or None)
        streams = builder.as_streaming_dataset()
    except (ValueError, OSError) as e:  # no such set or configuration, no network
        raise InputError(f"{cfg.corpus} cannot be had: {str(e).splitlines()[0][:300]}") from e
    if "train" not in streams:
        raise InputError(f"{cfg.corpus} has no split train; it has {', '.join(streams)}")

    def documents(split: str) -> Documents:
        for number, record in enumerate(streams[split]):
            if cfg.text_fields:
                yield f"{split}:{number}", contrasts.of_record(record, cfg, cfg.corpus, number)
                continue
            for field in fields(cfg):
                flag = "--data.source-field and --data.target-field" if cfg.source_field else "--data.text-field"
                text = files.text_of(record, field, flag, cfg.corpus, number)
                if text.strip() or cfg.source_field:
                    yield f"{split}:{number}", text

    @functools.cache
    def splits() -> dict[str, Again]:
        held = next((split for split in ("validation", "test") if split in streams), None)
        if held is None:
            return hold_out(Again(lambda: documents("train")), bool(cfg.source_field), bool(cfg.text_fields))
        return {s: Again(functools.partial(documents, s if s in streams else held)) for s in Corpus.splits}

    state = json.dumps([name, config, builder.hash, str(builder.info.version), *hashed_fields(cfg)])
    key = hashlib.sha256(state.encode()).hexdigest()[:16]
    return prepared("hf", key, splits, cache) if copied else Corpus("hf", key, lambda split: iter(splits()[split]))


def fields(cfg: DataConfig) -> tuple[str, ...]:
    """The fields that are read: one of plain text or of conversations, two of pairs."""
    if cfg.messages_field:
        return ("conversations", cfg.messages_field)
    if cfg.text_fields:
        return (*cfg.text_fields, *filter(None, [cfg.score_field]))
    return (cfg.source_field, cfg.target_field) if cfg.source_field else (cfg.text_field,)


def hashed_fields(cfg: DataConfig) -> tuple[str, ...]:
    """The fields that are read, told apart from those of pairs of the same names."""
    return (*fields(cfg), "sets") if cfg.text_fields else fields(cfg)


def from_tfds(cfg: DataConfig) -> Corpus:
    """A dataset of the TFDS catalogue, read through array_record. Splits it lacks are cut from the end of train."""
    held_out = files.matching(cfg.validation) if cfg.validation else []
    with quiet_tfds() as tfds:
        import tensorflow_datasets.question_answering
        import tensorflow_datasets.text
        import tensorflow_datasets.translate  # noqa: F401  (these register their datasets)

        try:
            builder = tfds.builder(cfg.corpus, file_format="array_record")
        except tfds.core.DatasetNotFoundError as e:
            import difflib

            near = difflib.get_close_matches(
                cfg.corpus.split("/")[0], [*tfds.list_builders(with_community_datasets=False), "shakespeare"], n=3
            )
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise InputError(
                f"no corpus {cfg.corpus!r}: not 'shakespeare', not a file or glob, not a TFDS name{hint}"
            ) from e
        except (ValueError, AssertionError) as e:  # no such config, no such version
            raise InputError(f"TFDS cannot make {cfg.corpus!r}: {' '.join(str(e).split())[:300]}") from e
        try:
            builder.download_and_prepare()
        except Exception as e:
            raise InputError(unavailable(cfg.corpus, e)) from e
        names = list(builder.info.splits)
        for field in fields(cfg):
            if field not in builder.info.features:
                raise InputError(
                    f"TFDS {cfg.corpus} has no field {field!r}; it has {', '.join(builder.info.features)}; "
                    + ("choose with --data.source-field and" if cfg.source_field else "choose one with")
                    + (" --data.target-field" if cfg.source_field else " --data.text-field")
                )
        whole = {"train": "train[:98%]", "validation": "train[98%:99%]", "test": "train[99%:]"}
        held = next((n for n in ("validation", "test") if n in names), None)
        slices = {s: (s if s in names else held) if held else whole[s] for s in Corpus.splits}
        contents = files.contents(held_out, Path(cfg.cache).expanduser())
        names = [path.name for path in held_out]
        key = files.fingerprint(contents, builder.info.full_name, *hashed_fields(cfg), names=names)

    def documents(split: str) -> Documents:
        if split == "validation" and held_out:
            yield from read(held_out, cfg)
            return
        for i, record in enumerate(builder.as_data_source(slices[split])):
            if cfg.text_fields:
                known = {k: v.decode("utf-8", errors="replace") if isinstance(v, bytes) else v for k, v in record.items()}
                yield f"{split}:{i}", contrasts.of_record(known, cfg, cfg.corpus, i)
                continue
            texts = [record[field].decode("utf-8", errors="replace") for field in fields(cfg)]
            if all(text.strip() for text in texts):
                yield from ((f"{split}:{i}", text) for text in texts)

    return Corpus(cfg.corpus, key, documents)


def unavailable(name: str, error: BaseException) -> str:
    """Why TFDS could not prepare a dataset here: TensorFlow, Apache Beam, or the network."""
    chain, seen = [], error
    while seen is not None and len(chain) < 8:
        chain.append(f"{type(seen).__name__}: {seen}")
        seen = seen.__cause__ or seen.__context__
    text = " | ".join(chain)
    if any(w in text for w in ("ConnectionError", "MaxRetry", "NameResolution", "URLError", "HTTPError", "Timeout")):
        why = "its source could not be downloaded: there is no network here, or the server does not answer"
    elif "beam" in text.lower():
        why = "it needs Apache Beam to be prepared: pip install apache-beam, or prepare it elsewhere and copy it"
    elif "tensorflow" in text.lower().replace("tensorflow_datasets", "").replace("tensorflow-datasets", ""):
        why = "its source is packed in a way that TFDS unpacks with TensorFlow: prepare it where TensorFlow is installed"
    else:
        why = text.split("\n")[0][:300]
    return f"TFDS dataset {name!r} cannot be had here: {why}"
