"""Inference with a masked model: against plain loops over the model, and against distributions that are known exactly."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bothways
from bothways import rundir
from bothways.config import ObjectiveConfig
from bothways.data import tokenizer as tokenizers
from bothways.errors import InputError
from bothways.recipes import Recipe
from bothways.registry import make_module
from bothways.sample import batching, masked
from bothways.sample.masked import MaskedModel
from tests.corpus import made_up_text

CONTEXT = 16
TEXTS = ["the castle in", "COW", "birds"]


@pytest.fixture(scope="module")
def model(tiny) -> MaskedModel:
    """A BERT with random weights, to which special tokens and entries that are no token look most likely."""
    tokenizer = tokenizers.train([made_up_text(60)], "bpe", 330)
    cfg = dataclasses.replace(tiny, n_layers=1, context_length=CONTEXT, vocab_size=len(tokenizer) + 5)
    recipe = Recipe(name="tiny", family="bert", model=cfg, objective=ObjectiveConfig(kind="masked"))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(s.dtype), rundir.param_shapes(recipe))
    params["encoder"]["embed"]["token"]["embedding"] *= 2
    params["mlm"]["norm"]["scale"] += 1
    params["encoder"]["stack"]["blocks"]["attention_norm"]["scale"] += 1
    params["mlm"]["bias"][[*tokenizer.special, *range(len(tokenizer), cfg.vocab_size)]] = 5
    return MaskedModel(rundir.Run(None, recipe, tokenizer, make_module("bert", cfg), params, 0))


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(masked, "BATCH", 4)
    monkeypatch.setattr(batching, "MOST_ROWS", 4)


@pytest.fixture(scope="module")
def read(model):
    """Rows of one length -> features and log-probabilities, without padding."""

    @jax.jit
    def forward(params, tokens):
        def run(bound):
            features = bound(tokens)
            return features, jax.nn.log_softmax(bound.logits(features))

        return model.run.module.apply({"params": params}, method=run)

    return lambda rows: jax.device_get(forward(model.run.params, jnp.asarray(rows)))


# ---- score ---------------------------------------------------------------------------------------------------------


def plain_pll(model, read, ids: list[int], words: bool) -> float:
    """Each token given all others, but, for words, what follows it in its word."""
    begins = [model.tokenizer.piece(t).startswith((" ", "\n")) for t in ids]
    rows = []
    for i in range(len(ids)):
        row = [model.tokenizer.bos, *ids, model.tokenizer.eos]
        row[1 + i] = model.tokenizer.mask
        for j in range(i + 1, len(ids)):
            if begins[j] or not words:
                break
            row[1 + j] = model.tokenizer.mask
        rows.append(row)
    _, logprobs = read(rows)
    return float(sum(logprobs[i, 1 + i, token] for i, token in enumerate(ids)))


@pytest.mark.parametrize("rule", ["pll", "pll_word"])
def test_pseudo_likelihood_is_that_of_a_plain_loop(model, read, rule):
    for text, score in zip(TEXTS, model.score(TEXTS, rule), strict=True):
        ids = model.tokenizer.encode(text)
        assert (score.text, score.tokens, score.rule) == (text, len(ids), rule)
        assert score.logprob == pytest.approx(plain_pll(model, read, ids, rule == "pll_word"), abs=2e-3)


def test_hiding_the_rest_of_a_word_is_another_score(model):
    by_token, by_word, unsaid = (model.score(TEXTS, **rule)[0] for rule in ({"rule": "pll"}, {"rule": "pll_word"}, {}))
    assert abs(by_token.logprob - by_word.logprob) > 0.1
    assert unsaid == by_word


@pytest.mark.parametrize("rule", ["pll", "pll_word", "bound"])
def test_a_text_scores_in_a_batch_what_it_scores_alone(model, rule):
    together = model.score(TEXTS, rule, draws=5)
    for text, score in zip(TEXTS, together, strict=True):
        (alone,) = model.score([text], rule, draws=5)
        assert (alone.text, alone.tokens) == (score.text, score.tokens)
        assert alone.logprob == pytest.approx(score.logprob, rel=1e-4)


def test_a_long_text_is_scored_in_pieces_of_the_context(model, read):
    text = "the castle in the garden calls a dog."
    ids = model.tokenizer.encode(text)
    assert CONTEXT < len(ids) < 2 * CONTEXT
    (score,) = model.score([text], "pll")
    pieces = [plain_pll(model, read, part, False) for part in (ids[: CONTEXT - 2], ids[CONTEXT - 2 :])]
    assert (score.tokens, score.logprob) == (len(ids), pytest.approx(sum(pieces), rel=1e-4))


def test_what_cannot_be_scored_is_refused(model):
    with pytest.raises(InputError, match="text 2 is empty"):
        model.score(["fine", ""])
    with pytest.raises(InputError, match="rule 'causal' is not for a masked run.*: pll, pll_word, bound"):
        model.score(["fine"], "causal")


# ---- three positions and three letters: every probability is known ---------------------------------------------------


class Known:
    """A masked model of the letters a, b, c at three positions that knows their joint distribution exactly.

    Or not quite: with another `power` it is too sure or too unsure, and a blind one sees no other letter.
    """

    def __init__(self, monkeypatch, tiny, joint: dict[str, float], power: float = 1.0, blind: bool = False):
        tokenizer = tokenizers.train(["abc", "bca", "cab"], "char", 300)
        self.joint, size = joint, len(tokenizer)
        letters = tokenizer.encode("abc")
        self.code = np.full(size, 3)  # 3: hidden
        self.code[letters] = 0, 1, 2
        self.table = np.full((4, 4, 4, 3, size), -np.inf)  # what is seen at each position, position predicted, token
        for seen in np.ndindex(4, 4, 4):
            for string, p in joint.items():
                codes = ["abc".index(c) for c in string]
                if all(s in (c, 3) for s, c in zip(seen, codes, strict=True)):
                    for place, c in enumerate(codes):
                        cell = (*seen, place, letters[c])
                        self.table[cell] = np.logaddexp(self.table[cell], np.log(p))
            if np.isfinite(self.table[seen]).any():
                self.table[seen] *= power
                self.table[seen] -= np.logaddexp.reduce(self.table[seen], axis=-1, keepdims=True)
        if blind:
            self.table[:] = self.table[3, 3, 3]
        monkeypatch.setattr(masked, "hidden_logprobs", self.hidden_logprobs)
        recipe = Recipe(family="bert", model=dataclasses.replace(tiny, vocab_size=size))
        self.model = MaskedModel(rundir.Run(None, recipe, tokenizer, None, None, 0))
        self.model.reader = self.read_jitted
        self.passes = 0

    def read_jitted(self, params, tokens, segments, positions):
        shape = jax.ShapeDtypeStruct((*positions.shape, self.table.shape[-1]), jnp.float32)
        read = lambda *args: self.hidden_logits(None, None, *args).astype(np.float32)  # noqa: E731
        return jax.pure_callback(read, shape, tokens, segments, positions)

    def hidden_logits(self, module, params, tokens, segments, positions):
        tokens, positions = np.asarray(tokens), np.asarray(positions)
        self.passes += 1
        first, second, third = (self.code[tokens[:, i, None]] for i in (1, 2, 3))
        return self.table[first, second, third, np.maximum(positions - 1, 0)]

    def hidden_logprobs(self, module, params, batch):
        logits = self.hidden_logits(module, params, batch["tokens"], batch["segments"], batch["mask_positions"])
        return np.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]


JOINT = {"abc": 0.3, "abb": 0.05, "cab": 0.25, "cca": 0.2, "bab": 0.15, "aaa": 0.05}


def bound_above_likelihood(known: Known) -> float:
    """The mean over the distribution of (bound - log-likelihood), in nats; its standard error is about 0.02."""
    found = known.model.score(list(known.joint), "bound", draws=4000)
    return sum(p * (score.logprob - np.log(p)) for score, p in zip(found, known.joint.values(), strict=True))


def test_the_bound_is_the_likelihood_where_the_conditionals_are_exact(monkeypatch, tiny):
    monkeypatch.setattr(batching, "MOST_ROWS", 512)
    assert abs(bound_above_likelihood(Known(monkeypatch, tiny, JOINT))) < 0.06


@pytest.mark.parametrize("wrong", [{"power": 3.0}, {"power": 0.02}, {"blind": True}], ids=lambda w: next(iter(w)))
def test_the_bound_is_below_the_likelihood_where_they_are_not(monkeypatch, tiny, wrong):
    monkeypatch.setattr(batching, "MOST_ROWS", 512)
    assert bound_above_likelihood(Known(monkeypatch, tiny, JOINT, **wrong)) < -0.15


def test_masks_filled_one_at_a_time_agree_with_each_other(monkeypatch, tiny):
    known = Known(monkeypatch, tiny, {"aba": 0.5, "bab": 0.5})
    (at_once,) = known.model.fill(["[MASK][MASK][MASK]"], steps=1)
    assert (at_once.filled, known.passes) == ("aaa", 1)  # each alone is as likely a as b
    assert [[c["p"] for c in mask[:2]] for mask in at_once.masks] == [[0.5, 0.5]] * 3
    (in_turn,) = known.model.fill(["[MASK][MASK][MASK]"], steps=3)
    assert (in_turn.filled, known.passes) == ("aba", 4)
    assert [mask[0]["p"] for mask in in_turn.masks] == [0.5, 1.0, 1.0]
    assert known.model.fill(["b[MASK][MASK]", "[MASK]b[MASK]"])[0].filled == "bab"


def test_the_most_confident_mask_is_filled_first(monkeypatch, tiny):
    known = Known(monkeypatch, tiny, {"bab": 0.48, "abb": 0.42, "aba": 0.10})
    for steps, filled, passes in ((1, "abb", 1), (2, "abb", 2), (3, "bab", 3), (9, "bab", 3)):
        known.passes = 0
        (found,) = known.model.fill(["[MASK][MASK][MASK]"], steps=steps)
        assert found.masks[2][0] == {"token": "b", "p": 0.9}
        assert (found.filled, known.passes) == (filled, passes)


def test_a_text_drawn_token_by_token_has_its_probability(monkeypatch, tiny):
    known = Known(monkeypatch, tiny, JOINT)
    found = known.model.sample([""], max_tokens=3, block=3, steps=3, num=16)
    assert len({sample.text for sample in found}) >= 4
    for sample in found:
        assert sample.logprob == pytest.approx(np.log(JOINT[sample.text]), abs=1e-3)
    drawn_at_once = known.model.sample([""], max_tokens=3, block=3, steps=1, num=16)
    assert not {sample.text for sample in drawn_at_once} <= set(JOINT)


def test_sweeps_mend_what_was_drawn_at_once(monkeypatch, tiny):
    known = Known(monkeypatch, tiny, {string: 0.9 if string == "abc" else 0.1 / 26 for string in every_string()})
    before, after = (known.model.sample([""], max_tokens=3, block=3, steps=1, sweeps=n, num=32) for n in (0, 2))
    assert [s.text for s in before] != [s.text for s in after]
    assert all(s.tokens == 3 for s in after)


def every_string() -> list[str]:
    return ["".join(letters) for letters in itertools.product("abc", repeat=3)]


# ---- fill ----------------------------------------------------------------------------------------------------------


def test_a_mask_takes_the_space_before_it_along(model):
    bos, eos, mask, encode = model.tokenizer.bos, model.tokenizer.eos, model.tokenizer.mask, model.tokenizer.encode
    wanted = [bos, *encode("the"), mask, *encode(" in"), eos]
    assert model.encode_masked("the [MASK] in") == model.encode_masked("the[MASK] in") == wanted
    assert model.encode_masked("the  [MASK] in") == [bos, *encode("the "), mask, *encode(" in"), eos]
    assert model.encode_masked("[MASK] [MASK]") == [bos, mask, mask, eos]


def test_candidates_are_ordinary_tokens_best_first(model, read):
    text = "the [MASK] in the [MASK]"
    (found,) = model.fill([text], top=7)
    row = model.encode_masked(text)
    _, logprobs = read([row])
    ordinary = model.vocabulary.ordinary
    for place, output in zip(np.flatnonzero(np.array(row) == model.tokenizer.mask), found.masks, strict=True):
        scores = np.exp(logprobs[0, place, ordinary].astype(np.float64))
        best = np.argsort(-scores)[:7]
        assert [c["token"] for c in output] == [model.tokenizer.piece(t) for t in ordinary[best]]
        assert [c["p"] for c in output] == pytest.approx((scores / scores.sum())[best], abs=2e-4)
        assert sum(c["p"] for c in output) <= 1 + 7 * 5e-5
        row[place] = int(ordinary[best[0]])
    assert found.filled == model.tokenizer.decode(row[1:-1])
    assert json.loads(json.dumps(dataclasses.asdict(found))) == dataclasses.asdict(found)
    assert list(dataclasses.asdict(found)) == ["text", "filled", "masks"]


def test_there_are_no_more_candidates_than_ordinary_tokens(model):
    (found,) = model.fill(["the [MASK]"], top=10_000)
    tokens = [model.tokenizer.piece(t) for t in model.vocabulary.ordinary]
    assert sorted(c["token"] for c in found.masks[0]) == sorted(tokens)


def test_texts_are_filled_together_as_alone(model, monkeypatch):
    texts = ["the [MASK] in the [MASK]", "[MASK]", "a [MASK][MASK][MASK] dog", "no [MASK] loves", "[MASK] bird"]
    for steps in (1, 3):
        together = model.fill(texts, steps=steps)
        assert [f.text for f in together] == texts
        assert [len(f.masks) for f in together] == [2, 1, 3, 1, 1]
        for text, filled in zip(texts, together, strict=True):
            (alone,) = model.fill([text], steps=steps)
            assert alone.filled == filled.filled
            assert "[MASK]" not in filled.filled
    rows, real = [], masked.fill  # and no more of them at a time than fit
    monkeypatch.setattr(masked, "fill", lambda *args, **more: rows.append(len(args[2])) or real(*args, **more))
    monkeypatch.setattr(masked, "rows_that_fit", lambda cfg: lambda length: 1)
    model.fill(texts)
    assert rows == [1] * 5


def test_what_cannot_be_filled_is_refused(model):
    with pytest.raises(InputError, match=r"there is no \[MASK\] in 'the king'; put one where a word is wanted"):
        model.fill(["the [MASK]", "the king"])
    with pytest.raises(
        InputError, match=f"the text has 32 tokens, 30 of them masks, and the model's context is {CONTEXT}"
    ):
        model.fill(["[MASK]" * 30])
    assert len(model.fill(["[MASK]" * (CONTEXT - 2)])[0].masks) == CONTEXT - 2
    for name in ("top", "steps"):
        with pytest.raises(InputError, match=f"{name} is 0; it must be at least 1"):
            model.fill(["[MASK]"], **{name: 0})


# ---- sample --------------------------------------------------------------------------------------------------------

QUICK = {"max_tokens": 6, "block": 4, "steps": 2}


def test_a_seed_says_the_same_again_and_another_seed_something_else(model):
    first, again, other = (model.sample(["the king"], **QUICK, seed=seed, num=2) for seed in (5, 5, 6))
    assert first == again
    assert len({s.text for s in first + other}) == 4
    greedy = model.sample(["the king"], **QUICK, greedy=True, num=2)
    assert greedy[0] == greedy[1]


@pytest.mark.parametrize("tokens", [3, 8, 22])
def test_as_many_tokens_come_as_were_asked_for(model, tokens):
    (found,) = model.sample(["the king"], max_tokens=tokens, block=4, steps=1)
    assert (found.prompt, found.tokens, found.stop) == ("the king", tokens, "max_tokens")
    assert found.logprob < 0


def test_special_tokens_are_never_said(model):
    for sample in model.sample(["", "the king"], max_tokens=8, block=4, steps=1, temperature=5.0):
        assert np.isfinite(sample.logprob)
        assert not any(name in sample.text for name in ("[MASK]", "[SEP]", "[CLS]", "[PAD]", "[UNK]"))


def test_a_prompt_says_in_a_batch_what_it_says_alone(model):
    prompts = ["the king", "", "birds in the river"]
    together = model.sample(prompts, **QUICK, num=2, sweeps=1)
    for i, prompt in enumerate(prompts):
        alone = model.sample([prompt], **QUICK, num=2, sweeps=1)
        assert [s.text for s in alone] == [s.text for s in together[2 * i : 2 * i + 2]]


def test_a_stop_string_ends_the_text_before_it(model):
    (whole,) = model.sample(["the king"], max_tokens=8, block=4, steps=2)
    text = whole.text
    stop = text[3:5]
    (found,) = model.sample(["the king"], max_tokens=8, block=4, steps=2, stop=["never said", stop])
    assert (found.text, found.stop) == (text[: text.index(stop)], "stop")
    assert 0 < found.tokens < 8


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"max_tokens": 0}, "max-tokens is 0"),
        ({"num": 0}, "num is 0"),
        ({"block": 0}, "block is 0"),
        ({"block": 9}, "block is 9; at most half of the context, 8"),
        ({"steps": 0}, "steps is 0"),
        ({"sweeps": -1}, "sweeps is -1"),
        ({"stop": [""]}, "a stop string is empty"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top-p is 0.0"),
        ({"prompts": ["the king"] * 2 + ["king " * 9]}, f"the prompt has [0-9]+ tokens, the context is {CONTEXT}"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_numbers_are_refused(model, fields, wanted):
    with pytest.raises(InputError, match=wanted):
        model.sample(**({"prompts": ["the king"], **QUICK} | fields))


# ---- embed, and what a causal run refuses ----------------------------------------------------------------------------


def test_vectors_are_the_features_of_the_first_token_and_their_mean(model, read):
    for text, cls, mean in zip(TEXTS, model.embed(TEXTS, "cls"), model.embed(TEXTS), strict=True):
        features, _ = read([[model.tokenizer.bos, *model.tokenizer.encode(text), model.tokenizer.eos]])
        np.testing.assert_allclose(cls, features[0, 0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(mean, features[0].mean(axis=0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(model.embed([text])[0], mean, rtol=1e-4, atol=1e-5)
    assert model.embed([*TEXTS, *TEXTS]).shape == (6, 22)


def test_what_cannot_be_embedded_is_refused(model):
    with pytest.raises(InputError, match="pool 'max' is unknown; there are cls, mean and last"):
        model.embed(["fine"], "max")
    with pytest.raises(InputError, match=f"[0-9]+ tokens, and the context is {CONTEXT}: 'king king"):
        model.embed(["fine", "king " * 9])


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["fill", "RUN", "the [MASK]"], "a gpt run cannot fill: it reads forward only"),
        (["embed", "RUN", "TEXTS", "--pool", "cls"], "pool 'cls' is not for a causal run: its first token sees nothing"),
        (["sample", "RUN", "the", "--sweeps", "2"], "--sweeps is not for a gpt run, which goes left to right"),
        (["score", "RUN", "TEXTS", "--rule", "pll"], "rule 'pll' is not for a gpt run"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_causal_run_refuses_with_its_reason(tiny, model, tmp_path, monkeypatch, capsys, argv, reason):
    causal = rundir.Run(tmp_path, Recipe(model=tiny), model.tokenizer, make_module("gpt", tiny), None, 0)
    monkeypatch.setattr("bothways.sample.open.load_run", lambda *_, **how: causal)
    (tmp_path / "texts").write_text("the king\n")
    argv = [{"RUN": str(tmp_path), "TEXTS": str(tmp_path / "texts")}.get(a, a) for a in argv]
    assert bothways.main(argv) == 2
    out, err = capsys.readouterr()
    assert reason in err
    assert not out
