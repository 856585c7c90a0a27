"""Labels: several at once, weighted, and how sure answers are and what is taken for what."""

import collections
import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bothways
from bothways.config import FinetuneConfig
from bothways.data import metrics, tasks
from bothways.data.task_examples import TaskRows, label_weights
from bothways.data.tasks import Task
from bothways.errors import InputError
from bothways.train.finetune import finetune
from bothways.train.objectives.labels import item_weights, task_loss
from tests.train.bodies import WORDS, body, dog_task

pytestmark = pytest.mark.usefixtures("one_device")

QUICK = FinetuneConfig(
    epochs=4, patience=4, batch_size=16, learning_rates=(1e-2,), seeds=1, scratch=False, dropout=0.0, optimizer="adamw"
)


def file_of_lists(path, count=260):
    """Texts whose labels are those of three words that stand in them."""
    rng = np.random.default_rng(0)
    texts = [list(rng.choice([*WORDS, "dog"], 5)) for _ in range(count)]
    named = {"dog": "animal", "king": "man", "fool": "man", "ship": "thing"}
    lines = [{"text": " ".join(t), "label": sorted({named[w] for w in t if w in named})} for t in texts]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def test_a_text_may_have_several_labels(tiny, tmp_path):
    lines = file_of_lists(tmp_path / "many.jsonl")
    task = tasks.load(str(tmp_path / "many.jsonl"))
    assert (task.kind, task.labels, task.metrics) == ("multilabel", ("animal", "man", "thing"), ("micro_f1", "macro_f1"))
    assert any(not item["label"] for item in task.splits["train"])  # none of them is an answer too
    result = finetune(body("bert", tiny), task, tmp_path / "run", QUICK)
    assert result.value > result.baselines["majority"] + 0.1
    assert set(result.metrics) == {"loss", "micro_f1", "macro_f1", "calibration_error"}
    assert result.confusion is None
    found = bothways.load(tmp_path / "run").predict([line["text"] for line in lines[:40]])
    for each in found:
        assert list(each.p) == list(task.labels)
        assert each.label == [label for label, p in each.p.items() if p >= 0.5]
    assert len({len(each.label) for each in found}) > 1


def test_each_label_is_a_decision_of_its_own():
    scores = jnp.array([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]])
    has = np.array([[1, 0, 0], [1, 1, 0]], np.float32)
    batch = {"labels": has, "weight": np.array([1, 0], np.float32)}  # the second row fills the batch
    batch["label_weights"] = np.array([[5, 1, 1], [1, 1, 1]], np.float32)
    p = 1 / (1 + np.exp(-np.asarray(scores[0])))
    loss = task_loss("multilabel", scores, batch)
    np.testing.assert_allclose(loss.nats, -(5 * math.log(p[0]) + math.log(1 - p[1]) + math.log(1 - p[2])), rtol=1e-5)
    assert (float(loss.correct), float(jnp.sum(item_weights(batch)))) == (6, 7)
    gold, got = [frozenset("ab"), frozenset("a"), frozenset()], [["a"], ["a", "b"], ["b"]]
    assert metrics.compute("micro_f1", gold, got) == pytest.approx(2 * 2 / (3 + 4))
    assert metrics.compute("macro_f1", gold, got) == pytest.approx((1 + 0) / 2)
    rare, nothing = [frozenset("a"), *[frozenset()] * 19], [frozenset()] * 20
    for metric in ("micro_f1", "macro_f1"):  # of one label: that it is absent is no label
        assert metrics.compute(metric, rare, nothing) == 0
        assert metrics.compute(metric, rare, [frozenset("a"), frozenset("a"), *nothing[2:]]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([["a"], "b"], "no list as others are"),
        ([["a"], ["b", " "]], "an empty label"),
        ([[], []], "no item to train on has a label"),
    ],
)
def test_lists_of_labels_that_are_none(tmp_path, lines, says):
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps({"text": "the king", "label": label}) + "\n" for label in lines * 8))
    with pytest.raises(InputError, match=says):
        tasks.load(str(path))


# ---- weights of labels ---------------------------------------------------------------------------------------------


def of_labels(kind, labels):
    key = {"tag": "words"}.get(kind, "text")
    items = [{key: ["the"] * len(label) if kind == "tag" else "the", "label": label} for label in labels]
    return Task("few", kind, {"train": items}, ("a", "b", "c"), ("accuracy",))


