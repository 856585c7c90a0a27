"""Token ids of a large prepared text, read block by block from its store, and the order of rows that makes reads long."""

import concurrent.futures
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from bothways.data import prepared as prepared_text
from bothways.data.prepared import Prepared, Shard
from bothways.data.rng import epoch_permutation
from bothways.data.tokens import Tokens

LANES = 32
"""Blocks that rows are drawn from in turn."""
IN_MEMORY = 4 * LANES
"""Blocks that are held in memory: a row may lie across two, and those of the next lanes are read ahead."""


class BlockIds:
    """An array [tokens] whose blocks are read when they are wanted, and ahead of that where `ahead` says so.

    A block is looked for in memory, then in a cache on disk of a bounded size, then in its store.

    Args:
      cache: a folder of its own.
      disk: bytes of it at most.
    """

    def __init__(self, text: Prepared, split: str, cache: Path, disk: int, memory: int = IN_MEMORY):
        self.text, self.cache, self.disk, self.memory = text, cache, disk, memory
        self.where: list[tuple[Shard, int]] = text.blocks(split)
        self.dtype = text.dtype
        per = prepared_text.BLOCK // text.dtype.itemsize
        sizes = [min(per, shard.tokens - number * per) for shard, number in self.where]
        self.first = np.cumsum([0, *sizes])
        self.held: OrderedDict[int, concurrent.futures.Future[np.ndarray]] = OrderedDict()
        self.lock = threading.Lock()
        self.pool = concurrent.futures.ThreadPoolExecutor(prepared_text.FETCHES, thread_name_prefix="blocks")
        cache.mkdir(parents=True, exist_ok=True)
        self.on_disk = OrderedDict((path.name, path.stat().st_size) for path in sorted(cache.glob("*.block")))
        self.disk_used = sum(self.on_disk.values())

    def __len__(self) -> int:
        return int(self.first[-1])

    def __getitem__(self, at: np.ndarray | slice) -> np.ndarray:
        if isinstance(at, slice):
            begin, end, step = at.indices(len(self))
            at = np.arange(begin, end, step)
        at = np.asarray(at)
        number = np.searchsorted(self.first, at, side="right") - 1
        wanted = np.unique(number)
        found = np.empty(at.shape, self.dtype)
        for block, ids in zip(wanted.tolist(), self._wait(wanted.tolist()), strict=True):
            inside = number == block
            found[inside] = ids[at[inside] - self.first[block]]
        return found

    def stretches(self, begins: np.ndarray, length: int) -> np.ndarray:
        """[n, length] what follows on each of [n] tokens, copied as it lies; behind the end its last token again."""
        ends = np.minimum(begins + length, len(self))
        spans = np.searchsorted(self.first, np.stack([begins, ends - 1]), side="right") - 1
        wanted = sorted({block for first, last in spans.T.tolist() for block in range(first, last + 1)})
        blocks = dict(zip(wanted, self._wait(wanted), strict=True))
        found = np.empty((len(begins), length), self.dtype)
        for row, begin, end, first, last in zip(found, begins.tolist(), ends.tolist(), *spans.tolist(), strict=True):
            at = 0
            for block in range(first, last + 1):
                low = begin + at - int(self.first[block])
                part = blocks[block][low : low + end - begin - at]
                row[at : at + len(part)] = part
                at += len(part)
            row[at:] = row[at - 1]
        return found

    def ahead(self, begin: int, end: int) -> None:
        """Begins to read what holds tokens `begin` to `end`, if there are such."""
        end = min(end, len(self))
        if begin >= end:
            return
        first, last = np.searchsorted(self.first, [begin, end - 1], side="right") - 1
        self._ask(range(int(first), int(last) + 1))

    def _ask(self, blocks: Iterable[int]) -> list[concurrent.futures.Future[np.ndarray]]:
        with self.lock:
            asked = []
            for block in blocks:
                if block not in self.held:
                    self.held[block] = self.pool.submit(self._load, block)
                self.held.move_to_end(block)
                asked.append(self.held[block])
            while len(self.held) > max(self.memory, len(asked)):
                self.held.popitem(last=False)
        return asked

    def _wait(self, blocks: list[int]) -> list[np.ndarray]:
        found = self._ask(blocks)
        try:
            return [future.result() for future in found]
        except BaseException:
            with self.lock:
                for block in blocks:
                    self.held.pop(block, None)  # the next time it is read anew
            raise

    def _load(self, block: int) -> np.ndarray:
        shard, number = self.where[block]
        path = self.cache / f"{shard.name}-{number}.block"
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            raw = b""
        if not raw or prepared_text.checksums(raw) != (shard.crc32[number],):
            raw = self.text.block(shard, number)
            self._keep(path, raw)
        return np.frombuffer(raw, self.dtype)

    def _keep(self, path: Path, raw: bytes) -> None:
        """Adds a block to the cache on disk, from which the oldest are taken away."""
        with self.lock:
            if self.disk < len(raw):
                return
            self.disk_used += len(raw) - self.on_disk.get(path.name, 0)
            self.on_disk[path.name] = len(raw)
            old = []
            while self.disk_used > self.disk:
                name, size = self.on_disk.popitem(last=False)
                self.disk_used -= size
                old.append(name)
        for name in old:
            (self.cache / name).unlink(missing_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_bytes(raw)
        partial.replace(path)


def open_blocks(text: Prepared, split: str, cache: Path) -> Tokens:
    """The tokens of a large split; starts of documents are fetched whole, into a file of the cache."""
    key = hashlib.sha256(f"{text.fingerprint} {text.tokenizer_fingerprint} {split}".encode()).hexdigest()[:16]
    home = cache / "blocks" / f"{text.name.replace('/', '-')}-{split}-{key}"
    home.mkdir(parents=True, exist_ok=True)
    kept = home / "starts.npy"
    if not kept.exists():
        shards = text.splits[split]
        starts = np.lib.format.open_memmap(
            home / f".starts.{os.getpid()}.npy", "w+", np.int64, (sum(shard.documents for shard in shards),)
        )
        tokens = documents = 0
        for shard in shards:
            starts[documents : documents + shard.documents] = text.starts(shard) + tokens
            tokens, documents = tokens + shard.tokens, documents + shard.documents
        starts.flush()
        (home / f".starts.{os.getpid()}.npy").replace(kept)
    ids = BlockIds(text, split, home, text.cache_bytes)
    size = sum(shard.bytes for shard in text.splits[split])
    block = prepared_text.BLOCK // text.dtype.itemsize
    return Tokens(ids, np.load(kept, mmap_mode="r"), size, home, block=block)


def block_permutation(numbers: np.ndarray, count: int, block: int, seed: int, lanes: int = LANES) -> np.ndarray:
    """Which of `count` rows each example of an endless run reads: all of them in every epoch, few blocks at a time.

    Blocks of `block` rows come in random order, `lanes` of them side by side: consecutive examples read a row of each in
    turn, in random order within it. So a host that holds every n-th part of a batch reads a part of the blocks only. The
    rows of the last blocks, too few for all lanes, are shuffled among themselves and end the epoch.

    Args:
      numbers: [n] of examples, from 0.
    """
    epoch, n = np.divmod(np.asarray(numbers, np.int64), count)
    blocks, side = count // block, lanes * block
    whole = blocks // lanes
    window, inside = np.divmod(n, side)
    in_lanes, left = window < whole, count - whole * side
    rest = _shuffled(n - whole * side, max(1, left), epoch, seed, 0)
    order = np.where(in_lanes, window * lanes + inside % lanes, whole * lanes + rest // block)
    number = np.where(order < blocks, _shuffled(order, max(1, blocks), epoch, seed, 1), blocks)  # the last is not full
    row = _shuffled(inside // lanes, block, epoch * (blocks + 1) + number, seed, 2)
    return number * block + np.where(in_lanes, row, rest % block)


def _shuffled(n: np.ndarray, size: int, group: np.ndarray, seed: int, purpose: int) -> np.ndarray:
    """Where n < `size` comes to lie in a shuffle that each group has of its own; of any other n it says nothing."""
    return epoch_permutation((group * 3 + purpose) * size + np.clip(n, 0, size - 1), size, seed)
