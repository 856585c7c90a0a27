"""Tensors that are read one at a time, and written so, in as many files as it takes."""

import contextlib
import dataclasses
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from bothways.one_by_one import Allocate, let_go

SHARD_BYTES = 2**30
"""A file of an export holds about so much, and so much is held beside the parameters."""
ON_DISK = 2**26
"""Bytes of a parameter from which on it lies in a file while a checkpoint is read."""
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor: its shape, and its numbers when they are wanted (`np.asarray`)."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    narrow: bool = True
    """Whether a checkpoint in bfloat16 may hold it so; heads of tasks stay float32, as they do in our runs."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        found = self.read()
        return found if dtype is None else found.astype(dtype, copy=False)

    def then(self, change: Callable[..., np.ndarray], *arguments: Any) -> "Stored":
        """The tensor that a function makes of this one, which keeps the shape or turns it round."""
        shape = self.shape[::-1] if change is np.transpose else self.shape
        return Stored(shape, lambda: change(self.read(), *arguments), self.narrow)


def kept_as(dtype: np.dtype, tensor: Stored) -> np.dtype:
    """The type of a tensor in a checkpoint of this type: vectors, which are few, stay float32."""
    return dtype if len(tensor.shape) > 1 and tensor.narrow else DTYPES["float32"]


@contextlib.contextmanager
def room_for(home: Path, dtype: np.dtype) -> Iterator[Allocate]:
    """For parameters by path and shape: zeros, of which large ones lie in files beside `home` while this is open, so that the
    system can take their memory back."""
    folder, filled = Path(tempfile.mkdtemp(prefix=".parameters-", dir=home.parent)), []

    def allocate(path: str, shape: tuple[int, ...]) -> np.ndarray:
        for before in filled:  # parameters are filled one after the other
            let_go(before)
        matrix = path.endswith(("/kernel", "/embedding")) and not path.startswith("task_head/")
        kind = dtype if matrix else DTYPES["float32"]
        if math.prod(shape) * kind.itemsize < ON_DISK:
            return np.zeros(shape, kind)
        filled.append(np.memmap(folder / path.replace("/", "."), kind, "w+", shape=shape))
        return filled[-1]

    try:
        yield allocate
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save_tensors(home: Path, tensors: Mapping[str, Stored], dtype: np.dtype, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a checkpoint's safetensors: model.safetensors, or numbered files and their index where they are large."""
    shards: list[list[str]] = [[]]
    sizes = {n: t.size * kept_as(dtype, t).itemsize for n, t in tensors.items()}
    for name in tensors:
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + sizes[name] > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    found: dict[str, str] = {}
    for i, names in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        part = {n: np.ascontiguousarray(np.asarray(tensors[n], kept_as(dtype, tensors[n]))) for n in names}
        save_file(part, home / file, {"format": "pt"})
        found |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": found}
        (home / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
