"""lm-evaluation-harness over models whose probabilities are known; skipped where it is not installed."""

import dataclasses
import json
import math
import types

import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'bothways[lmeval]'")

import bothways
from bothways.compare.core import continued
from bothways.config import ObjectiveConfig
from bothways.errors import InputError
from bothways.sample import lm_eval_backend as harness
from bothways.sample.continuations import RULES
from bothways.sample.score import causal_logprobs
from bothways.train import loop

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def runs(tiny_recipe, tmp_path_factory):
    """A causal and a hybrid run of two steps."""
    found = {}
    for kind in ("causal", "hybrid"):
        home = tmp_path_factory.mktemp("runs") / kind
        steps = dataclasses.replace(tiny_recipe.train, steps=2)
        short = dataclasses.replace(tiny_recipe.optimizer, warmup_steps=1)
        loop.train(
            dataclasses.replace(tiny_recipe, objective=ObjectiveConfig(kind=kind), train=steps, optimizer=short), home
        )
        found[kind] = home
    return found


def request(*args):
    from lm_eval.api.instance import Instance

    return Instance("loglikelihood", {}, args, 0)


def test_a_continuation_is_told_as_score_tells_it(runs):
    backend = harness.BothwaysLM(str(runs["causal"]))
    model = backend.model
    texts = [("the dog sees", " the cat"), ("", "the king"), ("a", "ship")]
    got = backend.loglikelihood([request(*t) for t in texts], disable_tqdm=True)
    for (context, continuation), (logprob, _) in zip(texts, got, strict=True):
        before, whole = (model.tokenizer.encode(t) for t in (context, context + continuation))
        rows = [[model.tokenizer.bos, *ids] for ids in (whole, before)]
        both = [r for r in rows if len(r) > 1]
        output = causal_logprobs(model.run.module, model.run.params, both, model.recipe.model.context_length)
        assert logprob == pytest.approx(output[0] - (output[1] if len(output) > 1 else 0), abs=1e-3)


def test_greedy_means_that_every_token_is_the_most_likely(runs):
    backend = harness.BothwaysLM(str(runs["causal"]))
    ids = backend.tokens.encode("the dog")
    (said,) = continued(backend.model, [[backend.tokens.bos, *ids]], 2, greedy=True)
    other = [said[0], said[1] + 1]
    (_, greedy), (_, not_greedy) = backend._loglikelihood_tokens([(("", ""), ids, said), (("", ""), ids, other)])
    assert greedy
    assert not not_greedy


def test_long_contexts_lose_their_beginning(runs):
    backend = harness.BothwaysLM(str(runs["causal"]))
    long = "the dog sees the cat in the castle. " * 20
    ((logprob, _),) = backend.loglikelihood([request(long, " the king")], disable_tqdm=True)
    assert math.isfinite(logprob)
    with pytest.raises(InputError, match="does not fit"):
        backend.loglikelihood([request("a", long)], disable_tqdm=True)


def test_a_hybrid_run_is_scored_by_every_rule_and_others_are_refused(runs):
    texts = [request("the dog sees", " the cat")]
    found = {
        r: harness.BothwaysLM(str(runs["hybrid"]), rule=r).loglikelihood(texts, disable_tqdm=True)[0][0] for r in RULES
    }
    assert len(set(found.values())) == 4
    with pytest.raises(InputError, match="causal"):
        harness.BothwaysLM(str(runs["causal"]), rule="pll")
    recipe = types.SimpleNamespace(family="seq2seq", objective=ObjectiveConfig(kind="pairs"), model=None)
    pairs = types.SimpleNamespace(recipe=recipe, run=types.SimpleNamespace(home="runs/x"), tokenizer=None)
    with pytest.raises(InputError, match="runs/x is a seq2seq run"):
        harness.BothwaysLM(pairs)


def test_rolling_and_generation(runs):
    for rule in ("causal", "pll_word"):
        backend = harness.BothwaysLM(str(runs["hybrid"]), rule=rule)
        rolled = backend.loglikelihood_rolling([request("the dog sees the cat")])
        assert (
            rolled[0]
            == backend.model.score(["the dog sees the cat"], "causal" if rule == "causal" else "bound")[0].logprob
        )
        said = backend.generate_until([request("the dog", {"until": ["\n"], "max_gen_toks": 3})])
        assert isinstance(said[0], str)
        assert "\n" not in said[0]


