"""Token files: a split of a corpus as one long row of ids, prepared once; and rows cut from it."""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from bothways.data import chat, contrasts
from bothways.data import tokenizer as tokenizers
from bothways.data.config import VOCABULARY_FILES, DataConfig
from bothways.data.corpora import Corpus
from bothways.data.documents import continues
from bothways.data.files import file_at, read_utf8
from bothways.data.tokenizer import Tokenizer
from bothways.errors import InputError

BATCH = 256
"""Documents tokenized at once, at most; even, so that no pair is torn."""
BATCH_CHARACTERS = 2**22
"""From this many characters on, no more documents are tokenized at once."""


Piece = tuple[np.ndarray, np.ndarray, int]
"""Ids, where documents begin among them, and UTF-8 bytes of their text."""


@dataclasses.dataclass(frozen=True)
class Tokens:
    """One split: every document as bos, its tokens, eos, one after the other."""

    ids: Any
    """[tokens] an array; of a large prepared text one that reads from its store (data/blocks.py)."""
    starts: np.ndarray
    """Where each document begins, [documents] int64."""
    bytes: int
    """UTF-8 bytes of the text."""
    home: Path | None = None
    """Where the files are, and where what is made from them may be kept."""
    scored: np.ndarray | None = None
    """Of conversations, [tokens] bool: parts of answers, which the loss is on; None of plain text, all of which it is on."""
    sets: contrasts.Sets | None = None
    """Of texts to be told apart, each of which is one document here: how they belong together."""
    block: int = 0
    """Tokens of a block, where `ids` are read by blocks; else 0."""

    def stretches(self, begins: np.ndarray, length: int) -> np.ndarray:
        """[n, length] what follows on each of [n] tokens; behind the end its last token again."""
        if self.block:
            return self.ids.stretches(begins, length)
        return self.ids[np.minimum(begins[:, None] + np.arange(length), len(self.ids) - 1)]

    def read_ahead(self, begins: np.ndarray, length: int) -> None:
        """Begins to read stretches of so many tokens, where ids are read by blocks."""
        for begin in begins.tolist():
            self.ids.ahead(begin, begin + length)


def obtain_tokenizer(cfg: DataConfig, corpus: Corpus) -> Tokenizer:
    """The tokenizer that a configuration names: read from its file, or trained once and kept in the cache."""
    return with_template(cfg, _tokenizer(cfg, corpus))


def with_template(cfg: DataConfig, tokenizer: Tokenizer) -> Tokenizer:
    """With the chat template that a configuration names; of conversations with one in any case."""
    if cfg.chat_template:
        tokenizer.chat_template = read_utf8(file_at(cfg.chat_template))
    elif cfg.messages_field:
        tokenizer.chat_template = chat.template_of(tokenizer)
    return tokenizer


def _tokenizer(cfg: DataConfig, corpus: Corpus) -> Tokenizer:
    if corpus.store:
        return corpus.store.tokenizer(cfg)
    if cfg.tokenizer.endswith(VOCABULARY_FILES):
        return Tokenizer.load(epath.Path(cfg.tokenizer).expanduser())  # on a bucket too

    def train() -> Tokenizer:
        share = min(1.0, tokenizers.TRAINING_BYTES / max(1, training_bytes(corpus)))
        return tokenizers.train(training_texts(corpus), cfg.tokenizer, cfg.vocab_size, share)

    return kept_tokenizer(cfg, corpus.fingerprint, train)


def training_bytes(corpus: Corpus) -> int:
    """UTF-8 bytes of the text to train on; it is gone through for that."""
    return sum(len(text.encode()) for text in training_texts(corpus))


def training_texts(corpus: Corpus) -> Iterator[str]:
    """What a vocabulary is trained on; of conversations what is said in them."""
    said = chat.plain_text if corpus.conversations else contrasts.plain_text if corpus.sides else str
    return (said(text) for _, text in corpus.documents("train"))


def kept_tokenizer(cfg: DataConfig, of: str, train: Callable[[], Tokenizer]) -> Tokenizer:
    """A vocabulary that is trained once and kept in the cache.

    Args:
      of: what it is trained on, as a fingerprint.
    """
    version = f"{of} {cfg.tokenizer} {cfg.vocab_size} {tokenizers.TRAINING_BYTES}"
    key = hashlib.sha256(version.encode()).hexdigest()[:16]
    path = Path(cfg.cache).expanduser() / "tokenizers" / f"{key}.model"
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}.partial")
        train().save(partial)
        partial.replace(path)
    return Tokenizer.load(path)


