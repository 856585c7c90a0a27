"""Prepared text: what `prepare` writes, that it is what files give, and what is refused."""

import dataclasses
import gzip
import json
import os
import random
from pathlib import Path

import fsspec
import numpy as np
import pytest
import zstandard

from bothways.data import corpora, engine, prepared, preparing, tokens
from bothways.data.config import DataConfig
from bothways.data.stores import Folder
from bothways.data.tokenizer import train
from bothways.errors import InputError

WORDS = [f"w{n * 7919 % 1009:x}" for n in range(97)]


def texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 23))) + "." for _ in range(count)]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary") / "a.model"
    train(texts(200), "bpe", 311).save(path)
    return path


def jsonl(documents: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()


@pytest.fixture
def cfg(tmp_path, vocabulary, monkeypatch) -> DataConfig:
    """Three files, each a part of its own, of several shards."""
    monkeypatch.setattr(preparing, "PART_BYTES", (1, 1))
    monkeypatch.setattr(preparing, "SHARD_TOKENS", 4001)
    monkeypatch.setattr(prepared, "BLOCK", 1024)
    monkeypatch.setattr(tokens, "BATCH", 62)
    for number, count in enumerate((211, 307, 101)):
        (tmp_path / f"{number}.jsonl").write_bytes(jsonl(texts(count, number)))
    return DataConfig(corpus=str(tmp_path / "*.jsonl"), tokenizer=str(vocabulary), cache=str(tmp_path / "cache"))


def read(cfg: DataConfig, split: str = "train") -> tokens.Tokens:
    corpus = corpora.load(cfg)
    return tokens.prepare(corpus, split, tokens.obtain_tokenizer(cfg, corpus), cfg.cache)


def elsewhere(cfg: DataConfig, to: Path | str) -> DataConfig:
    """The same text, where it is prepared, on a machine that has not seen it."""
    return dataclasses.replace(cfg, corpus=str(to), cache=cfg.cache + "-elsewhere")


def assert_same(a: tokens.Tokens, b: tokens.Tokens) -> None:
    np.testing.assert_array_equal(a.ids[0 : len(a.ids)], b.ids[0 : len(b.ids)])
    np.testing.assert_array_equal(a.starts, b.starts)
    assert a.bytes == b.bytes


def test_prepared_text_is_what_its_files_give(cfg, tmp_path):
    done = preparing.prepare(cfg, str(tmp_path / "text"))
    there = elsewhere(cfg, tmp_path / "text")
    assert done.documents == 211 + 307 + 101
    assert done.shards > 3
    for split in corpora.Corpus.splits:
        assert_same(read(cfg, split), read(there, split))
    assert corpora.load(there).fingerprint == corpora.load(cfg).fingerprint  # so a run may go on with either
    assert [t for _, t in corpora.load(there).documents("test")] == [t for _, t in corpora.load(cfg).documents("test")]


def test_twenty_lines_of_numpy_read_it(cfg, tmp_path):
    """The lines of docs/data.md."""
    preparing.prepare(cfg, str(tmp_path / "text"))
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    code = next(part for part in page.split("```python\n")[1:] if "manifest.json" in part).split("```")[0]
    assert len(code.splitlines()) <= 20
    names: dict = {}
    exec(code.replace("DIR", str(tmp_path / "text")), names)
    np.testing.assert_array_equal(names["ids"], read(cfg).ids)
    np.testing.assert_array_equal(names["starts"], read(cfg).starts)


def test_finished_parts_are_not_done_again(cfg, tmp_path, monkeypatch):
    to, made = tmp_path / "text", []
    once = preparing.tokenise

    def tokenise(work, part):
        if part.number == 2 and -1 not in made:
            raise KeyboardInterrupt
        made.append(part.number)
        return once(work, part)

    monkeypatch.setattr(preparing, "tokenise", tokenise)
    with pytest.raises(KeyboardInterrupt):
        preparing.prepare(cfg, str(to))
    assert made == [0, 1]
    assert not (to / "manifest.json").exists()
    made.append(-1)
    preparing.prepare(cfg, str(to))
    assert made == [0, 1, -1, 2]
    assert_same(read(cfg), read(elsewhere(cfg, to)))
    assert {p.suffix for p in to.iterdir()} == {".json", ".model", ".ids", ".starts"}
    preparing.prepare(cfg, str(to))  # whole: nothing is left to do
    assert made == [0, 1, -1, 2]


@pytest.mark.parametrize("packed", [".zst", ".gz", ""])
def test_text_behind_a_url_is_prepared_and_read_there(cfg, tmp_path, packed):
    """fsspec's store in memory stands in for one behind a network."""
    store = fsspec.filesystem("memory")
    pack = {".zst": zstandard.ZstdCompressor().compress, ".gz": gzip.compress, "": bytes}[packed]
    for number in range(3):
        store.pipe_file(f"/raw{packed}/{number}.jsonl{packed}", pack((tmp_path / f"{number}.jsonl").read_bytes()))
    raw = dataclasses.replace(cfg, corpus=f"memory://raw{packed}/*.jsonl{packed}")
    preparing.prepare(raw, f"memory://text{packed}")
    assert_same(read(cfg), read(elsewhere(cfg, f"memory://text{packed}")))
    assert_same(read(cfg), read(dataclasses.replace(raw, cache=str(tmp_path / "third"))))  # and unprepared


def test_few_documents_and_pairs(cfg, tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(texts(300)))
    story = dataclasses.replace(cfg, corpus=str(tmp_path / "a.txt"))
    preparing.prepare(story, str(tmp_path / "story"))
    assert_same(read(story, "validation"), read(elsewhere(story, tmp_path / "story"), "validation"))
    for n in range(2):
        rows = zip(texts(101, n), texts(101, n + 7), strict=True)
        (tmp_path / f"p{n}.jsonl").write_text("".join(json.dumps({"a": a, "b": b}) + "\n" for a, b in rows))
    pairs = dataclasses.replace(cfg, corpus=str(tmp_path / "p*.jsonl"), source_field="a", target_field="b")
    preparing.prepare(pairs, str(tmp_path / "pairs"))
    for split in ("train", "test"):
        assert_same(read(pairs, split), read(elsewhere(pairs, tmp_path / "pairs"), split))


def test_what_the_store_says_tells_texts_apart(cfg):
    store = fsspec.filesystem("memory")
    found = []
    for content in (jsonl(texts(50)), jsonl(texts(50)), jsonl(texts(51))):
        store.pipe_file("/output/a.jsonl", content)
        store.store["/output/a.jsonl"].created = f"a checksum of {len(content)}"
        found.append(corpora.load(dataclasses.replace(cfg, corpus="memory://output/a.jsonl"), copied=False).fingerprint)
    assert found[0] == found[1] != found[2]


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.fixture
def there(cfg, tmp_path) -> DataConfig:
    preparing.prepare(cfg, str(tmp_path / "text"))
    return elsewhere(cfg, tmp_path / "text")


def change(path: Path, how: str) -> None:
    raw = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "cut short":
        path.write_bytes(raw[:-2])
    else:
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)


