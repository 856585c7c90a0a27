"""Token files: a split of a corpus as one long row of ids, prepared once; and rows cut from it."""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from etils import epath

from bothways.data import tokenizer as tokenizers
from bothways.data.config import DataConfig
from bothways.data.corpora import Corpus
from bothways.data.tokenizer import Tokenizer
from bothways.errors import InputError

BATCH = 256
"""Documents tokenised at once; even, so that no pair is torn."""


@dataclasses.dataclass(frozen=True)
class Tokens:
    """One split: every document as bos, its tokens, eos, one after the other."""

    ids: np.ndarray
    starts: np.ndarray
    """Where each document begins, [documents] int64."""
    bytes: int
    """UTF-8 bytes of the text."""
    home: Path | None = None
    """Where the files are, and where what is made from them may be kept."""


def obtain_tokenizer(cfg: DataConfig, corpus: Corpus) -> Tokenizer:
    """The tokenizer that a configuration names: read from its file, or trained once and kept in the cache."""
    if cfg.tokenizer.endswith((".model", ".json")):
        return Tokenizer.load(epath.Path(cfg.tokenizer).expanduser())  # on a bucket too
    version = f"{corpus.fingerprint} {cfg.tokenizer} {cfg.vocab_size} {tokenizers.TRAINING_BYTES}"
    key = hashlib.sha256(version.encode()).hexdigest()[:16]
    path = Path(cfg.cache).expanduser() / "tokenizers" / f"{key}.model"
    if not path.exists():
        size = sum(len(text.encode()) for _, text in corpus.documents("train"))
        share = min(1.0, tokenizers.TRAINING_BYTES / max(1, size))
        texts = (text for _, text in corpus.documents("train"))
        trained = tokenizers.train(texts, cfg.tokenizer, cfg.vocab_size, share)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        trained.save(partial)
        partial.replace(path)
    return Tokenizer.load(path)


def prepare(corpus: Corpus, split: str, tokenizer: Tokenizer, cache: str) -> Tokens:
    """The tokens of a split; read from the cache where the same text met the same tokenizer before.

    Raises:
      InputError: the split holds no text.
    """
    key = hashlib.sha256(
        f"{1 + corpus.paired} {corpus.fingerprint} {tokenizer.fingerprint} {split}".encode()
    ).hexdigest()[:16]
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
    return Tokens(ids, np.load(home / "starts.npy", mmap_mode="r"), meta["bytes"], home)


def umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _write(corpus: Corpus, split: str, tokenizer: Tokenizer, home: Path) -> None:
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    starts, position, size = [], 0, 0
    with (home / "ids.bin").open("wb") as out:

        def flush(texts: list[str]) -> None:
            nonlocal position, size
            encoded = tokenizer.encode_many(texts)
            for i, (text, ids) in enumerate(zip(texts, encoded, strict=True)):
                if ids and (
                    not corpus.paired or encoded[i ^ 1]
                ):  # without tokens it falls out, and the other of its pair
                    starts.append(position)
                    position += len(ids) + 2
                    size += len(text.encode())
                    out.write(np.asarray([tokenizer.bos, *ids, tokenizer.eos], dtype).tobytes())

        batch: list[str] = []
        for _, text in corpus.documents(split):
            batch.append(text)
            if len(batch) == BATCH:
                flush(batch)
                batch = []
        if batch:
            flush(batch)
    np.save(home / "starts.npy", np.asarray(starts, np.int64))
    (home / "meta.json").write_text(json.dumps({"dtype": np.dtype(dtype).name, "tokens": position, "bytes": size}))


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

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        ids, starts = self.tokens.ids, self.tokens.starts
        begin = np.asarray(indices, np.int64) * self.length
        at = begin[:, None] + np.arange(self.length + 1)
        tokens, segments = ids[np.minimum(at, len(ids) - 1)].astype(np.int32), np.ones(at.shape, np.int32)
        if self.separate:  # 1 more from each start of a document on
            first, last = np.searchsorted(starts, np.stack([begin + 1, begin + self.length + 1]))
            count = last - first
            row = np.repeat(np.arange(len(begin)), count)
            number = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count) + first[row]
            segments[row, starts[number] - begin[row]] += 1
            segments = np.cumsum(segments, axis=1, dtype=np.int32) - np.arange(self.length + 1, dtype=np.int32)
        if len(at) and at[:, -1].max() >= len(ids):
            real = at < len(ids)
            tokens, segments = np.where(real, tokens, self.pad), np.where(real, segments, 0)
        return {"tokens": tokens, "segments": segments}