def prepare(corpus: Corpus, split: str, tokenizer: Tokenizer, cache: str) -> Tokens:
    """The tokens of a split; read from the cache where the same text met the same tokenizer before.

    Raises:
      InputError: the split holds no text; or it is prepared, with another tokenizer.
    """
    if corpus.store:
        corpus.store.check_tokenizer(tokenizer)
        if corpus.store.is_large(split):
            return corpus.store.open(split, Path(cache).expanduser())
    version = f"{1 + corpus.paired} {corpus.fingerprint} {tokenizer.fingerprint} {split}"
    if corpus.conversations:
        version += f" {chat.template_fingerprint(tokenizer)} {tokenizer.special}"
    if corpus.sides:
        version += f" sets {corpus.sides} {json.dumps(corpus.prompts)}"
    key = hashlib.sha256(version.encode()).hexdigest()[:16]
    home = Path(cache).expanduser() / "tokens" / f"{corpus.name.replace('/', '-')}-{split}-{key}"
    if not (home / "meta.json").exists():
        home.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=home.parent))
        try:
            _write(corpus, split, tokenizer, partial)
            partial.chmod(0o777 & ~umask())  # mkdtemp makes it for one user only
            partial.rename(home)
        except OSError:
            if not (home / "meta.json").exists():  # else another process was faster, with the same result
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    meta = json.loads((home / "meta.json").read_text())
    if meta["bytes"] == 0:
        raise InputError(f"the {split} split of {corpus.name} is empty; give more text, or --data.validation FILE")
    ids = np.memmap(home / "ids.bin", dtype=meta["dtype"], mode="r")
    scored = np.memmap(home / "scored.bin", dtype=bool, mode="r") if corpus.conversations else None
    sets = None
    if corpus.sides:
        before, _, behind = tokenizer.framing_as_published().frame(False)
        sets = contrasts.Sets(corpus.sides, (before, behind), np.load(home / "scores.npy", mmap_mode="r"))
    return Tokens(ids, np.load(home / "starts.npy", mmap_mode="r"), meta["bytes"], home, scored, sets)


def umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _write(corpus: Corpus, split: str, tokenizer: Tokenizer, home: Path) -> None:
    """ids.bin, starts.npy and meta.json of a split: encoded here, or as they were prepared; of conversations scored.bin."""
    starts, position, size, dtype = [np.zeros(0, np.int64)], 0, 0, dtype_for(tokenizer)
    if corpus.conversations:
        with (home / "ids.bin").open("wb") as out, (home / "scored.bin").open("wb") as answers:
            for ids, scored, count in chat.encoded(corpus.documents(split), tokenizer):
                out.write(np.array(ids, dtype).tobytes())
                answers.write(scored.tobytes())
                starts.append(np.array([position]))
                position, size = position + len(ids), size + count
        return _finish(home, starts, dtype, position, size)
    if corpus.sides:
        scores = []
        with (home / "ids.bin").open("wb") as out:
            for texts, score, count in contrasts.encoded(corpus.documents(split), tokenizer, corpus.prompts):
                scores.append(score)
                size += count
                for ids in texts:
                    out.write(np.array(ids, dtype).tobytes())
                    starts.append(np.array([position]))
                    position += len(ids)
        np.save(home / "scores.npy", np.array(scores, np.float32))
        return _finish(home, starts, dtype, position, size)
    with (home / "ids.bin").open("wb") as out:
        texts = corpus.documents(split)
        made = corpus.store.pieces(split) if corpus.store else encoded(texts, tokenizer, corpus.paired)
        for ids, begins, count in made:
            out.write(ids.tobytes())
            starts.append(position + begins)
            position += len(ids)
            size += count
    return _finish(home, starts, dtype, position, size)


def _finish(home: Path, starts: list[np.ndarray], dtype: np.dtype, position: int, size: int) -> None:
    np.save(home / "starts.npy", np.concatenate(starts))
    (home / "meta.json").write_text(json.dumps({"dtype": dtype.name, "tokens": position, "bytes": size}))


def dtype_for(tokenizer: Tokenizer) -> np.dtype:
    """The type that token ids are kept in, little-endian."""
    return np.dtype("<u2" if len(tokenizer) <= 2**16 else "<u4")