@pytest.mark.parametrize(
    ("name", "how", "says"),
    [
        ("train-00001-000.ids", "missing", "is missing"),
        ("train-00001-000.ids", "cut short", "has .* bytes, and its manifest says"),
        ("train-00001-000.ids", "altered", "is altered"),
        ("train-00001-000.starts", "altered", "is altered"),
        ("manifest.json", "cut short", "no manifest of prepared text"),
        ("tokenizer.model", "altered", "tokenizer"),
    ],
)
def test_damaged_text_is_refused_and_nothing_is_left(there, tmp_path, name, how, says):
    change(tmp_path / "text" / name, how)
    with pytest.raises(InputError, match=says):
        read(there)
    assert not list(Path(there.cache).glob("tokens/*"))


def test_an_altered_count_is_noticed(there, tmp_path):
    path = tmp_path / "text" / "manifest.json"
    path.write_text(path.read_text().replace('"documents": ', '"documents": 1', 1))
    with pytest.raises(InputError, match="is altered"):
        read(there)


def test_another_version_another_tokenizer_other_text(there, cfg, tmp_path):
    other = tmp_path / "b.model"
    train(texts(200, 1), "bpe", 307).save(other)
    with pytest.raises(InputError, match="prepared with another tokenizer"):
        read(dataclasses.replace(there, tokenizer=str(other)))
    with pytest.raises(InputError, match="holds other prepared text"):
        preparing.prepare(dataclasses.replace(cfg, corpus=str(tmp_path / "1.jsonl")), str(tmp_path / "text"))
    with pytest.raises(InputError, match="prepared from plain text"):
        corpora.load(dataclasses.replace(there, source_field="a", target_field="b"))
    with pytest.raises(InputError, match="has its own held-out text"):
        corpora.load(dataclasses.replace(there, validation="x.txt"))
    with pytest.raises(InputError, match="give an empty directory"):
        preparing.prepare(cfg, str(tmp_path))
    path = tmp_path / "text" / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2', 1))
    with pytest.raises(InputError, match="has format 2"):
        read(there)