def test_contexts_are_continued_as_they_are_scored_and_together(runs, monkeypatch):
    """Behind [CLS], without their beginning where they are too long; and requests of one kind share a call."""
    backend = harness.BothwaysLM(str(runs["causal"]))
    contexts = ["the dog", "", "the dog sees the cat in the castle. " * 9, "QUEEN:"]
    rows, sample = [], backend.model.sample

    def spied(prompts, **options):
        rows.append(options["encoded"])
        return sample(prompts, **options)

    monkeypatch.setattr(backend.model, "sample", spied)
    how = [{"until": ["@@"], "max_gen_toks": 3}] * 3 + [{"until": "@@", "max_gen_toks": 2}]
    said = backend.generate_until([request(c, h) for c, h in zip(contexts, how, strict=True)])
    assert [len(r) for r in rows] == [3, 1]
    bos, room = backend.tokens.bos, backend.max_length - 3
    wanted = [[bos, *backend.tokens.encode(c)] for c in contexts]
    wanted[2] = [bos, *wanted[2][-(room - 1) :]]
    assert [*rows[0], *rows[1]] == wanted
    for text, row, most in zip(said, wanted, (3, 3, 3, 2), strict=True):
        (alone,) = continued(backend.model, [row], most, greedy=True)
        assert text == backend.tokens.decode([t for t in alone if t != backend.tokens.eos])


def test_a_context_that_is_drawn_from_again_gets_another_draw(runs):
    for rule in ("causal", "pll_word"):
        backend = harness.BothwaysLM(str(runs["hybrid"]), rule=rule)
        how = {"until": [], "max_gen_toks": 7, "do_sample": True, "temperature": 2.0}
        first, second = backend.generate_until([request("the dog " * 20, how)] * 2)
        assert first != second


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        (["lm-eval:arc_easy", "--rule", "pll"], "rule 'pll' is not for this run"),
        (["lm-eval:arc_easy", "--shots", "-1"], "shots is -1"),
        (["lm-eval:no_such_task"], "no_such_task"),
        (["mteb:NoSuchTask"], "mteb has no task 'NoSuchTask'"),
    ],
)
def test_what_cannot_be_is_refused_before_other_suites_take_their_time(runs, monkeypatch, capsys, more, wanted):
    if more[0].startswith("mteb:"):
        pytest.importorskip("mteb")
    monkeypatch.setattr("bothways.sample.evaluate.evaluate", lambda *_: pytest.fail("it was evaluated first"))
    assert bothways.main(["evaluate", str(runs["causal"]), "validation", *more]) == 2
    assert wanted in capsys.readouterr().err


def test_a_task_of_ones_own_through_the_command_line(runs, tiny_recipe, tmp_path, capsys):
    items = [{"text": "the dog sees", "choices": [" the cat", " xq"], "label": i % 2} for i in range(10)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(i) + "\n" for i in items))
    files = {s: str(tmp_path / f"{s}.jsonl") for s in ("train", "test")}
    task = {
        "task": "own_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "output_type": "multiple_choice",
    }
    task |= {"training_split": "train", "test_split": "test", "doc_to_text": "{{text}}", "doc_to_choice": "{{choices}}"}
    task |= {"doc_to_target": "label", "metric_list": [{"metric": "acc"}]}
    (tmp_path / "own_choice.yaml").write_text(json.dumps(task))
    recipe = runs["causal"] / "recipe.json"  # the run's own text is not needed
    recipe.write_text(recipe.read_text().replace(tiny_recipe.data.corpus, "gone.txt"))
    arguments = [
        "evaluate",
        str(runs["causal"]),
        "lm-eval:own_choice",
        "--tasks-from",
        str(tmp_path),
        "--shots",
        "1",
        "--json",
    ]
    assert bothways.main(arguments) == 0
    figures = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    acc = next(f for f in figures if f["metric"] == "acc")
    assert acc["value"] == 0.5  # one answer is always the likelier, and right half of the time
    assert acc["n"] == 10
    assert acc["interval"][0] < 0.5 < acc["interval"][1]
    assert bothways.main(["evaluate", str(runs["causal"]), "lm-eval:no_such_task"]) == 2
    assert "no_such_task" in capsys.readouterr().err
