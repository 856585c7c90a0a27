"""Corpora of the TFDS catalogue: their splits, and why one cannot be had."""

from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from bothways.data import corpora
from bothways.errors import InputError
from tests.data.helpers import everything, load


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


class BothwaysTestSet(tfds.core.GeneratorBasedBuilder):
    """A dataset as the TFDS catalogue has them."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name="plain", version="1.0.0"),
        tfds.core.BuilderConfig(name="held", version="1.0.0"),
        tfds.core.BuilderConfig(name="broken", version="1.0.0"),
    ]
    name = "bothways_test_set"

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "title": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        if self.builder_config.name == "broken":
            raise ModuleNotFoundError("No module named 'apache_beam'")
        splits = {"train": 100} | ({"test": 3} if self.builder_config.name == "held" else {})
        return {split: self._generate_examples(split, n) for split, n in splits.items()}

    def _generate_examples(self, split, n):
        for i in range(n):
            yield i, {"text": f"{split} text {i}", "title": f"title {i}"}


@pytest.fixture
def catalogue(tmp_path, monkeypatch):
    """TFDS keeps what it prepares in a directory of the test."""
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "tensorflow_datasets"))


def test_a_catalogue_set_without_held_out_text_is_cut_at_its_end(catalogue, cache):
    splits = everything(load("bothways_test_set/plain", cache))
    texts = [text for split in ("train", "validation", "test") for _, text in splits[split]]
    assert texts == [f"train text {i}" for i in range(100)]
    assert [len(splits[split]) for split in ("train", "validation", "test")] == [98, 1, 1]


def test_a_catalogue_set_keeps_its_own_splits(catalogue, cache):
    splits = everything(load("bothways_test_set/held", cache, text_field="title"))
    assert len(splits["train"]) == 100
    assert [text for _, text in splits["validation"]] == [text for _, text in splits["test"]]
    assert [text for _, text in splits["test"]] == [f"title {i}" for i in range(3)]


def test_a_validation_file_replaces_that_of_a_catalogue_set(catalogue, tmp_path, cache):
    held = tmp_path / "held.txt"
    held.write_text("one")
    own = load("bothways_test_set/held", cache)
    first = load("bothways_test_set/held", cache, validation=str(held))
    assert [text for _, text in first.documents("validation")] == ["one"]
    assert list(first.documents("test")) == list(own.documents("test"))
    held.write_text("two")
    second = load("bothways_test_set/held", cache, validation=str(held))
    assert len({own.fingerprint, first.fingerprint, second.fingerprint}) == 3


def test_a_missing_field_of_a_catalogue_set_is_refused_with_those_that_are_there(catalogue, cache):
    with pytest.raises(InputError, match="has no field 'body'; it has text, title; choose one with --data.text-field"):
        load("bothways_test_set/plain", cache, text_field="body")


@pytest.mark.parametrize("name", ["bothways_test_set/nonsense", "bothways_test_set/plain:7.0.0"])
def test_an_unknown_config_or_version_of_a_catalogue_set_is_refused(catalogue, cache, name):
    with pytest.raises(
        InputError, match=f"TFDS cannot make '{name}': .*(nonsense not found|cannot be loaded at version 7)"
    ):
        load(name, cache)


def test_a_catalogue_set_that_cannot_be_prepared_here_says_why(catalogue, cache):
    with pytest.raises(InputError, match=r"'bothways_test_set/broken' cannot be had here: it needs Apache Beam"):
        load("bothways_test_set/broken", cache)


@pytest.mark.parametrize(
    ("name", "near"),
    [("wikipdia", "wikipedia"), ("lm1", "lm1b"), ("shakespear", "shakespeare"), ("wikipdia/20230601.en", "wikipedia")],
)
def test_an_unknown_name_suggests_the_near_one(cache, name, near):
    with pytest.raises(InputError, match=rf"no corpus '{name}': .* did you mean .*\b{near}\b"):
        load(name, cache)


def test_a_name_near_nothing_suggests_nothing(cache):
    with pytest.raises(InputError, match="not a TFDS name$"):
        load("qqqqzzzz", cache)


def chained(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (ModuleNotFoundError("No module named 'tensorflow'"), "unpacks with TensorFlow"),
        (
            chained(RuntimeError("extraction failed"), ImportError("cannot import name 'tensorflow'")),
            "unpacks with TensorFlow",
        ),
        (ModuleNotFoundError("No module named 'apache_beam'"), "needs Apache Beam"),
        (chained(ValueError("cannot prepare"), AttributeError("module has no attribute 'beam'")), "needs Apache Beam"),
        (ConnectionError("Max retries exceeded"), "could not be downloaded"),
        (chained(OSError("failed"), TimeoutError("after 10 s")), "could not be downloaded"),
        (ConnectionError("https://download.tensorflow.org/data/x.zip"), "could not be downloaded"),
        (ConnectionError("https://sunbeam.org/x.zip"), "could not be downloaded"),
        (OSError("no space left on /home/x/tensorflow_datasets/a"), "OSError: no space left"),
    ],
)
def test_the_reason_why_a_set_is_unavailable_is_told_apart(error, why):
    message = corpora.unavailable("some_set", error)
    assert message.startswith("TFDS dataset 'some_set' cannot be had here: ")
    assert why in message
