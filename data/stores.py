"""Files behind any scheme that fsspec opens: gs, s3, hf, https."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import posixpath
import random
import re
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar

import fsspec

from bothways.errors import InputError
from bothways.platform import without_grpc

T = TypeVar("T")

TRIES = 6
"""Times a request is made before it counts as failed; the waits between them double from a quarter of a second."""
CHECKSUMS = (
    "md5Hash",
    "crc32c",
    "sha256",
    "blob_id",
    "ETag",
    "etag",
    "generation",
    "LastModified",
    "Last-Modified",
    "mtime",
    "created",
)
"""What stores report of an object's content, the strongest check first."""


@dataclasses.dataclass(frozen=True, order=True)
class Remote:
    """A file behind a URL, with the few methods of a Path that reading text needs."""

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return posixpath.basename(self.url.partition("?")[0])

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).stem

    @contextlib.contextmanager
    def open(self, mode: str = "rb") -> Iterator[BinaryIO]:
        """Raises InputError where the object is missing or forbidden; a read that fails is tried again."""
        fs, path = filesystem(self.url)
        size = patiently(lambda: fs.info(path), self.url).get("size")
        if size is None or not has_ranges(fs, path, self.url, size):
            with fs.open(path, "rb", **({} if size is None else {"block_size": 0})) as stream:
                yield io.BufferedReader(stream, 2**20)
            return
        yield io.BufferedReader(Ranges(fs, path, self.url, size), 2**22)

    def read_bytes(self) -> bytes:
        with self.open() as stream:
            return stream.read()

    def size(self) -> int:
        """Bytes, packed as they are; 0 where the store does not say."""
        fs, path = filesystem(self.url)
        return patiently(lambda: fs.info(path), self.url).get("size") or 0

    def state(self) -> str:
        """A hash of what the store knows of the content: checksum or generation, and size. Nothing is read."""
        fs, path = filesystem(self.url)
        info = patiently(lambda: fs.info(path), self.url)
        known = next(((name, str(info[name])) for name in CHECKSUMS if info.get(name)), ("name", self.url))
        return hashlib.sha256(json.dumps([*known, info.get("size")]).encode()).hexdigest()


AnyPath = Path | Remote


class Ranges(io.RawIOBase):
    """An object read from its beginning to its end by ranges, each of them tried again where it fails."""

    def __init__(self, fs: Any, path: str, url: str, size: int):
        self.fs, self.path, self.url, self.size, self.at = fs, path, url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, into: Any) -> int:
        end = min(self.size, self.at + len(into))
        if end <= self.at:
            return 0
        found = fetch(self.fs, self.path, self.url, self.at, end)
        into[: len(found)] = found
        self.at = end
        return len(found)


def has_ranges(fs: Any, path: str, url: str, size: int) -> bool:
    """Whether parts of an object can be had. Some servers of http have no ranges; those are read from the beginning to the end."""
    if size < 2 or not url.startswith(("http://", "https://")):
        return True

    def second_byte() -> bool:
        with fs.open(path, "rb", cache_type="none") as stream:
            stream.seek(1)
            try:
                return len(stream.read(1)) == 1
            except ValueError:
                return False

    return patiently(second_byte, url)


