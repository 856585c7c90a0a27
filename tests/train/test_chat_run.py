"""Runs trained on conversations: what they learn, what they say, and what they refuse."""

import dataclasses
import io
import json
import sys

import jax
import numpy as np
import pytest

import bothways
from bothways import rundir
from bothways.cli import main
from bothways.config import ObjectiveConfig, OptimizerConfig, TrainConfig
from bothways.convert.vocabulary import save_vocabulary
from bothways.data.chat import PLAIN, encode, render
from bothways.data.config import DataConfig
from bothways.errors import InputError
from bothways.model.config import TransformerConfig
from bothways.recipes import Recipe
from bothways.sample.chat import Conversation
from bothways.sample.diffusion import DiffusionModel
from bothways.sample.evaluate import evaluate
from bothways.train.objectives import objective_of

pytestmark = pytest.mark.usefixtures("one_device")
MODEL = TransformerConfig(
    context_length=96,
    n_layers=1,
    d_model=48,
    n_heads=4,
    norm="rms",
    activation="relu2",
    bias=False,
    position_embedding="rotary",
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, cache_dir):
    """The answer is the question's letter twice, or, after `x`, the letter of the question before it."""
    path, lines = tmp_path_factory.mktemp("talks") / "talks.jsonl", []
    for i in range(400):
        a, b = "abcdefgh"[i % 8], "abcdefgh"[(i // 8) % 8]
        turns = [("user", a), ("assistant", a + a), ("user", b if i % 3 else "x"), ("assistant", b + b if i % 3 else a)]
        lines.append(json.dumps({"messages": [{"role": role, "content": said} for role, said in turns]}))
    path.write_text("\n".join(lines) + "\n")
    return Recipe(
        name="talks",
        model=MODEL,
        data=DataConfig(
            corpus=str(path), messages_field="messages", tokenizer="char", vocab_size=300, cache=str(cache_dir)
        ),
        objective=ObjectiveConfig(kind="chat"),
        optimizer=OptimizerConfig(name="muon", learning_rate=0.02, schedule="linear", warmup_steps=10, weight_decay=0.0),
        train=TrainConfig(steps=120, batch_size=8, eval_every=120, save_every=120, log_every=60, tracker="none"),
    )


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    home = tmp_path_factory.mktemp("runs") / "talks"
    recipe.fit(home)
    return home


@pytest.fixture(scope="module")
def model(run):
    return bothways.load(run)


def test_it_answers_remembers_and_stops(model):
    logged = []
    talk = Conversation(model, log=logged.append, greedy=True, max_tokens=5)
    said = [talk.reply(text) for text in "cx"]
    assert [(s.prompt, s.text, s.stop) for s in said] == [("c", "cc", "eos"), ("x", "c", "eos")]
    assert not logged
    for _ in range(3):
        talk.reply("g")
    assert "oldest" in logged[0]
    assert len(encode(model.tokenizer, render(model.tokenizer, talk.turns[:-1]))) <= 96


def test_held_out_figures_are_of_answers_alone(model):
    figures = {f.metric: f for f in evaluate(model, ["validation"])}
    assert figures["loss"].value < 0.1  # the questions, of which the loss would be some 2 nats, count for nothing
    assert figures["loss"].resampled == "conversations"


def at_terminal(monkeypatch, capsys, arguments, text):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    code = main(arguments)
    return code, *capsys.readouterr()


def test_the_command_answers_line_by_line_and_ends_with_its_input(run, monkeypatch, capsys):
    code, out, _ = at_terminal(monkeypatch, capsys, ["chat", str(run), "--greedy", "--json"], "c\nx")
    assert code == 0
    assert [json.loads(line)["text"] for line in out.splitlines()] == ["cc", "c"]
    code, out, err = at_terminal(monkeypatch, capsys, ["chat", str(run), "--greedy"], "c\n\na[SEP]\n")
    assert (code, out) == (2, "cc\n")
    assert "a message holds [SEP]" in err


def test_ctrl_c_ends_it_cleanly(run, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "reply", interrupted)
    code, _, err = at_terminal(monkeypatch, capsys, ["chat", str(run)], "c\n")
    assert code == 0
    assert "Traceback" not in err


def test_one_turn_by_sample(run, capsys):
    assert main(["sample", str(run), "d", "h", "--chat", "--greedy", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(f["prompt"], f["text"], f["stop"]) for f in found] == [("d", "dd", "eos"), ("h", "hh", "eos")]
    assert main(["sample", str(run), "d", "--system", "a"]) == 2


def test_the_template_stays_with_the_run_and_leaves_with_it(run, model, tmp_path):
    assert json.loads((run / "tokenizer_config.json").read_text())["chat_template"] == PLAIN
    save_vocabulary(model.tokenizer, tmp_path, "gpt")
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"] == PLAIN


def test_packed_loss_and_gradients_are_those_of_conversations_alone(run, recipe):
    """Nobody sees the neighbour's conversation, padding counts for nothing, and no prompt has a gradient."""
    loaded = rundir.load_run(run, lambda _: None)
    objective = objective_of(loaded.recipe, loaded.tokenizer.vocabulary())
    from bothways.data import corpora, tokens
    from bothways.data.rng import ExampleRng

    held = tokens.prepare(corpora.load(recipe.data), "validation", loaded.tokenizer, recipe.data.cache)
    rows, example = objective.source(held, 95, True)
    batch = example(rows[np.arange(3)], ExampleRng(0, np.arange(3)))
    assert batch["segments"].max() > 1

    def total(params, batch):
        def inner(module):
            return objective.terms(module, batch, True)["nll"].nats

        return loaded.module.apply({"params": params}, method=inner)

    packed, gradient = jax.jit(jax.value_and_grad(total))(loaded.params, batch)
    alone = []
    for row in range(3):
        for number in range(1, batch["segments"][row].max() + 1):
            inside = batch["segments"][row] == number
            one = {name: np.zeros((1, 95), x.dtype) for name, x in batch.items()}
            for name, x in batch.items():
                one[name][0, : inside.sum()] = x[row, inside]
            alone.append(one)
    together = {name: np.concatenate([one[name] for one in alone]) for name in batch}
    apart, other = jax.jit(jax.value_and_grad(total))(loaded.params, together)
    np.testing.assert_allclose(packed, apart, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), gradient, other)


def test_recipes_that_do_not_fit_conversations(recipe):
    for section, fields, match in (
        ("objective", {"kind": "causal"}, "conversations are for objective.kind=chat or diffusion"),
        ("data", {"messages_field": ""}, "set --data.messages-field messages"),
        ("data", {"separate_documents": False}, "never see each other"),
        ("data", {"source_field": "a", "target_field": "b"}, "conversations or pairs"),
    ):
        wrong = dataclasses.replace(recipe, **{section: dataclasses.replace(getattr(recipe, section), **fields)})
        with pytest.raises(InputError, match=match):
            wrong.check(1)


def test_a_diffusion_run_answers_too(recipe, tmp_path):
    ask = ObjectiveConfig(kind="diffusion", block_sizes=(2,))
    few = dataclasses.replace(recipe.train, steps=11, eval_every=11, eval_rows=8)
    wanted = dataclasses.replace(recipe, objective=ask, train=few)
    wanted.fit(tmp_path / "run")
    model = bothways.load(tmp_path / "run")
    assert Conversation(model, greedy=True, block=2, max_tokens=4).reply("f").tokens <= 4
    with pytest.raises(InputError, match="--block is 3"):
        Conversation(model, block=3)
    assert [f.metric for f in evaluate(model, ["validation"], limit=3)] == ["loss", "bits_per_byte"]
    # Of 96 tokens blocks of 36 fill 72: older turns are forgotten that these do not hold.
    wide = dataclasses.replace(model.recipe, objective=dataclasses.replace(ask, block_sizes=(36,)))
    talk = Conversation(DiffusionModel(dataclasses.replace(model.run, recipe=wide)), greedy=True, max_tokens=4)
    for _ in range(9):
        talk.reply("f")
        assert len(encode(model.tokenizer, render(model.tokenizer, talk.turns[:-1]))) <= 72 - 4
    assert len(talk.turns) < 18


def test_an_encoder_trained_by_diffusion_has_the_bound_of_its_answers(recipe, tmp_path):
    """Evaluated at the end of training and later; the bound does not depend on how conversations are put together."""
    few = dataclasses.replace(recipe.train, steps=11, eval_every=11, eval_rows=8)
    ask = ObjectiveConfig(kind="diffusion", block_sizes=(0,))
    dataclasses.replace(recipe, family="bert", objective=ask, train=few).fit(tmp_path / "run")
    model = bothways.load(tmp_path / "run")
    found = {f.metric: f for f in evaluate(model, ["validation"], limit=3)}
    assert list(found) == ["loss", "bits_per_byte"]
    assert found["loss"].n == 3
    assert found["loss"].resampled == "conversations"
