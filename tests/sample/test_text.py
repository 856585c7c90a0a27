"""A run directory ready for inference: written here without training, read as every command reads it."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bothways import rundir
from bothways.data import tokenizer as tokenizers
from bothways.errors import InputError
from bothways.recipes import Recipe
from bothways.sample.text import TextModel, shown_so_far, utf8_so_far
from tests.corpus import made_up_text

CONTEXT = 24
LONG = "the ship fears the king in the river."
PROMPTS = ["the king ", "", LONG]  # nothing, a little, and almost a whole context


def write_run(home: Path, model, steps: tuple[int, ...] = (1, 2)) -> dict[int, dict]:
    """A run as train/loop.py leaves it, with weights drawn at random; returns them by step."""
    tokenizer = tokenizers.train([made_up_text(60), "caf\u00e9 \U0001f389\n"], "bpe", 330)
    model = dataclasses.replace(model, n_layers=1, context_length=CONTEXT, vocab_size=len(tokenizer) + 5)
    recipe = Recipe(name="tiny", model=model)
    home.mkdir(parents=True)
    tokenizer.save(home / "tokenizer.model")
    (home / "recipe.json").write_text(recipe.to_json())
    weights = {}
    with rundir.checkpoint_manager(home, keep=2) as manager:
        for step in steps:
            rng = np.random.default_rng(step)
            shapes = rundir.param_shapes(recipe)
            weights[step] = jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(s.dtype), shapes)  # noqa: B023
            decoder = weights[step]["decoder"]
            table = decoder["embed"]["token"]["embedding"]
            table[tokenizer.eos] = 1.5 * decoder["final_norm"]["bias"]  # so that a text may end
            table[len(tokenizer) :] *= 20  # what is no token would be drawn, if it could
            items = ocp.args.Composite(
                params=ocp.args.StandardSave(weights[step]),
                train=ocp.args.StandardSave({"step": np.int32(step)}),
                meta=ocp.args.JsonSave({"step": step, "position": 8 * step, "seed": 0}),
            )
            manager.save(step, args=items)
        manager.wait_until_finished()
    return weights


def damage(checkpoint: Path) -> None:
    """Every file cut to half its size, as a full disk or a lost machine leaves them."""
    for path in checkpoint.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def opened(home: Path, say=print) -> TextModel:
    return TextModel(rundir.load_run(home, say))


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny) -> Path:
    home = tmp_path_factory.mktemp("runs") / "tiny"
    write_run(home, tiny)
    return home


@pytest.fixture(scope="module")
def model(home) -> TextModel:
    return opened(home)


# ---- sampling ------------------------------------------------------------------------------------------------------


def test_results_come_in_the_order_of_prompts_and_draws(model):
    found = model.sample(PROMPTS, max_tokens=12, num=4)
    assert [s.prompt for s in found] == [p for p in PROMPTS for _ in range(4)]
    for sample in found:
        assert 1 <= sample.tokens <= 12
        assert sample.logprob < 0
        assert (sample.stop == "max_tokens") <= (sample.tokens == 12)
    assert {sample.stop for sample in found} == {"eos", "max_tokens"}


def test_a_seed_says_the_same_again_and_another_seed_something_else(model):
    first, again, other = (model.sample(PROMPTS, max_tokens=12, num=4, seed=seed) for seed in (5, 5, 6))
    assert again == first
    assert all(a.text != b.text for a, b in zip(first, other, strict=True))


def test_draws_differ_and_do_not_depend_on_how_many_there_are(model):
    many = model.sample(PROMPTS, max_tokens=12, num=4)
    for i in range(len(PROMPTS)):
        assert len({s.text for s in many[4 * i : 4 * i + 4]}) == 4
    few = model.sample(PROMPTS, max_tokens=12, num=3)
    assert [s.text for s in few] == [many[4 * i + n].text for i in range(len(PROMPTS)) for n in range(3)]


def test_a_prompt_says_in_a_batch_what_it_says_alone(model):
    together = model.sample(PROMPTS, max_tokens=12, num=4)[::4]
    for prompt, of_prompt in zip(PROMPTS, together, strict=True):
        (alone,) = model.sample([prompt], max_tokens=12)
        assert dataclasses.replace(alone, logprob=0) == dataclasses.replace(of_prompt, logprob=0)
        assert alone.logprob == pytest.approx(of_prompt.logprob, abs=1e-3)


def test_greedy_draws_are_all_the_same(model):
    found = model.sample(PROMPTS, max_tokens=12, greedy=True, num=4)
    for i in range(len(PROMPTS)):
        assert len({s.text for s in found[4 * i : 4 * i + 4]}) == 1
    assert model.sample(PROMPTS, max_tokens=12, temperature=0.0, num=4, seed=9) == found


def test_entries_that_are_no_token_are_never_drawn(model):
    assert model.recipe.model.vocab_size > len(model.tokenizer)
    found = model.sample(PROMPTS, max_tokens=12, temperature=5.0, num=4)
    assert all(np.isfinite(s.logprob) for s in found)
    assert all(np.isfinite(s.logprob) for s in model.sample(PROMPTS, max_tokens=6, beams=4, num=4, length_penalty=0.0))


def test_an_empty_prompt_opens_a_document(model):
    assert model.encode_prompt("") == [model.tokenizer.bos]
    assert model.encode_prompt("the king") == model.tokenizer.encode("the king")


def test_a_text_goes_on_beyond_the_context(model):
    short, long = (model.sample(PROMPTS, max_tokens=n, num=4) for n in (12, 3 * CONTEXT))
    for a, b in zip(short, long, strict=True):
        assert b.text.startswith(utf8_so_far(a.text))
        assert (b.stop == "eos") or b.tokens == 3 * CONTEXT
    assert max(sample.tokens for sample in long) > CONTEXT


def test_a_prompt_may_fill_the_context_and_no_more(model):
    prompt = LONG + "\n" * (CONTEXT - len(model.encode_prompt(LONG)))
    assert len(model.encode_prompt(prompt)) == CONTEXT
    assert model.sample([prompt], max_tokens=3)[0].tokens >= 1
    with pytest.raises(InputError, match=rf"the prompt has {CONTEXT + 1} tokens.* the model's context is {CONTEXT}"):
        model.sample(["fine", prompt + "\n"], max_tokens=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max-tokens is 0"),
        ({"num": 0}, "num is 0"),
        ({"stop": ["a", ""]}, "a stop string is empty"),
        ({"temperature": -1}, "temperature is -1"),
        ({"beams": 2, "num": 3}, "num is 3: a search with --beams 2"),
        ({"beams": 2, "greedy": True}, "leave out --stream, --stop and --greedy"),
        ({"beams": 2, "stop": ["a"]}, "leave out --stream, --stop and --greedy"),
        ({"beams": 2, "stream": print}, "leave out --stream, --stop and --greedy"),
        ({"beams": 2, "temperature": 0.5}, "leave out --temperature"),
        ({"beams": 2, "top_k": 3}, "--top-k"),
        ({"beams": 2, "top_p": 0.9}, "--top-p"),
        ({"beams": 2, "min_p": 0.1}, "--min-p"),
        ({"length_penalty": 0.6}, "add --beams, or leave it out"),
    ],
)
def test_settings_that_make_no_sense_are_refused(model, settings, message):
    with pytest.raises(InputError, match=message):
        model.sample(["the king "], **settings)


# ---- stop strings and streaming ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def free(model):
    """What the model says when nothing stops it; the longest text first."""
    found = model.sample(PROMPTS, max_tokens=40, num=4, seed=9)
    return sorted(((s, i) for i, s in enumerate(found)), key=lambda pair: -len(pair[0].text))


def test_a_stop_string_cuts_the_text_and_the_count(model, free):
    whole, index = free[0]
    stop = whole.text[len(whole.text) // 2 :][:3]
    sample = model.sample(PROMPTS, max_tokens=40, num=4, seed=9, stop=[stop, "never said"])[index]
    assert sample.text == whole.text[: whole.text.index(stop)]
    assert sample.stop == "stop"
    exact, short = (model.sample(PROMPTS, max_tokens=n, num=4, seed=9)[index] for n in (sample.tokens, sample.tokens - 1))
    assert exact.text.startswith(sample.text)
    assert not short.text.startswith(sample.text)
    assert sample.logprob == pytest.approx(exact.logprob, abs=1e-3)


def test_a_stop_string_at_once_leaves_nothing(model, free):
    whole, index = free[0]
    sample = model.sample(PROMPTS, max_tokens=40, num=4, seed=9, stop=[whole.text[0]])[index]
    assert (sample.text, sample.tokens, sample.logprob, sample.stop) == ("", 0, 0, "stop")


def test_stop_strings_that_are_not_said_change_nothing(model, free):
    found = model.sample(PROMPTS, max_tokens=40, num=4, seed=9, stop=["never said", "nor this"])
    for whole, index in free:
        assert (found[index].text, found[index].tokens, found[index].stop) == (whole.text, whole.tokens, whole.stop)


def stops_in(text: str) -> list[list[str]]:
    """None; a long one; the beginning of a text and more; one inside another."""
    middle = text[len(text) // 2 :]
    return [[], [middle[:6]], [text[:2] + "never", middle[:4]], [middle[:9], middle[2:4], "zz"]]


@pytest.mark.parametrize("kind", range(4))
def test_streamed_pieces_make_the_text(model, free, kind):
    stop = stops_in(free[0][0].text)[kind]
    whole = model.sample(PROMPTS, max_tokens=40, num=4, seed=9, stop=stop)
    pieces: dict[int, list[str]] = {i: [] for i in range(len(whole))}
    streamed = model.sample(
        PROMPTS, max_tokens=40, num=4, seed=9, stop=stop, stream=lambda i, piece: pieces[i].append(piece)
    )
    for i, sample in enumerate(whole):
        assert "".join(pieces[i]) == streamed[i].text == sample.text
        assert (streamed[i].tokens, streamed[i].stop) == (sample.tokens, sample.stop)
        assert all(pieces[i])
        assert stop or not any(piece.endswith("\ufffd") for piece in pieces[i][:-1])
    assert max(map(len, pieces.values())) > 3
    if stop:
        assert "stop" in {sample.stop for sample in whole}


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=6), max_size=3))
@settings(max_examples=300, deadline=None, database=None, derandomize=True)
def test_nothing_is_shown_that_a_stop_string_takes_back(text, stop):
    ends = [(text.index(s) + len(s), text.index(s)) for s in stop if s in text]
    said, final = min(ends) if ends else (len(text) + 1, len(text))
    for n in range(min(said, len(text) + 1)):
        assert text[:final].startswith(shown_so_far(text[:n], stop))
    assert shown_so_far("x" + text, []) == "x" + text


def test_a_character_is_shown_when_its_last_byte_is_there():
    assert utf8_so_far("caf\ufffd\ufffd") == "caf"
    assert utf8_so_far("caf\u00e9") == "caf\u00e9"


# ---- beam search ---------------------------------------------------------------------------------------------------


def search(model, prompts, max_tokens=6, length_penalty=0.0, **settings):
    return model.sample(prompts, max_tokens=max_tokens, beams=4, length_penalty=length_penalty, **settings)


def test_beams_are_ranked_and_at_least_as_likely_as_greedy(model):
    found = search(model, PROMPTS, num=4)
    greedy = model.sample(PROMPTS, max_tokens=6, greedy=True, num=4)[::4]
    assert [s.prompt for s in found] == [p for p in PROMPTS for _ in range(4)]
    for i, of_prompt in enumerate(greedy):
        most = min(6, CONTEXT - len(model.encode_prompt(PROMPTS[i])))
        ranked = found[4 * i : 4 * i + 4]
        assert [s.logprob for s in ranked] == sorted((s.logprob for s in ranked), reverse=True)
        assert ranked[0].logprob >= of_prompt.logprob - 1e-3
        assert all(1 <= s.tokens <= most for s in ranked)
        assert all(s.tokens == most for s in ranked if s.stop == "max_tokens")
    assert search(model, PROMPTS) == found[::4]


def test_a_length_penalty_makes_longer_texts(model):
    short, long = (search(model, PROMPTS, length_penalty=alpha) for alpha in (0.0, 50.0))
    assert sum(s.tokens for s in short) < sum(s.tokens for s in long)


def test_hypotheses_say_why_they_ended(model):
    found = search(model, PROMPTS, max_tokens=1, num=4)
    assert all(s.tokens == 1 for s in found)
    assert all(s.text == "" for s in found if s.stop == "eos")
    assert [s.stop for s in found].count("max_tokens") >= 9  # one token of four may be eos


def test_a_search_does_not_depend_on_the_prompts_beside_it(model):
    first, second = search(model, PROMPTS), search(model, ["a dog", "", LONG, "the king "])
    for a, b in ((first[0], second[3]), (first[1], second[1]), (first[2], second[2])):
        assert (a.text, a.tokens, a.stop) == (b.text, b.tokens, b.stop)
        assert a.logprob == pytest.approx(b.logprob, abs=1e-3)


def test_a_search_does_not_go_beyond_the_context(model):
    with pytest.raises(InputError, match="fills the model's context"):
        search(model, [LONG + "\n" * (CONTEXT - len(model.encode_prompt(LONG)))])


# ---- scores --------------------------------------------------------------------------------------------------------


def test_a_score_is_the_sum_over_the_tokens_of_a_document(model):
    texts = ["the king ", "a storm in the forest\n", "caf\u00e9"]
    found = model.score(texts)
    module, params = model.run.module, model.run.params
    forward = jax.jit(lambda p, tokens: module.apply({"params": p}, tokens, method=lambda m, t: m.logits(m(t)[0])))
    for text, score in zip(texts, found, strict=True):
        ids = [model.tokenizer.bos, *model.tokenizer.encode(text)]
        padded = np.zeros((1, CONTEXT), np.int32)
        padded[0, : len(ids)] = ids
        logprobs = jax.nn.log_softmax(forward(params, padded)[0])
        expected = sum(float(logprobs[i, token]) for i, token in enumerate(ids[1:]))
        assert (score.text, score.tokens, score.rule) == (text, len(ids) - 1, "causal")
        assert score.logprob == pytest.approx(expected, rel=1e-4)


def test_what_cannot_be_scored_is_refused(model):
    with pytest.raises(InputError, match="text 2 is empty"):
        model.score(["fine", ""])
    with pytest.raises(InputError, match="rule 'pll' is not for a gpt run"):
        model.score(["fine"], rule="pll")


def test_the_vector_of_a_text_is_the_mean_of_its_features(model):
    texts = ["the king", LONG]
    for text, vector in zip(texts, model.embed(texts), strict=True):
        ids = [model.tokenizer.bos, *model.tokenizer.encode(text)]
        features, _ = model.run.module.apply({"params": model.run.params}, np.array([ids]))
        np.testing.assert_allclose(vector, features[0].mean(axis=0), atol=1e-5)


# ---- run directories -----------------------------------------------------------------------------------------------


def test_the_newest_checkpoint_is_read(model, home):
    assert model.run.step == 2
    assert model.run.home == home
    assert model.recipe == rundir.read_recipe(home)


def test_a_damaged_checkpoint_is_passed_over_and_said_so(tmp_path, tiny):
    weights = write_run(tmp_path / "run", tiny)
    said: list[str] = []
    whole = opened(tmp_path / "run", said.append)
    assert (whole.run.step, said) == (2, [])
    jax.tree.map(np.testing.assert_array_equal, whole.run.params, weights[2])
    damage(tmp_path / "run" / "checkpoints" / "2")
    older = opened(tmp_path / "run", said.append)
    assert older.run.step == 1
    jax.tree.map(np.testing.assert_array_equal, older.run.params, weights[1])
    assert len(said) == 1
    assert said[0].startswith("checkpoint 2 is damaged (")
    assert said[0].endswith("falling back to the one before")
    damage(tmp_path / "run" / "checkpoints" / "1")
    with pytest.raises(InputError, match=r"none of the checkpoints \[2, 1\] .* can be read"):
        opened(tmp_path / "run", said.append)


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not a run directory: it has no recipe.json"):
        opened(tmp_path)
    with pytest.raises(InputError, match="absent does not exist"):
        opened(tmp_path / "absent")


def test_a_run_without_a_checkpoint_is_refused(tmp_path, home):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("recipe.json", "tokenizer.model"):
        (run / name).write_bytes((home / name).read_bytes())
    with pytest.raises(InputError, match="run has no checkpoint yet; train it first"):
        opened(run)
    (run / "checkpoints").mkdir()
    with pytest.raises(InputError, match="run has no checkpoint yet; train it first"):
        opened(run)
    (run / "tokenizer.model").unlink()
    with pytest.raises(InputError, match="cannot read the tokenizer"):
        opened(run)