def test_workers_take_the_tokenizer_of_this_call(cfg, tmp_path):
    """Not what a call that was stopped, with another, left in the directory."""
    to = tmp_path / "text"
    (to / preparing.DONE).mkdir(parents=True)
    (to / preparing.DONE / "tokenizer.json").write_text("{}")
    preparing.prepare(cfg, str(to))
    assert_same(read(cfg), read(elsewhere(cfg, to)))


def test_another_vocabulary_of_the_same_name_is_refused(cfg, tmp_path):
    to, other = tmp_path / "text", tmp_path / "other" / Path(cfg.tokenizer).name
    preparing.prepare(cfg, str(to))
    preparing.prepare(cfg, str(to))  # as it was
    other.parent.mkdir()
    train(texts(200, 1), "bpe", 307).save(other)
    with pytest.raises(InputError, match="was prepared with another tokenizer"):
        preparing.prepare(dataclasses.replace(cfg, tokenizer=str(other)), str(to))


def test_a_recipe_with_another_vocabulary_is_refused(cfg, tmp_path):
    learned = dataclasses.replace(cfg, tokenizer="bpe", vocab_size=313)
    preparing.prepare(learned, str(tmp_path / "text"))
    assert_same(read(learned), read(elsewhere(learned, tmp_path / "text")))
    with pytest.raises(InputError, match="--data.tokenizer bpe --data.vocab-size 313"):
        read(elsewhere(dataclasses.replace(learned, vocab_size=317), tmp_path / "text"))


@pytest.mark.parametrize(
    ("corpus", "says"),
    [("memory://nowhere/*.jsonl", "nothing matches"), ("memory://nowhere/a.jsonl", "nothing matches|there is no")],
)
def test_no_such_object(cfg, corpus, says):
    with pytest.raises(InputError, match=says):
        corpora.load(dataclasses.replace(cfg, corpus=corpus))


def test_a_part_that_cannot_be_read_is_told(cfg, tmp_path):
    (tmp_path / "1.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(InputError, match="line 2: no text under 'text'"):
        preparing.prepare(cfg, str(tmp_path / "text"))
    assert not (tmp_path / "text" / "manifest.json").exists()


def test_workers_prepare_the_same_and_say_what_is_wrong(cfg, tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "BLOCK", 2**20)  # as the workers have it
    preparing.prepare(cfg, str(tmp_path / "text"), workers=2)
    assert_same(read(cfg), read(elsewhere(cfg, tmp_path / "text")))
    (tmp_path / "1.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(InputError, match="line 2: no text under 'text'"):
        preparing.prepare(cfg, str(tmp_path / "other"), workers=2)


def ends(work, part):
    os._exit(9)


def test_a_worker_that_is_killed_is_told(cfg, tmp_path):
    with (
        engine.engine(2) as run,
        pytest.raises(InputError, match="a worker ended before its part was done"),
    ):
        run(ends, engine.Work(cfg, Folder(str(tmp_path / "text")), "key"), [engine.Part(0), engine.Part(1)])


def test_beam_prepares_the_same(cfg, tmp_path):
    pytest.importorskip("apache_beam", reason="Apache Beam is not installed")
    cfg = dataclasses.replace(cfg, corpus=str(tmp_path / "*.jsonl"))
    preparing.prepare(cfg, str(tmp_path / "text"), beam=("--runner=DirectRunner",))
    assert_same(read(cfg), read(elsewhere(cfg, tmp_path / "text")))