class Encoder:
    """Documents as bos, their tokens, eos, from batches of (name, text) that may end within a document.

    One without tokens falls out, and the other of its pair too.
    """

    def __init__(self, tokenizer: Tokenizer, paired: bool):
        self.tokenizer, self.paired, self.dtype = tokenizer, paired, dtype_for(tokenizer)
        self.waiting: list[tuple[str, str]] = []
        self.size = 0
        """Characters of them."""
        self.inside = False
        """Whether a document has begun whose eos is not there yet."""

    def add(self, name: str, text: str) -> Piece | None:
        """What is encoded by now, where enough documents have come."""
        full = len(self.waiting) >= BATCH or self.size >= BATCH_CHARACTERS
        made = self.flush(continues(name)) if full and not (self.paired and len(self.waiting) % 2) else None
        self.waiting.append((name, text))
        self.size += len(text)
        return made

    def flush(self, goes_on: bool = False) -> Piece:
        """Ids, where documents begin among them, and bytes of what has come.

        Args:
          goes_on: what comes next is of the same document as what came last.
        """
        batch, self.waiting, self.size = self.waiting, [], 0
        texts = [text for _, text in batch]
        ids = self.tokenizer.encode_arrays(texts[::2] if self.paired else texts)
        if self.paired:
            targets = self.tokenizer.of_targets.encode_arrays(texts[1::2])
            ids = [each for pair in zip(ids, targets, strict=True) for each in pair]
        bos, eos = np.array([self.tokenizer.bos]), np.array([self.tokenizer.eos])
        begins, flat, length, size = [], [np.zeros(0, np.int32)], 0, 0
        for i, (name, text) in enumerate(batch):
            if self.inside and not continues(name):
                flat.append(eos)
                length, self.inside = length + 1, False
            if not len(ids[i]) or (self.paired and not len(ids[i ^ 1])):
                continue
            if not self.inside:
                begins.append(length)
                flat.append(bos)
                length, self.inside = length + 1, True
            flat.append(ids[i])
            length, size = length + len(ids[i]), size + len(text.encode())
        if self.inside and not goes_on:
            flat.append(eos)
            self.inside = False
        return np.concatenate(flat, dtype=self.dtype, casting="unsafe"), np.array(begins, np.int64), size


def encoded(documents: Iterable[tuple[str, str]], tokenizer: Tokenizer, paired: bool) -> Iterator[Piece]:
    """Documents as bos, their tokens, eos, some at a time."""
    encoder = Encoder(tokenizer, paired)
    for name, text in documents:
        if made := encoder.add(name, text):
            yield made
    yield encoder.flush()


class Rows:
    """Rows of `length` + 1 tokens, each overlapping the next by one, so that every token is predicted once.

    A source: of n indices {"tokens", "segments"}, both [n, length + 1] int32; segments number the documents in the
    row from 1, and are 0 where a last row is padded.
    """

    def __init__(self, tokens: Tokens, length: int, pad: int, separate: bool = True, padded: bool = False):
        self.tokens, self.length, self.pad, self.separate = tokens, length, pad, separate
        whole = (len(tokens.ids) - 1) // length
        self.count = -(-(len(tokens.ids) - 1) // length) if padded else whole
        if self.count < 1:
            raise InputError(
                f"the text has {len(tokens.ids)} tokens, less than one row of model.context_length={length}; "
                "give more text or set a smaller --model.context_length"
            )

    def __len__(self) -> int:
        return self.count

    @property
    def block_rows(self) -> int:
        """Rows that lie in about one block of ids; 0 where ids are not read by blocks."""
        return -(-self.tokens.block // self.length)

    def read_ahead(self, blocks: np.ndarray) -> None:
        """Begins to read these blocks of rows."""
        room = self.block_rows * self.length
        self.tokens.read_ahead(blocks * room, room + 1)

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        ids, starts = self.tokens.ids, self.tokens.starts
        begin = np.asarray(indices, np.int64) * self.length
        tokens = self.tokens.stretches(begin, self.length + 1).astype(np.int32)
        segments = np.ones(tokens.shape, np.int32)
        if self.separate:  # 1 more from each start of a document on
            first, last = np.searchsorted(starts, np.stack([begin + 1, begin + self.length + 1]))
            count = last - first
            row = np.repeat(np.arange(len(begin)), count)
            number = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count) + first[row]
            segments[row, starts[number] - begin[row]] += 1
            segments = np.cumsum(segments, axis=1, dtype=np.int32) - np.arange(self.length + 1, dtype=np.int32)
        if len(begin) and begin.max() + self.length >= len(ids):
            real = begin[:, None] + np.arange(self.length + 1) < len(ids)
            tokens, segments = np.where(real, tokens, self.pad), np.where(real, segments, 0)
        return {"tokens": tokens, "segments": segments}
