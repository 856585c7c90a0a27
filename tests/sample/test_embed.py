"""Vectors of texts that share rows are those of each text alone, of every family and pool."""

import types
from pathlib import Path

import jax
import numpy as np
import pytest

from bothways.config import ObjectiveConfig
from bothways.data import tokenizer as tokenizers
from bothways.recipes import Recipe
from bothways.registry import make_module, tiny_inputs
from bothways.rundir import Run
from bothways.sample import embed
from bothways.sample.diffusion import DiffusionModel
from bothways.sample.text import TextModel
from tests.corpus import made_up_text

LENGTHS = (3, 1, 7, 2, 11, 5, 23, 2, 3, 1, 13, 37, 5, 3, embed.SHARED + 3)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("gpt", {"position_embedding": "rotary"}),
        ("bert", {"position_embedding": "learned", "segment_types": 2}),
        ("seq2seq", {"score_bias": "relative", "position_embedding": "none"}),
    ],
)
def test_texts_that_share_rows_see_nothing_of_each_other(family, fields, tiny_with):
    cfg = tiny_with(context_length=2 * embed.SHARED, vocab_size=97, **fields)
    module = make_module(family, cfg)
    params = jax.jit(lambda: module.init(jax.random.key(3), **tiny_inputs(family))["params"])()
    run = types.SimpleNamespace(
        module=module,
        params=params,
        recipe=types.SimpleNamespace(model=cfg),
        tokenizer=types.SimpleNamespace(pad=0),
    )
    rng = np.random.default_rng(5)
    rows = [rng.integers(5, 97, n).tolist() for n in LENGTHS]
    method = "encode" if family == "seq2seq" else None

    def alone(row: list[int]) -> np.ndarray:
        """Features [T, D]."""
        tokens = np.array([row])
        places = {"positions": np.arange(len(row))[None], "segments": np.ones_like(tokens)}
        found = module.apply({"params": params}, tokens, **places, method=method)
        return np.asarray(found[0] if isinstance(found, tuple) else found)[0]

    features = [alone(row) for row in rows]
    shared = {len(group) for group in embed.sharing_rows(LENGTHS, min(embed.SHARED, cfg.context_length), embed.SHARING)}
    assert max(shared) > 3
    for pool, wanted in (("mean", lambda x: x.mean(axis=0)), ("cls", lambda x: x[0]), ("last", lambda x: x[-1])):
        found = embed.vectors(run, [""] * len(rows), rows, pool)
        np.testing.assert_allclose(found, [wanted(x) for x in features], rtol=1e-4, atol=1e-5)


def test_sources_of_an_encoder_decoder_are_framed_as_it_reads_them_elsewhere(tiny_with):
    """BART's begin with <s>, NLLB's with a language."""
    tokenizer = tokenizers.train([made_up_text(60)], "bpe", 330)
    cfg = tiny_with(context_length=48, vocab_size=len(tokenizer), n_layers=1)
    module = make_module("seq2seq", cfg)
    params = jax.jit(lambda: module.init(jax.random.key(3), **tiny_inputs("seq2seq"))["params"])()
    recipe = Recipe("pairs", "seq2seq", cfg, objective=ObjectiveConfig("pairs"))
    model = TextModel(Run(Path("pairs"), recipe, tokenizer, module, params, 1))
    for before, behind in (((), (tokenizer.eos,)), ((7, 9), (3,))):
        tokenizer.around_source = lambda sides=(before, behind): sides
        ids = np.array([[*before, *tokenizer.encode("the king"), *behind]])
        features = module.apply(
            {"params": params}, ids, np.arange(ids.shape[1])[None], np.ones_like(ids), method="encode"
        )
        np.testing.assert_allclose(model.embed(["the king"])[0], features[0].mean(axis=0), rtol=1e-4, atol=1e-5)


def test_a_diffusion_run_reads_each_text_in_its_own_place(tiny_with):
    """A decoder that predicts the next token moves its features by one; the vector of a text has none of its neighbour's."""
    tokenizer = tokenizers.train([made_up_text(60)], "bpe", 330)
    cfg = tiny_with(context_length=48, vocab_size=len(tokenizer))
    module = make_module("gpt", cfg)
    params = jax.jit(lambda: module.init(jax.random.key(3), **tiny_inputs("gpt"))["params"])()
    recipe = Recipe("dial", "gpt", cfg, objective=ObjectiveConfig("diffusion", block_sizes=(1, 0)))
    model = DiffusionModel(Run(Path("dial"), recipe, tokenizer, module, params, 1))
    texts = ["the king", "a cat", "the queen sees the dog"]
    for pool in ("mean", "cls", "last"):
        alone = np.concatenate([model.embed([text], pool) for text in texts])
        np.testing.assert_allclose(model.embed(texts, pool), alone, rtol=1e-4, atol=1e-5)
    ids = np.array([[tokenizer.bos, *tokenizer.encode(texts[0])]])
    features, _ = module.apply({"params": params}, ids, prefix=np.array([ids.shape[1]]))
    np.testing.assert_allclose(model.embed(texts)[0], features[0].mean(axis=0), rtol=1e-4, atol=1e-5)
