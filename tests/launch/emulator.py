"""An object store on loopback: gcp-storage-emulator, and what it gets wrong of Cloud Storage's protocol put right.

- It answers one request after another, and a connection on which nothing comes stops it for good: here each has a thread.
- It does not know the preconditions ifGenerationMatch and ifGenerationNotMatch, and two writers overwrite each other.
- It does not say which generation of an object it sends, which tensorstore then calls "Malformed StorageGeneration".
- It does not know startOffset and endOffset, and whoever lists a range of names, to delete it, gets all of them.
- A range that begins behind the end is an empty answer, where Cloud Storage says 416.
- It cannot move an object to another name in one request.
- It writes the descriptions of all objects anew for each object that comes.
"""

import contextlib
import functools
import io
import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects as emulated
from gcp_storage_emulator.handlers.buckets import create_bucket
from gcp_storage_emulator.server import RequestHandler, Router
from gcp_storage_emulator.storage import Storage


class Objects(Storage):
    """Objects in memory, and every request for them."""

    def __init__(self, bucket: str, delay: float = 0.0, rate: float = 0.0):
        super().__init__(use_memory_fs=True)
        self.lock, self.requests = threading.RLock(), []
        self.bucket, self.delay, self.rate, self.line_free = bucket, delay, rate, 0.0
        create_bucket(bucket, self)

    def far(self, size: int) -> None:
        """Waits as long as an answer of so many bytes takes to come over the line, which all requests share."""
        time.sleep(self.delay)
        if self.rate:
            with self.lock:
                self.line_free = max(self.line_free, time.monotonic()) + size / self.rate
                wait = self.line_free - time.monotonic()
            time.sleep(max(0.0, wait))

    def _write_config_to_file(self) -> None:
        """Nobody opens it again."""

    def names(self, prefix: str = "") -> list[str]:
        with self.lock:
            return sorted(name for name in self.objects.get(self.bucket, {}) if name.startswith(prefix))

    def read(self, name: str) -> bytes:
        with self.lock:
            return self.get_file(self.bucket, name)

    def copy(self, name: str, to: str) -> None:
        with self.lock:
            emulated._copy("", self, self.bucket, name, self.bucket, to)

    def __contains__(self, name: str) -> bool:
        return name in self.names(name)


class Handler(RequestHandler):
    """One connection."""

    timeout = 60
    storage: Objects
    generation: str | None = None

    def answer(self, method: str) -> None:
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        bucket, _, name = url.path.partition("/b/")[2].partition("/o")
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""  # outside the lock: a client may be slow to send it
        self.rfile = io.BytesIO(body) if length else self.rfile
        name = query.get("name") or named_in(body) if method == "POST" else unquote(name.removeprefix("/"))
        if method == "POST" and "/moveTo/o/" in url.path:
            return self.move(bucket, *map(unquote, url.path.partition("/o/")[2].split("/moveTo/o/")))
        with self.storage.lock:
            self.storage.requests.append((method, unquote(self.path)))
            if method == "GET" and url.path.endswith(f"/b/{bucket}/o"):
                return self.list(bucket, query)
            found = self.storage.objects.get(bucket, {}).get(name) if name else None
            now = found["generation"] if found else "0"
            if query.get("ifGenerationMatch", now) != now and (found or method == "POST"):
                return self.status(412)
            if query.get("ifGenerationNotMatch") == now and (found or method == "POST"):
                return self.status(304 if method == "GET" else 412)
            first = self.headers.get("Range", "").removeprefix("bytes=").partition("-")[0]
            if found and query.get("alt") == "media":
                if first and int(first) >= max(1, int(found["size"])):
                    return self.status(416)
                self.generation = now
            self.wfile, client = io.BytesIO(), self.wfile
            Router(self).handle(method)
            self.wfile, reply = client, self.wfile.getbuffer()
        self.storage.far(len(reply))
        self.wfile.write(reply)
        return None

    def status(self, code: int) -> None:
        self.send_response(code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def move(self, bucket: str, name: str, to: str) -> None:
        with self.storage.lock:
            try:
                found = emulated._copy("", self.storage, bucket, name, bucket, to)
            except NotFound:
                return self.status(404)
            self.storage.delete_file(bucket, name)
        return self.send(found)

    def list(self, bucket: str, query: dict[str, str]) -> None:
        try:
            words = (query.get(word) for word in ("prefix", "delimiter", "matchGlob"))
            found, prefixes = self.storage.get_file_list(bucket, *words)
        except NotFound:
            return self.status(404)
        first, end = query.get("startOffset", ""), query.get("endOffset")
        inside = [item for item in found if first <= item["name"] and (end is None or item["name"] < end)]
        return self.send({"kind": "storage#objects", "prefixes": prefixes, "items": inside})

    def send(self, what: dict) -> None:
        content = json.dumps(what).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def end_headers(self) -> None:
        if self.generation:
            self.send_header("x-goog-generation", self.generation)
            self.send_header("x-goog-metageneration", "1")
        super().end_headers()

    def do_GET(self) -> None:
        self.answer("GET")

    def do_POST(self) -> None:
        self.answer("POST")

    def do_PUT(self) -> None:
        self.answer("PUT")

    def do_PATCH(self) -> None:
        self.answer("PATCH")

    def do_DELETE(self) -> None:
        self.answer("DELETE")


def named_in(body: bytes) -> str | None:
    """The name of an object in the description that comes before its content."""
    found = re.search(rb'"name":\s*("(?:[^"\\\\]|\\\\.)*")', body[:4096])
    return json.loads(found[1]) if found else None


@contextlib.contextmanager
def store(bucket: str, delay: float = 0.0, rate: float = 0.0) -> Iterator[tuple[Objects, dict[str, str]]]:
    """A store with a bucket: what is in it, and the environment variables by which gcsfs, tensorstore and tests find it.

    Args:
      delay: seconds that each request waits for its answer.
      rate: bytes a second that all answers together come with; 0 for no limit.
    """
    objects = Objects(bucket, delay, rate)
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, objects))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield (
            objects,
            {
                "STORAGE_EMULATOR_HOST": url,
                "TENSORSTORE_GCS_HTTP_URL": url,
                "GOOGLE_CLOUD_PROJECT": "some-project",
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": "any",  # or tensorstore looks for a metadata server
            },
        )
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
