"""What a pool's memory is made of: the pieces of prompts that are kept, and where the slots lie on several devices."""

import collections
import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


class PrefixCache:
    """Keys and values of pieces of prompts, by all tokens up to their end; the least recently used go first."""

    def __init__(self, limit: int):
        self.limit, self.bytes, self.hits = limit, 0, 0
        self._pieces: collections.OrderedDict[bytes, Any] = collections.OrderedDict()

    @staticmethod
    def key(ids: Sequence[int]) -> bytes:
        return hashlib.sha256(np.asarray(ids, np.int32).tobytes()).digest()

    def get(self, ids: Sequence[int]) -> Any:
        found = self._pieces.get(key := self.key(ids))
        if found is not None:
            self._pieces.move_to_end(key)
            self.hits += 1
        return found

    def put(self, ids: Sequence[int], piece: Any) -> None:
        size = sum(x.nbytes for x in jax.tree.leaves(piece))
        if (key := self.key(ids)) in self._pieces or size > self.limit:
            return
        self._pieces[key] = piece
        self.bytes += size
        while self.bytes > self.limit:
            _, oldest = self._pieces.popitem(last=False)
            self.bytes -= sum(x.nbytes for x in jax.tree.leaves(oldest))


def state_sharding(params: Any, shapes: Any) -> Any:
    """Of parameters on several devices: the cache's heads over `tensor` where they divide, the rest on every device. None
    on one device."""
    at = jax.tree.leaves(params)[0].sharding
    if len(at.device_set) == 1 or not isinstance(at, NamedSharding):
        return None
    parts = at.mesh.shape.get("tensor", 1)

    def choose(x: jax.ShapeDtypeStruct) -> NamedSharding:
        heads = len(x.shape) == 4 and parts > 1 and x.shape[1] % parts == 0
        return NamedSharding(at.mesh, PartitionSpec(None, "tensor") if heads else PartitionSpec())

    return jax.tree.map(choose, shapes)