def test_balanced_labels_count_the_same_in_sum():
    classify = of_labels("classify", list("aaaaabbc"))
    found = label_weights(("balanced",), classify)
    np.testing.assert_allclose(found, [8 / 15, 8 / 6, 8 / 3])
    np.testing.assert_allclose(found * [5, 2, 1], 8 / 3)
    np.testing.assert_allclose(
        label_weights(("balanced",), of_labels("tag", [["a", "a"], ["a", "b", "c"]])), [5 / 9, 5 / 3, 5 / 3]
    )
    np.testing.assert_allclose(
        label_weights(("balanced",), of_labels("multilabel", [["a"], ["a", "b"], [], ["c"]])), [1, 3, 3]
    )
    np.testing.assert_allclose(label_weights(("c=2.5",), classify), [1, 1, 2.5])
    assert label_weights((), classify) is None


@pytest.mark.parametrize("spec", [("d=2",), ("a=0",), ("a=nan",), ("a",), ("balanced", "a=2")])
def test_weights_that_are_none(spec):
    with pytest.raises(InputError, match="wanted balanced, or LABEL=WEIGHT"):
        label_weights(spec, of_labels("classify", list("abc")))


def test_weights_are_for_labels():
    with pytest.raises(InputError, match="dogs is a regress task, which has none"):
        label_weights(("balanced",), dog_task("regress", train=8))


def test_weights_stand_in_training_rows_and_multiply_the_loss(tiny):
    run, task = body("bert", tiny), dog_task("classify", train=16)
    rows = TaskRows(task.splits["train"], task, run.tokenizer, 24, weights=np.array([3.0, 0.5]))
    batch = rows.batch(np.arange(16), 24)
    np.testing.assert_allclose(batch["weight"], np.where(batch["label"] == 0, 3, 0.5))
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(16, 2)))
    nats = -np.asarray(jax.nn.log_softmax(scores))[np.arange(16), batch["label"]]
    np.testing.assert_allclose(task_loss("classify", scores, batch).nats, np.sum(nats * batch["weight"]), rtol=1e-5)
    tags = dog_task("tag", train=8)
    rows = TaskRows(tags.splits["train"], tags, run.tokenizer, 24, weights=np.array([3.0, 0.5]))
    batch = rows.batch(np.arange(8), 24)
    np.testing.assert_allclose(batch["weight"], np.where(batch["word"] < 0, 0, np.where(batch["label"] == 0, 3, 0.5)))


# ---- how sure, and what for what -----------------------------------------------------------------------------------


def test_calibration_is_measured_in_bins():
    """Ten answers with 0.95 of which 7 are right, ten with 0.35 of which 5 are: (10 x 0.25 + 10 x 0.15) / 20."""
    p, right = [0.95] * 10 + [0.35] * 10, [True] * 7 + [False] * 3 + [True, False] * 5
    assert metrics.calibration_error(p, right) == pytest.approx(0.2)
    assert metrics.calibration_error([1.0, 0.0], [True, False]) == 0
    assert metrics.decisions_of("regress", [1.0], [(0.5, None)]) == ([], [])
    assert metrics.decisions_of("tag", [["a", "b"]], [(["a", "a"], [0.6, 0.7])]) == ([0.6, 0.7], [True, False])
    found = metrics.decisions_of("multilabel", [frozenset("a")], [(["a", "b"], {"a": 0.8, "b": 0.6, "c": 0.1})])
    assert found == ([0.8, 0.6, 0.9], [True, False, True])


def test_a_grid_reports_what_is_taken_for_what(tiny, tmp_path):
    task = dog_task("classify", train=48)
    result = finetune(
        body("gpt", tiny), task, tmp_path / "run", dataclasses.replace(QUICK, epochs=1, class_weights=("dog=2",))
    )
    assert result.confusion["labels"] == ["dog", "none"]
    counts = np.array(result.confusion["counts"])
    gold = [item["label"] for item in task.splits["test"]]
    assert counts.sum(axis=1).tolist() == [gold.count("dog"), gold.count("none")]
    assert np.trace(counts) / counts.sum() == pytest.approx(result.value, abs=1e-4)
    assert result.metrics["accuracy"] == result.value
    assert (tmp_path / "run" / "confusion.png").read_bytes().startswith(b"\x89PNG")
    found = bothways.load(tmp_path / "run").predict([item["text"] for item in task.splits["test"]])
    assert metrics.confusion(task.labels, gold, [f.label for f in found]) == counts.tolist()
    gaps = collections.defaultdict(float)
    for label, f in zip(gold, found, strict=True):
        gaps[int(15 * f.p)] += f.p - (f.label == label)  # by fifteenths of confidence
    wanted = sum(map(abs, gaps.values())) / len(gold)
    assert result.metrics["calibration_error"] == pytest.approx(wanted, abs=2e-4)
