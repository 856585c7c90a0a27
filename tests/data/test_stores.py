"""Text behind a URL: what a store refuses is said, what it fails to answer is tried again, and nothing is half-written."""

import dataclasses
import random

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from bothways.data import corpora, preparing, stores
from bothways.data.config import DataConfig
from bothways.errors import InputError
from tests.data.test_prepared import jsonl, texts


class Refusal(Exception):
    """As gcsfs raises: a class of its own, with a code."""

    def __init__(self, code: int):
        super().__init__(f"Forbidden: {code}" if code == 403 else f"HTTP {code}")
        self.code = code


class Fickle(MemoryFileSystem):
    """A store in memory whose next answers are those in `answers`: an exception, or how many bytes come at most."""

    protocol = "fickle"
    store: dict = {}
    pseudo_dirs = [""]
    answers: list = []

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("fickle://", "memory://"))

    def unstrip_protocol(self, name):
        return f"fickle:/{self._strip_protocol(name)}"

    def _next(self):
        answer = self.answers.pop(0) if self.answers else None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def cat_file(self, path, start=None, end=None, **kwargs):
        most = self._next()
        return super().cat_file(path, start, end, **kwargs)[:most]

    def isfile(self, path):
        self._next()
        return super().isfile(path)

    def pipe_file(self, path, value, **kwargs):
        self._next()
        super().pipe_file(path, value, **kwargs)


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setattr(stores.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(stores, "TRIES", 3)
    fsspec.register_implementation("fickle", Fickle, clobber=True)
    Fickle.store.clear()
    Fickle.answers = []
    random.seed(0)
    found = fsspec.filesystem("fickle")
    found.pipe_file("/bucket/a.jsonl", jsonl(texts(101)))
    return found


@pytest.fixture
def cfg(tmp_path) -> DataConfig:
    return DataConfig(corpus="fickle://bucket/a.jsonl", tokenizer="bpe", vocab_size=311, cache=str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (FileNotFoundError("bucket"), "there is no fickle://bucket/a.jsonl .*check the name of bucket and object"),
        (Refusal(404), "there is no fickle://bucket/a.jsonl"),
        (Refusal(403), "no permission for fickle://bucket/a.jsonl .*ask its owner"),
        (Refusal(401), "no permission for"),
        (PermissionError("denied"), "no permission for"),
    ],
)
def test_a_missing_bucket_and_no_permission_are_said_at_once(store, cfg, answer, says):
    Fickle.answers = [answer]
    with pytest.raises(InputError, match=says):
        corpora.load(cfg)
    assert not Fickle.answers  # and it was not tried again


def test_what_fails_for_a_while_is_tried_again(store, cfg):
    expected = list(corpora.load(cfg, copied=False).documents("train"))
    Fickle.answers = [Refusal(503), None, OSError("reset"), 100, None]
    assert list(corpora.load(cfg, copied=False).documents("train")) == expected
    assert not Fickle.answers


def test_a_stream_that_ends_early_is_no_shorter_text(store, cfg, tmp_path):
    Fickle.answers = [None, *[100] * 3]
    with pytest.raises(InputError, match=r"fickle://bucket/a.jsonl ends early, or does not answer \(100 bytes came"):
        corpora.load(cfg)
    assert not list((tmp_path / "cache").glob("tfds/text/*/1.0.0"))


def test_a_shard_that_ends_early_is_refused(store, cfg, tmp_path):
    preparing.prepare(cfg, "fickle://bucket/text")
    there = dataclasses.replace(cfg, corpus="fickle://bucket/text", cache=str(tmp_path / "there"))
    text = corpora.load(there)
    Fickle.answers = [None, *[7] * 3]  # the tokenizer comes whole
    with pytest.raises(InputError, match="text/train-00000-000.* ends early, or does not answer"):
        list(text.documents("train"))
    Fickle.answers = [7]
    with pytest.raises(InputError, match="fickle://bucket/text/tokenizer.model is altered or cut short"):
        list(text.documents("train"))


@pytest.mark.parametrize("at", [0, 3, 5])
def test_where_nothing_may_be_written_nothing_is_left_that_looks_whole(store, cfg, at):
    corpora.load(cfg)
    Fickle.answers = []
    pipe = Fickle.pipe_file
    count = iter(range(99))

    def refused(self, path, value, **kwargs):
        if next(count) >= at:
            raise Refusal(403)
        pipe(self, path, value, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fickle, "pipe_file", refused)
        with pytest.raises(InputError, match="no permission for fickle://bucket/text/"):
            preparing.prepare(cfg, "fickle://bucket/text")
    assert not store.exists("/bucket/text/manifest.json")
    preparing.prepare(cfg, "fickle://bucket/text")  # and once it may be, the rest is done
    assert store.exists("/bucket/text/manifest.json")
