"""Parameters go to and from a checkpoint one array after the other. Orbax would hold all of them twice: it copies what it
writes, since training goes on meanwhile, and reads all at once."""

import contextlib
import mmap
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from bothways.model.axes import path_names

Allocate = Callable[[str, tuple[int, ...]], np.ndarray]
"""A parameter's path and shape -> an array of zeros for it, in the type that it is kept in; large ones lie in files. A path with
more behind it, as `.../kernel/mean`, is what a parameter is made of, in float32."""
Keep = Callable[[str, np.ndarray], np.ndarray]
"""A parameter's path and what was read of it -> what is kept in its place."""
CHUNK = 2**25
"""Bytes of an array that are compressed, written and read together."""


def let_go(array: np.ndarray) -> None:
    """Take the pages of an array that lies in a file out of this process' memory; they are read again where it is used."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


def saved(params: Any) -> ocp.args.StandardSave:
    """What a manager saves parameters by, numpy arrays of which nothing changes meanwhile; `one_by_one` must be open."""
    return ocp.args.StandardSave(params, jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK), params))


def kept_in(allocate: Allocate) -> Keep:
    """What is read is kept in what `allocate` gives."""

    def keep(path: str, x: np.ndarray) -> np.ndarray:
        array = allocate(path, x.shape)
        array[...] = x
        let_go(x)
        let_go(array)
        return array

    return keep


def mean_of(restore: Callable[[int], Any], steps: list[int], allocate: Allocate) -> Any:
    """The mean of checkpoints, of which one array is held at a time.

    Args:
      restore: a checkpoint's parameters by its step, read while `one_by_one` is open.
    """
    means: dict[str, np.ndarray] = {}
    for count, step in enumerate(steps, 1):

        def towards(path: str, x: np.ndarray, count: int = count) -> np.ndarray:
            if path not in means:
                means[path] = allocate(f"{path}/mean", x.shape)
            x -= means[path]
            x /= count
            means[path] += x
            let_go(means[path])
            return means[path]

        with one_by_one(towards):
            found = restore(step)
    return found


def by_layer(allocate: Allocate) -> Callable[[str, tuple[int, ...], Callable[[slice], Any]], np.ndarray]:
    """A parameter by its path and shape is kept in what `allocate` gives, and made one layer at a time."""

    def make(path: str, shape: tuple[int, ...], of: Callable[[slice], Any]) -> np.ndarray:
        whole = allocate(path, shape)
        for i in range(shape[0]):
            whole[i : i + 1] = of(slice(i, i + 1))
        let_go(whole)
        return whole

    return make


def typed(params: Any, shapes: Any, allocate: Allocate | None = None) -> Any:
    """Parameters in the types of `shapes`; those of another lie in what `allocate` gives."""

    def one(path: tuple, x: Any, s: Any) -> Any:
        if allocate is None or x.dtype == s.dtype:
            return x.astype(s.dtype, copy=False)
        return kept_in(allocate)("/".join(path_names(path)), x)

    return jax.tree_util.tree_map_with_path(one, params, shapes)


def unallocated(shapes: Any) -> Any:
    """What a manager restores numpy arrays by: arrays of these shapes and types that take no memory."""
    return jax.tree.map(lambda s: np.broadcast_to(np.zeros((), s.dtype), s.shape), shapes)


class _OneByOne(ocp.type_handlers.NumpyHandler):
    """Writes numpy arrays as they lie, and reads them as `keep` says."""

    def __init__(self, keep: Keep | None):
        super().__init__(deepcopy_host_arrays=False)
        self.keep = keep

    async def _background_serialize(self, values: Any, infos: Any, args: Any = None) -> None:
        for value, info, arg in zip(values, infos, args, strict=True):
            await super()._background_serialize([value], [info], [arg])
            let_go(value)

    async def deserialize(self, infos: Any, args: Any = None) -> list[np.ndarray]:
        found = []
        for info, arg in zip(infos, args, strict=True):
            whole = (await super().deserialize([info], [arg]))[0]
            if self.keep is not None:
                whole = self.keep(info.name.replace(".", "/"), whole)
            found.append(whole)
        return found


@contextlib.contextmanager
def one_by_one(keep: Keep | None = None) -> Iterator[None]:
    """While open, orbax writes and reads numpy arrays one after the other, and keeps what it read as `keep` says."""
    types = ocp.type_handlers
    before = types.get_type_handler(np.ndarray)
    types.register_type_handler(np.ndarray, _OneByOne(keep), override=True)
    try:
        yield
    finally:
        types.register_type_handler(np.ndarray, before, override=True)