def is_remote(name: str) -> bool:
    """Whether a name is a URL rather than a path."""
    return bool(re.match(r"[a-z][a-z0-9+]*://", name))


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system behind a URL or path, and the path in it.

    Raises:
      InputError: no such scheme, or its package is not installed.
    """
    options: dict[str, Any] = {}
    if url.startswith(("gs://", "gcs://")):
        without_grpc()
        if os.environ.get("STORAGE_EMULATOR_HOST"):
            options["token"] = "anon"
    try:
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as e:
        known = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "hf": "hf"}.get(url.partition(":")[0])
        extra = f" (pip install 'bothways[{known}]')" if known else ""
        raise InputError(f"{url}: {e}{extra}") from e
    except ValueError as e:
        raise InputError(f"{url}: {e}; give a path, or a URL such as gs://, s3://, hf:// or https://") from e


def patiently(request: Callable[[], T], what: str) -> T:
    """What a request to a store gives; one that fails for want of an answer is made again.

    Raises:
      InputError: no such object or bucket, no permission, a certificate that nobody vouches for, no answer after all tries.
    """
    for n in range(TRIES):
        try:
            return request()
        except Exception as raised:  # what is missing or refused differs from store to store
            e = raised
            if isinstance(raised, FileNotFoundError) and isinstance(raised.__cause__, OSError):
                e = raised.__cause__  # fsspec calls a page absent whose host it cannot reach
            code = getattr(e, "code", None) or getattr(e, "status", None)
            text = str(e).splitlines()[0] if str(e) else type(e).__name__
            if isinstance(e, FileNotFoundError) or str(code) == "404":
                raise InputError(f"there is no {what} ({text}); check the name of bucket and object") from e
            if isinstance(e, PermissionError) or str(code) in ("401", "403") or text.startswith("Forbidden"):
                raise InputError(f"no permission for {what} ({text}); log in, or ask its owner for access") from e
            if isinstance(certificate := getattr(e, "certificate_error", e), ssl.SSLError):
                raise InputError(f"{what}: {certificate}; SSL_CERT_FILE names the certificates that are trusted") from e
            if isinstance(e, InputError | TypeError | AttributeError | KeyError):
                raise
            if n + 1 == TRIES:
                if isinstance(e, OSError) or code or type(e).__module__.startswith("aiohttp"):
                    raise InputError(f"{what} ends early, or does not answer ({text}); try again, or copy it anew") from e
                raise
        time.sleep(0.25 * 2**n * random.uniform(0.5, 1.5))
    raise AssertionError


def fetch(fs: Any, path: str, url: str, begin: int, end: int) -> bytes:
    """Bytes of an object.

    Raises:
      InputError: it has no so many.
    """

    def request() -> bytes:
        found = fs.cat_file(path, start=begin, end=end)
        if len(found) != end - begin:
            raise OSError(f"{len(found)} bytes came for bytes {begin} to {end}")
        return found

    return patiently(request, url)


def matching(pattern: str, wanted: Callable[[Remote], bool], kinds: tuple[str, ...]) -> Iterator[Remote]:
    """The objects that a URL names, sorted: one, those of a glob, or all of a wanted kind below a folder.

    Raises:
      InputError: there are none, no such bucket, no permission.
    """
    fs, path = filesystem(pattern)
    if any(c in path for c in "*?["):
        found = patiently(lambda: fs.glob(path), pattern)
    elif patiently(lambda: fs.isfile(path), pattern):
        found = [path]
    else:
        found = [p for p in patiently(lambda: fs.find(path), pattern) if wanted(Remote(p))]
    if not found:
        if path == pattern:  # a URL to one page: a store of pages has no folders, and calls what it cannot reach absent
            patiently(lambda: fs.info(path), pattern)
        raise InputError(f"nothing matches {pattern!r}; give an object, a folder or a glob of {', '.join(kinds)}")
    for name in sorted(found):
        yield Remote(fs.unstrip_protocol(name))


class Folder:
    """A directory on a disk or a bucket, whose files are written whole or not at all."""

    def __init__(self, where: str):
        self.where = where.rstrip("/") or "/"
        self.remote = is_remote(self.where)
        self._fs: tuple[Any, str] | None = None

    def __str__(self) -> str:
        return self.where

    def __reduce__(self) -> Any:
        return Folder, (self.where,)

    def could_be(self) -> bool:
        """Whether the name may be a folder's: one on a disk is looked for, a URL must be no glob."""
        if self.remote:
            return not any(c in self.where for c in "*?[")
        return Path(self.where).expanduser().is_dir()

    @property
    def fs(self) -> Any:
        return self._open()[0]

    def path(self, name: str) -> str:
        return f"{self._open()[1].rstrip('/')}/{name}"

    def _open(self) -> tuple[Any, str]:
        if self._fs is None:
            self._fs = filesystem(self.where if self.remote else str(Path(self.where).expanduser().absolute()))
        return self._fs

    def exists(self, name: str) -> bool:
        return patiently(lambda: self.fs.exists(self.path(name)), f"{self}/{name}")

    def sizes(self, below: str = "") -> dict[str, int]:
        """Bytes of every file in it, or in a folder below, by name; none where there is no such folder."""
        home = self.path(below).rstrip("/")
        try:
            self.fs.invalidate_cache(home)
            found = self.fs.ls(home, detail=True)
        except FileNotFoundError:
            return {}
        return {posixpath.basename(f["name"]): f["size"] for f in found if f["type"] == "file"}

    def read(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        """A file, or a range of its bytes. Raises InputError where it is missing, forbidden or ends early."""
        path, url = self.path(name), f"{self}/{name}"
        if end is not None:
            return fetch(self.fs, path, url, begin, end) if end > begin else b""
        return patiently(lambda: self.fs.cat_file(path), url)

    def write(self, name: str, content: bytes | bytearray) -> None:
        """Raises InputError where there is no such bucket, or no permission."""
        path, url = self.path(name), f"{self}/{name}"
        if self.remote:  # an object appears when it is whole
            patiently(lambda: self.fs.pipe_file(path, bytes(content)), url)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        partial.write_bytes(content)
        partial.replace(target)

    def remove(self, below: str) -> None:
        """A folder in it, where there is one."""
        path = self.path(below)
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm(path, recursive=True)
