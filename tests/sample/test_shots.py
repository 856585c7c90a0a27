"""Examples in the prompt: which ones, what is scored, and what a run cannot do."""

import collections
import dataclasses
import json
import random

import numpy as np
import pytest

import bothways
from bothways.data.task_examples import softmax
from bothways.errors import InputError
from bothways.sample.open import open_model
from bothways.sample.score import causal_logprobs
from bothways.sample.shots import FewShotPredictor
from tests.train import bodies
from tests.train.bodies import body, dog_task, write

SHOWN = "Text: {}\nLabel:{}"
CONTEXT = 181


@pytest.fixture(scope="module")
def runs(tiny):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bodies, "LENGTH", CONTEXT)
        return {family: body(family, tiny) for family in ("gpt", "bert")}


@pytest.fixture(scope="module")
def models(runs):
    return {family: open_model(run) for family, run in runs.items()}


def test_answers_are_compared_by_likelihood_per_token_behind_drawn_examples(models):
    model, task = models["gpt"], dog_task("classify", train=19, held=5)
    few = FewShotPredictor(model, task, 3, seed=7, words=("none=no such thing",))
    found = list(few.predict(task.splits["test"]))
    said = {"dog": " dog", "none": " no such thing"}
    for item, (label, p) in zip(task.splits["test"], found, strict=True):
        question = SHOWN.format(item["text"], "")
        drawn = random.Random(f"7 {question}").sample(task.splits["train"], 3)
        text = "".join(SHOWN.format(d["text"], said[d["label"]]) + "\n\n" for d in drawn) + question
        encode, per_token = model.tokenizer.encode, []
        for name in task.labels:
            ids, first = [model.tokenizer.bos, *encode(text + said[name])], 1 + len(encode(text))
            assert ids[1:first] == encode(text)
            (nats,) = causal_logprobs(model.run.module, model.run.params, [ids], CONTEXT, first=[first])
            per_token.append(nats / (len(ids) - first))
        wanted = softmax(np.array(per_token))
        assert p == pytest.approx(wanted.max(), abs=1e-4)
        assert label == task.labels[wanted.argmax()]
    alone = list(few.predict(task.splits["test"][2:3]))  # neighbours change nothing
    assert alone[0][0] == found[2][0]
    assert alone[0][1] == pytest.approx(found[2][1], abs=1e-5)
    other = FewShotPredictor(model, task, 3, seed=8, words=("none=no such thing",))
    assert [p for _, p in other.predict(task.splits["test"])] != [p for _, p in found]


def test_examples_that_do_not_fit_are_left_out(models):
    task = dog_task("classify", train=19, held=5)
    few = FewShotPredictor(models["gpt"], task, 19)
    context, answers = few.prompt(task.splits["test"][0])
    assert few.left_out > 0
    assert CONTEXT - 40 < len(context) <= few.scores.room(max(map(len, answers)))
    assert models["gpt"].tokenizer.decode(context).endswith(SHOWN.format(task.splits["test"][0]["text"], ""))


def test_a_masked_run_answers_too_and_choices_are_texts(models):
    task = dog_task("classify", train=7, held=5)
    predictor, gaps = FewShotPredictor(models["bert"], task, 2), collections.defaultdict(float)
    few = predictor.measure()
    for item, (label, p) in zip(task.splits["test"], predictor.predict(task.splits["test"]), strict=True):
        gaps[int(15 * p)] += p - (label == item["label"])  # by fifteenths of confidence
    assert few.metrics["calibration_error"] == pytest.approx(sum(map(abs, gaps.values())) / 5, abs=1e-4)
    assert (few.rule, few.n, few.shots, few.metric, few.tested_on) == ("pll_word", 5, 2, "accuracy", "test")
    assert few.interval[0] <= few.value <= few.interval[1]
    assert set(few.metrics) == {"accuracy", "macro_f1", "calibration_error"}
    task = dog_task("choice", train=7, held=5)
    choose = FewShotPredictor(models["gpt"], task, 1)
    item = task.splits["test"][0]
    (found,) = choose.lines(["\t".join([item["text"], *item["choices"]])])
    ((number, p),) = choose.predict([item])
    assert (found.label, found.p) == (item["choices"][number], pytest.approx(p, abs=1e-4))


@pytest.mark.parametrize(
    ("kind", "options", "says"),
    [
        ("tag", {"shots": 1}, "compares labels or choices, and dogs is a tag task"),
        ("classify", {"shots": 20}, "shots is 20; dogs has 7 training items"),
        ("classify", {"shots": -1}, "shots is -1"),
        ("classify", {"shots": 1, "words": ("cat=x",)}, "wanted LABEL=WORDS"),
        ("classify", {"shots": 1, "words": ("none=dog",)}, "the same words"),
        ("choice", {"shots": 1, "words": ("none=dog",)}, "choices are texts of their own"),
        ("classify", {"shots": 1, "rule": "pll"}, "'pll' is not for this run"),
    ],
)
def test_what_is_refused(models, kind, options, says):
    with pytest.raises(InputError, match=says):
        FewShotPredictor(models["gpt"], dog_task(kind, train=7, held=5), **options)


def test_a_body_without_a_head_cannot(runs):
    bare = dataclasses.replace(runs["bert"].recipe.model, masked_head=False)
    run = dataclasses.replace(runs["bert"], recipe=dataclasses.replace(runs["bert"].recipe, model=bare))
    with pytest.raises(InputError, match="is a bert run that does not"):
        FewShotPredictor(open_model(run), dog_task("classify", train=7, held=5), 1)


def test_the_command(runs, tmp_path, capfd):
    write(runs["gpt"], tmp_path / "run")
    items = dog_task("classify", train=40).splits["train"]
    (tmp_path / "dogs.csv").write_text("text,label\n" + "".join(f"{i['text']},{i['label']}\n" for i in items))
    (tmp_path / "lines.txt").write_text("the king dog\nthe queen\n")
    argv = ["predict", str(tmp_path / "run"), "--shots", "2", "--task", str(tmp_path / "dogs.csv"), "--json"]
    assert bothways.main(argv) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["n"], found["shots"], found["rule"], found["tested_on"]) == (
        4,
        2,
        "causal",
        "4 items held out of train",
    )
    assert bothways.main([*argv[:2], str(tmp_path / "lines.txt"), *argv[2:]]) == 0
    lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["text"] for line in lines] == ["the king dog", "the queen"]
    assert {line["label"] for line in lines} <= {"dog", "none"}
    for bad, says in (
        (["predict", argv[1], "--shots", "2"], "--shots K and --task TASK go together"),
        (["predict", argv[1], "--seed", "2"], "--seed is for --shots"),
        (["predict", argv[1], "--rule", "pll", "--label-field", "x"], "--rule, --label-field is for --shots"),
    ):
        assert bothways.main(bad) == 2
        assert says in capfd.readouterr().err
    (tmp_path / "lines.txt").write_text("one\ttwo\n")
    assert bothways.main([*argv[:2], str(tmp_path / "lines.txt"), *argv[2:]]) == 2
    assert "wanted as many texts as the task's items have" in capfd.readouterr().err
