"""Records for TFDS in the order in which they come, in memory that does not grow with them."""

import os
import struct
import tempfile
from collections.abc import Iterator
from typing import Any


class InOrder:
    """In place of TFDS's Shuffler: records in the order in which they come, in a temporary file and not in memory.

    The library's own holds all of them, up to a gigabyte, and wants TensorFlow for more.
    """

    def __init__(self, dirpath: os.PathLike, **_: Any):
        self.file = tempfile.TemporaryFile(dir=dirpath)  # noqa: SIM115  (closed when it has been read)
        self.num_examples = self.size = 0

    @property
    def bucket_lengths(self) -> list[int]:
        return [self.num_examples]

    def add(self, key: int, data: bytes) -> bool:
        self.file.write(struct.pack("<Q", len(data)) + data)
        self.num_examples, self.size = self.num_examples + 1, self.size + len(data)
        return True

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        with self.file:
            self.file.seek(0)
            for number in range(self.num_examples):
                yield number, self.file.read(struct.unpack("<Q", self.file.read(8))[0])
