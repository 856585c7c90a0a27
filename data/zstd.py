"""A .zst file as a stream of bytes."""

import io
from typing import Any, BinaryIO

import zstandard


class Zstd(io.RawIOBase):
    """All frames of a .zst. Raises EOFError if the last has no end: the library's own reader takes that for the end of
    the text, and the end of the first frame too."""

    def __init__(self, raw: BinaryIO):
        self.raw, self.frame = raw, zstandard.ZstdDecompressor().decompressobj()
        self.ready, self.begun = memoryview(b""), False

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        while not self.ready:
            packed = (self.frame.unused_data if self.frame.eof else b"") or self.raw.read(2**18)
            if self.frame.eof:
                self.frame, self.begun = zstandard.ZstdDecompressor().decompressobj(), False
            if not packed:
                if self.begun:
                    raise EOFError("the last frame has no end")
                return 0
            self.begun = True
            self.ready = memoryview(self.frame.decompress(packed))
        count = min(len(into), len(self.ready))
        into[:count], self.ready = self.ready[:count], self.ready[count:]
        return count
