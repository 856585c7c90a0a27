"""Text behind s3://, https:// and hf: is the text of the same files on a disk, and is prepared there and back."""

import contextlib
import dataclasses
import datetime
import functools
import http.server
import ipaddress
import json
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bothways.data import corpora, preparing, stores
from bothways.data.config import DataConfig
from bothways.errors import InputError
from tests.data.test_prepared import assert_same, jsonl, read, texts, vocabulary  # noqa: F401  (a fixture)


@pytest.fixture
def here(tmp_path, vocabulary) -> DataConfig:  # noqa: F811
    (tmp_path / "raw").mkdir()
    for number, count in enumerate((53, 71)):
        (tmp_path / "raw" / f"{number}.jsonl").write_bytes(jsonl(texts(count, number)))
    return DataConfig(corpus=str(tmp_path / "raw"), tokenizer=str(vocabulary), cache=str(tmp_path / "cache"))


class Server(http.server.SimpleHTTPRequestHandler):
    """Files; with `ranges` parts of them, with `sizes` it says how long they are."""

    ranges = sizes = True

    def log_message(self, *_):
        """Says nothing."""

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return self.send_error(404)
        raw = path.read_bytes()
        wanted = self.headers.get("Range", "").removeprefix("bytes=")
        part = bool(wanted) and self.ranges
        first, _, last = wanted.partition("-") if part else ("0", "", "")
        sent = raw[int(first) : int(last) + 1 if last else None]
        self.send_response(206 if part else 200)
        if part:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(sent) - 1}/{len(raw)}")
        if self.sizes:
            self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(sent)
        return None

    def do_HEAD(self):
        self.do_GET()


@contextlib.contextmanager
def serving(folder: str, certificate: Path | None = None, **how: bool) -> Iterator[str]:
    """The URL of a server of a folder's files."""
    handler = functools.partial(type("Serves", (Server,), how), directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *_: None  # a client that does not trust it hangs up
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http{'' if certificate is None else 's'}://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize(("ranges", "sizes"), [(True, True), (False, True), (False, False)])
def test_text_behind_http(here, tmp_path, ranges, sizes):
    with serving(here.corpus, ranges=ranges, sizes=sizes) as url:
        there = dataclasses.replace(here, corpus=f"{url}/0.jsonl", cache=here.cache + "-there")
        local = dataclasses.replace(here, corpus=f"{here.corpus}/0.jsonl")
        for split in corpora.Corpus.splits:
            assert_same(read(local, split), read(there, split))
        (tmp_path / "raw" / "1.txt").write_text("a " * 100_000)
        long = dataclasses.replace(there, corpus=f"{url}/1.txt")
        assert "".join(text for _, text in corpora.load(long).documents("train")) == "a " * 90_000
        with pytest.raises(InputError, match="there is no http://127.0.0.1:.*/2.txt|nothing matches"):
            corpora.load(dataclasses.replace(there, corpus=f"{url}/2.txt"))


@pytest.fixture
def certificate(tmp_path) -> Path:
    """Of this machine, with its key, that it has signed itself."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), 17, now, now + datetime.timedelta(days=1))
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = builder.add_extension(address, critical=False).sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = tmp_path / "certificate.pem"
    path.write_bytes(private + made.public_bytes(pem))
    return path


READ = """
import json, sys
from bothways.data import corpora
from bothways.data.config import DataConfig
print(json.dumps(list(corpora.load(DataConfig(corpus=sys.argv[1], cache=sys.argv[2]), copied=False).documents("train"))))
"""


def test_text_behind_https(here, tmp_path, certificate):
    """In a process of its own, since OpenSSL reads SSL_CERT_FILE once."""
    local = dataclasses.replace(here, corpus=f"{here.corpus}/0.jsonl")
    with serving(here.corpus, certificate) as url:
        argv = [sys.executable, "-c", READ, f"{url}/0.jsonl", here.cache + "-there"]
        ended = subprocess.run(argv, env=os.environ | {"SSL_CERT_FILE": str(certificate)}, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        found = [tuple(document) for document in json.loads(ended.stdout)]
        assert found == list(corpora.load(local, copied=False).documents("train"))


def test_a_host_that_nobody_vouches_for_and_one_that_is_not_there(here, certificate, monkeypatch):
    monkeypatch.setattr(stores, "TRIES", 2)
    with serving(here.corpus, certificate) as url:
        there = dataclasses.replace(here, corpus=f"{url}/0.jsonl")
        with pytest.raises(InputError, match="CERTIFICATE_VERIFY_FAILED.*SSL_CERT_FILE names"):
            corpora.load(there)
    with pytest.raises(InputError, match="does not answer .*Cannot connect"):
        corpora.load(there)


@pytest.fixture
def bucket(monkeypatch):
    """An object store that speaks S3."""
    moto = pytest.importorskip("moto.server", reason="pip install 'moto[server]'")
    s3fs = pytest.importorskip("s3fs", reason="pip install 'bothways[s3]'")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "any")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    s3fs.S3FileSystem.clear_instance_cache()
    found = s3fs.S3FileSystem()
    found.mkdir("some-bucket")
    yield found
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_text_in_a_bucket_of_s3(here, tmp_path, bucket):
    bucket.put(str(tmp_path / "raw"), "some-bucket/raw", recursive=True)
    raw = dataclasses.replace(here, corpus="s3://some-bucket/raw/*.jsonl", cache=here.cache + "-there")
    preparing.prepare(raw, "s3://some-bucket/text")
    there = dataclasses.replace(raw, corpus="s3://some-bucket/text")
    for split in corpora.Corpus.splits:
        assert_same(read(here, split), read(there, split))
        assert_same(read(here, split), read(raw, split))
    with pytest.raises(InputError, match="no-such-bucket"):
        corpora.load(dataclasses.replace(raw, corpus="s3://no-such-bucket/a.jsonl"))


@pytest.mark.parametrize("copied", [True, False])
def test_a_set_of_hugging_face(here, tmp_path, monkeypatch, copied):
    """A directory of its files; one on the Hub is read the same way."""
    datasets = pytest.importorskip("datasets", reason="pip install 'bothways[hf]'")
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    there = dataclasses.replace(here, corpus=f"hf:{here.corpus}")
    found = corpora.load(there, copied=copied)
    for split in corpora.Corpus.splits:
        expected = [text for _, text in corpora.load(here).documents(split)]
        assert [text for _, text in found.documents(split)] == expected
    assert corpora.load(there).fingerprint == found.fingerprint
    (tmp_path / "raw" / "test.jsonl").write_bytes(jsonl(["held out"]))
    for number in range(2):
        (tmp_path / "raw" / f"{number}.jsonl").rename(tmp_path / "raw" / f"train-{number}.jsonl")
    split = corpora.load(there, copied=copied)
    assert [text for _, text in split.documents("validation")] == ["held out"]
    assert len(list(split.documents("train"))) == 53 + 71
    with pytest.raises(InputError, match="no text under 'body'; the fields are text; choose one with --data.text-field"):
        list(corpora.load(dataclasses.replace(there, text_field="body"), copied=copied).documents("train"))
    with pytest.raises(InputError, match="cannot be had"):
        corpora.load(dataclasses.replace(there, corpus=f"hf:{tmp_path}/nothing"))
