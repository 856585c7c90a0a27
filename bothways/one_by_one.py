"""Parameters go to and from a checkpoint one array after the other. Orbax would hold all of them twice: it copies what it
writes, since training goes on meanwhile, and reads all at once."""

import contextlib
import mmap
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

Allocate = Callable[[str, tuple[int, ...]], np.ndarray]
"""A parameter's path and shape -> an array of zeros for it, in the type that it is kept in; large ones lie in files."""
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


def unallocated(shapes: Any) -> Any:
    """What a manager restores numpy arrays by: arrays of these shapes and types that take no memory."""
    return jax.tree.map(lambda s: np.broadcast_to(np.zeros((), s.dtype), s.shape), shapes)


class _OneByOne(ocp.type_handlers.NumpyHandler):
    """Writes numpy arrays as they lie, and reads them into what `allocate` gives."""

    def __init__(self, allocate: Allocate | None):
        super().__init__(deepcopy_host_arrays=False)
        self.allocate = allocate

    async def _background_serialize(self, values: Any, infos: Any, args: Any = None) -> None:
        for value, info, arg in zip(values, infos, args, strict=True):
            await super()._background_serialize([value], [info], [arg])
            let_go(value)

    async def deserialize(self, infos: Any, args: Any = None) -> list[np.ndarray]:
        found = []
        for info, arg in zip(infos, args, strict=True):
            whole = (await super().deserialize([info], [arg]))[0]
            if self.allocate is not None:
                array = self.allocate(info.name.replace(".", "/"), whole.shape)
                array[...], whole = whole, array
                let_go(array)
            found.append(whole)
        return found


@contextlib.contextmanager
def one_by_one(allocate: Allocate | None = None) -> Iterator[None]:
    """While open, orbax writes and reads numpy arrays one after the other, and reads them into what `allocate` gives."""
    types = ocp.type_handlers
    before = types.get_type_handler(np.ndarray)
    types.register_type_handler(np.ndarray, _OneByOne(allocate), override=True)
    try:
        yield
    finally:
        types.register_type_handler(np.ndarray, before, override=True)
