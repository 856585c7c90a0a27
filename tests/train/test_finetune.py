"""Fine-tuning: a head and the whole stack learn what a word decides, and the run that is left can be asked."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import bothways
from bothways import rundir, sharding
from bothways.config import FinetuneConfig, ObjectiveConfig
from bothways.errors import InputError
from bothways.model.task import mean_over
from bothways.sample.predict import TaskPredictor
from bothways.train import finetune as grids
from bothways.train import tuning
from bothways.train.finetune import finetune
from bothways.train.objectives.labels import task_objective
from bothways.train.steps import run_steps
from bothways.train.tuning import FinetuneRunner
from tests.train.bodies import LENGTH, batch_of, body, changed, dog_task, params_of, write

FAMILIES = ("gpt", "bert")
KINDS = ("classify", "regress", "tag", "span", "choice")
QUICK = FinetuneConfig(epochs=1, batch_size=16, learning_rates=(1e-2,), seeds=1, scratch=False, dropout=0.0)


pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def bodies(tiny):
    return {family: body(family, tiny) for family in FAMILIES}


def runner_of(run, task, cfg=QUICK) -> FinetuneRunner:
    return FinetuneRunner(run, task, cfg.settled(1, "adamw"))


def fit(runner, home, rate, seed, pretrained):
    """(best validation metric, the parameters that had it)."""
    run_steps(runner.job(home, rate, seed, pretrained))
    _, value, params = runner.best(home)
    assert runner.measure(params, "validation")[runner.lead] == pytest.approx(value)
    return value, params


def test_the_mean_over_a_text_leaves_padding_out():
    features = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    segments = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    found = mean_over(features, segments)
    np.testing.assert_allclose(found, [features[0, :3].mean(0), features[1].mean(0)], rtol=1e-6)


def test_what_is_left_open_is_settled_by_the_size_of_the_body_and_its_optimizer():
    small, large = FinetuneConfig().settled(10**6, "muon"), FinetuneConfig().settled(10**8, "adamw")
    assert (small.epochs, small.learning_rates, small.optimizer, small.pool) == (5, (3e-3,), "muon", "mean")
    assert (large.epochs, large.learning_rates, large.optimizer, large.pool) == (3, (2e-5, 3e-5, 5e-5), "adamw", "token")
    given = FinetuneConfig(epochs=2, learning_rates=(1e-4,), optimizer="adamw", pool="token")
    assert given.settled(10**6, "muon") == given


# ---- learning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "pool"), [("gpt", "token"), ("bert", "token"), ("bert", "mean")])
def test_a_word_that_decides_is_learned_and_the_run_predicts_it(bodies, family, pool, tmp_path):
    task, home = dog_task("classify", train=320), tmp_path / "tuned"
    result = finetune(bodies[family], task, home, dataclasses.replace(QUICK, epochs=4, patience=4, pool=pool))
    assert result.value >= 0.9
    assert result.interval[0] <= result.value <= result.interval[1]
    assert set(result.baselines) == {"majority", "naive_bayes"}
    assert result.baselines["majority"] < result.baselines["naive_bayes"] == 1
    assert (result.run, result.task, result.metric, result.n) == (str(home), "dogs", "accuracy", 24)
    run = bothways.load(home)
    assert isinstance(run, TaskPredictor)
    assert run.run.module.pool == pool
    found = run.predict([item["text"] for item in task.splits["test"]])
    assert all(p.label in task.labels and 0.5 <= p.p <= 1 for p in found)
    right = [p.label == item["label"] for p, item in zip(found, task.splits["test"], strict=True)]
    assert np.mean(right) >= 0.9


@pytest.mark.parametrize(
    ("kind", "family", "wanted"),
    [("tag", "gpt", 0.9), ("regress", "gpt", 0.8), ("span", "bert", 0.8), ("choice", "bert", 0.8)],
)
def test_every_kind_of_task_is_learned(bodies, kind, family, wanted, tmp_path):
    tuner = runner_of(bodies[family], dog_task(kind, train=192), dataclasses.replace(QUICK, epochs=4, patience=4))
    best, params = fit(tuner, tmp_path, 1e-2, 0, pretrained=True)
    assert best >= wanted
    assert tuner.measure(params, "test")[tuner.lead] >= wanted - 0.1


def test_a_decoder_of_whole_rows_is_tuned_as_it_was_trained(bodies, tmp_path):
    """Every token sees the whole text; but what was tuned before there was a choice opens as it was tuned."""
    for kind, fields, both, before in (
        ("diffusion", {"block_sizes": (0,)}, True, False),
        ("diffusion", {"block_sizes": (4, 0)}, False, False),
        ("hybrid", {}, True, True),
    ):
        recipe = dataclasses.replace(bodies["gpt"].recipe, objective=ObjectiveConfig(kind, **fields))
        tuner = runner_of(dataclasses.replace(bodies["gpt"], recipe=recipe), dog_task("classify"))
        assert (tuner.module.both_ways, tuner.info.null_position) == (both, "first" if both else "last")
        rundir.write_task(tmp_path, tuner.info)
        assert rundir.module_of(recipe, rundir.read_task(tmp_path)).both_ways == both
        kept = json.loads((tmp_path / "task.json").read_text())
        del kept["both_ways"]
        (tmp_path / "task.json").write_text(json.dumps(kept))
        assert rundir.module_of(recipe, rundir.read_task(tmp_path)).both_ways == before


@pytest.fixture(scope="module")
def tuners(bodies):
    """One that is compiled once, for each family."""
    cfg = dataclasses.replace(QUICK, epochs=5, patience=2, weight_decay=0.0)
    return {family: runner_of(run, dog_task("classify"), cfg) for family, run in bodies.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_reaches_the_whole_stack(tuners, bodies, family, tmp_path):
    _, params = fit(tuners[family], tmp_path, 1e-2, 0, pretrained=True)
    stack = {"gpt": "decoder", "bert": "encoder"}[family]
    old = bodies[family].params[stack]
    moved = changed(params["body"][stack], old)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(old)]
    assert len(paths) > 10
    assert [path for path in paths if path not in moved] == []


def test_weights_come_from_the_run_unless_from_scratch(tuners, bodies):
    fresh = tuners["gpt"].fresh
    tuned, scratch = (fresh(jax.random.key(3), 1e-2, body).params for body in (bodies["gpt"].params, None))
    assert changed(tuned["body"], bodies["gpt"].params) == []
    assert "['decoder']['embed']['token']['embedding']" in changed(scratch["body"], bodies["gpt"].params)
    assert changed(tuned["task_head"], scratch["task_head"]) == []
    assert changed(fresh(jax.random.key(4), 1e-2, bodies["gpt"].params).params["task_head"], tuned["task_head"]) != []


def test_what_is_compiled_serves_every_rate_and_seed(bodies):
    """From the same weights, on the same batch: the first update is twice as far at twice the rate."""
    body = bodies["gpt"].params
    tuner = runner_of(bodies["gpt"], dog_task("classify"), dataclasses.replace(QUICK, dropout=0.3))
    batch = sharding.to_global(tuner.mesh, batch_of(tuner, "train"))

    def moved(rate, seed):
        begun = jax.device_get(tuner.fresh(jax.random.key(0), rate, body).params)
        after, _ = tuner.step(tuner.fresh(jax.random.key(0), rate, body), batch, seed)
        return jax.tree.map(lambda a, b: a - b, jax.device_get(after.params), begun)

    once, twice, other = moved(1e-3, 0), moved(2e-3, 0), moved(1e-3, 1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(2 * a, b, atol=1e-6), once, twice)
    assert changed(once, other) != []  # each seed has its own dropout
    assert tuner.step._cache_size() == 1


def test_training_stops_when_validation_gets_no_better(tuners, tmp_path, monkeypatch):
    values, seen = iter([0.5, 0.6, 0.6, 0.55, 0.9]), []

    def measure(self, params, split):
        seen.append(jax.device_get(params))
        return {"accuracy": next(values), "macro_f1": 0.0, "loss": 1.0 + len(seen)}

    monkeypatch.setattr(FinetuneRunner, "measure", measure)
    run_steps(tuners["gpt"].job(tmp_path, 1e-2, 1, pretrained=True))
    step, value, params = tuners["gpt"].best(tmp_path)
    assert (value, step, len(seen)) == (
        0.6,
        2 * tuners["gpt"].per_epoch,
        4,
    )  # of two epochs with 0.6 the one with the lower loss
    assert changed(params, seen[1]) == []
    assert changed(params, seen[0]) != []


# ---- losses --------------------------------------------------------------------------------------------------------


def losses(tuner, weight: float):
    """(params) -> the loss, and every term and weight, on the first items."""
    objective, batch = task_objective(tuner.task.kind, weight), batch_of(tuner, "train")

    def found(params):
        totals = objective.weights(batch)
        sums = tuner.module.apply({"params": params}, method=lambda bound: objective.terms(bound, batch, True))
        shares = {name: term.nats / totals[name] for name, term in sums.items()}
        return sum(shares.values()), (shares, totals)

    return found


def test_the_language_model_loss_stands_beside_the_task_and_moves_the_body(bodies):
    tuner = runner_of(bodies["gpt"], dog_task("classify"))
    params = params_of(tuner)
    alone, with_lm = (jax.jit(jax.grad(losses(tuner, weight), has_aux=True))(params) for weight in (0.0, 0.5))
    assert set(alone[1][0]) == {"task"}
    assert with_lm[1][0]["task"] == pytest.approx(float(alone[1][0]["task"]), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), alone[0]["task_head"], with_lm[0]["task_head"])
    added = jax.tree.map(lambda x, y: x - y, with_lm[0]["body"], alone[0]["body"])
    assert sum(float(np.abs(x).sum()) for x in jax.tree.leaves(added)) > 0.1


@pytest.mark.parametrize("kind", ["classify", "choice"])
def test_the_language_model_loss_counts_every_token_but_the_first(bodies, kind):
    tuner = runner_of(bodies["gpt"], dog_task(kind, train=16))
    batch, params = batch_of(tuner, "train"), params_of(tuner)
    _, (shares, totals) = jax.jit(losses(tuner, 0.5))(params)
    tokens, segments = (batch[name].reshape(-1, LENGTH) for name in ("tokens", "segments"))
    assert totals == {"task": 8, "lm": sum((row > 0).sum() - 1 for row in segments)}

    def logprobs(bound):
        return jax.nn.log_softmax(bound.logits(bound(tokens, segments=segments)[0]))

    table = np.asarray(jax.jit(lambda p: bodies["gpt"].module.apply({"params": p}, method=logprobs))(params["body"]))
    asked = [table[b, t, tokens[b, t + 1]] for b, t in np.argwhere(segments[:, 1:] > 0)]
    assert float(shares["lm"]) == pytest.approx(-0.5 * np.mean(asked), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_filling_a_batch_changes_no_score(bodies, kind, monkeypatch):
    task, seen = dog_task(kind, train=8, held=13), []
    decide = tuning.decisions
    monkeypatch.setattr(
        tuning, "decisions", lambda info, scores, *rest: seen.append(scores) or decide(info, scores, *rest)
    )
    found = []
    for size in (1, 8):
        tuner = runner_of(bodies["bert"], task, dataclasses.replace(QUICK, batch_size=size))
        found.append(tuner.measure(params_of(tuner), "test"))
    for alone, together in zip(*seen, strict=True):
        np.testing.assert_allclose(alone, together, rtol=1e-4, atol=1e-5)
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    calibrated = {"calibration_error"} if kind in ("classify", "tag", "choice") else set()
    assert set(found[0]) == {"loss", *task.metrics} | calibrated


@pytest.mark.parametrize("family", FAMILIES)
def test_filling_a_text_changes_no_score(bodies, family):
    tuner = runner_of(bodies[family], dog_task("classify", train=8))
    scores = [tuner.read(params_of(tuner), batch_of(tuner, "train", length))[0] for length in (12, LENGTH)]
    assert np.std(scores[0]) > 0.01
    np.testing.assert_allclose(*scores, rtol=1e-4, atol=1e-5)


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("bert", {"lm_weight": 0.5}, "--lm-weight is for causal runs"),
        (
            "gpt",
            {"length": LENGTH + 1},
            f"length is {LENGTH + 1}; it must be between 5 and the model's context, {LENGTH}",
        ),
        ("gpt", {"length": 2}, "length is 2"),
        ("gpt", {"epochs": -1}, "epochs is -1; it cannot be negative"),
        ("gpt", {"batch_size": 0}, "batch-size is 0"),
        ("gpt", {"learning_rates": (1e-3, -1.0)}, "each must be positive"),
        ("gpt", {"learning_rates": (1e-3, float("inf"))}, "each must be positive"),
        ("gpt", {"learning_rates": (1e-3, 0.0010000001)}, "has 0.001 more than once"),
        ("gpt", {"dropout": 1.0}, r"dropout is 1.0; it must be in \[0, 1\)"),
        ("gpt", {"warmup_share": -0.1}, "warmup-share is -0.1"),
        ("gpt", {"weight_decay": -1.0}, "weight-decay is -1.0; it cannot be negative"),
    ],
)
def test_numbers_out_of_range_are_refused(bodies, tmp_path, family, fields, message):
    with pytest.raises(InputError, match=message):
        finetune(bodies[family], dog_task("classify"), tmp_path / "new", dataclasses.replace(QUICK, **fields))
    assert not (tmp_path / "new").exists()


def test_a_place_that_cannot_be_written_is_refused_before_training(bodies, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(grids, "candidate", lambda *_: pytest.fail("it trained first"))
    with pytest.raises(OSError, match="file"):
        finetune(bodies["gpt"], dog_task("classify"), tmp_path / "file" / "new", QUICK)


# ---- the command line ----------------------------------------------------------------------------------------------

TEXTS = ["the king dog", "the queen", "dog ship storm"]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    path = tmp_path_factory.mktemp("labelled") / "dogs.csv"
    items = dog_task("classify").splits["train"]
    path.write_text("text,label\n" + "".join(f"{item['text']},{item['label']}\n" for item in items))
    return str(path)


@pytest.fixture(scope="module", params=FAMILIES)
def tuned(request, bodies, labelled, tmp_path_factory):
    """(body, fine-tuned run) as directories, and what was printed."""
    import contextlib
    import io

    base = tmp_path_factory.mktemp("runs")
    write(bodies[request.param], base / "body")
    argv = ["finetune", str(base / "body"), labelled, "--workdir", str(base / "tuned"), "--epochs", "1", "--json"]
    argv += ["--learning-rates", "1e-2", "--batch-size", "16"]
    argv += ["--no-scratch", "--seeds", "2"] if request.param == "bert" else ["--lm-weight", "0.5", "--seeds", "1"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert bothways.main(argv) == 0
    return base / "body", base / "tuned", out.getvalue()


def test_finetune_prints_one_json_object(tuned):
    result = json.loads(tuned[2])
    assert list(result) == [
        "run",
        "task",
        "metric",
        "value",
        "interval",
        "n",
        "baselines",
        "selected_on",
        "tested_on",
        "metrics",
        "confusion",
    ]
    assert result["selected_on"] == "6 other items held out of train"
    assert result["tested_on"] == "6 items held out of train"
    assert (result["run"], result["task"], result["metric"], result["n"]) == (str(tuned[1]), "dogs", "accuracy", 6)
    assert 0 <= result["value"] <= 1
    assert result["interval"][0] <= result["value"] <= result["interval"][1]
    causal = bothways.load(tuned[0]).recipe.family == "gpt"
    assert set(result["baselines"]) == {"majority", "naive_bayes"} | ({"from_scratch"} if causal else set())


def test_predict_reads_a_line_each(tuned, tmp_path, capfd):
    (tmp_path / "lines.txt").write_text("".join(text + "\n" for text in TEXTS))
    assert bothways.main(["predict", str(tuned[1]), str(tmp_path / "lines.txt"), "--json"]) == 0
    found = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [list(f) for f in found] == [["text", "label", "p"]] * 3
    assert [f["text"] for f in found] == TEXTS
    assert {f["label"] for f in found} <= {"dog", "none"}
    assert [dataclasses.asdict(p) for p in bothways.load(tuned[1]).predict(TEXTS)] == found
    predictor = bothways.load(tuned[1])
    called, read = [], predictor._scores
    predictor._scores = lambda params, batch: called.append(batch["tokens"].shape) or read(params, batch)
    alone = [predictor.predict([text])[0] for text in TEXTS]
    assert (len(called), [p.label for p in alone]) == (3, [f["label"] for f in found])
    assert [p.p for p in alone] == pytest.approx([f["p"] for f in found], abs=1e-3)
    called.clear()
    assert len(predictor.predict(TEXTS * 20)) == 60
    assert len(called) == 1  # batches, not lines
    (tmp_path / "lines.txt").write_text("a dog\n" * 99 + "one\ttwo\tthree\n")
    capfd.readouterr()
    assert bothways.main(["predict", str(tuned[1]), str(tmp_path / "lines.txt")]) == 2
    out, err = capfd.readouterr()
    assert not out  # nothing is answered before it is known that all can be
    assert "wanted a text, or two texts separated by a tab" in err


def test_a_run_that_is_not_tuned_does_not_predict(tuned, tmp_path, capfd):
    (tmp_path / "lines.txt").write_text("the king\n")
    assert bothways.main(["predict", str(tuned[0]), str(tmp_path / "lines.txt")]) == 2
    assert "is not fine-tuned; `bothways finetune` makes a run that predicts" in capfd.readouterr().err


def test_a_tuned_run_only_predicts(tuned, labelled, tmp_path, capfd):
    (tmp_path / "lines.txt").write_text("the king\n")
    for argv in (["sample", "the king"], ["fill", "the [MASK]"], ["score", str(tmp_path / "lines.txt")], ["evaluate"]):
        assert bothways.main([argv[0], str(tuned[1]), *argv[1:]]) == 2
        assert "is fine-tuned for dogs, and can `predict`; use the run it came from" in capfd.readouterr().err
    assert bothways.main(["finetune", str(tuned[1]), labelled, "--workdir", str(tmp_path / "again")]) == 2
    assert "is fine-tuned already, for dogs; start from the run it came from" in capfd.readouterr().err
    assert not (tmp_path / "again").exists()


def test_a_directory_that_holds_a_run_is_left_alone(tuned, labelled, capfd):
    before = {path: path.stat().st_mtime_ns for path in tuned[1].rglob("*") if path.name != ".lock"}
    assert bothways.main(["finetune", str(tuned[0]), labelled, "--workdir", str(tuned[1])]) == 2
    assert "holds another fine-tuning" in capfd.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in tuned[1].rglob("*") if path.name != ".lock"} == before
