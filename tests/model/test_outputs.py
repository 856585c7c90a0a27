"""A transform and a soft cap stand between features and scores wherever those are made: losses, scoring, FLOPs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bothways.config import ObjectiveConfig
from bothways.flops import executed_flops, training_flops_per_token
from bothways.model.loss import cross_entropy
from bothways.model.task import TaskModel
from bothways.registry import make_module, tiny_inputs
from bothways.sample.score import next_token_logprobs, pair_logprobs
from bothways.train.objectives import make_objective
from bothways.train.objectives.labels import task_objective
from tests.model.test_bert import VOCABULARY

ROWS, LENGTH = 3, 7
RNG = np.random.default_rng(0)
TOKENS, TARGETS, SOURCE = (RNG.integers(5, 37, (ROWS, LENGTH)).astype(np.int32) for _ in range(3))
PLACES, ONES = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH)), np.ones((ROWS, LENGTH), np.int32)
BATCH = {"tokens": TOKENS, "targets": TARGETS, "positions": PLACES, "segments": ONES, "source": SOURCE}
BATCH |= {"source_positions": PLACES, "source_segments": ONES, "weights": RNG.random((ROWS, LENGTH)).astype(np.float32)}
FIELDS = {"output_transform": True, "logit_cap": 0.7, "score_cap": 0.5, "pad_vocab_to_multiple_of": 16}


@pytest.fixture
def model(tiny_with, filled):
    """Family -> a module of both, and its parameters."""

    def of(family: str):
        module = make_module(family, tiny_with(context_length=LENGTH, **FIELDS))
        return module, filled(module, **tiny_inputs(family))

    return of


def logprobs(module, params, prefix=None):
    """log p of every target, from the logits of one pass, beyond which no cap lets any but those that stand for no token."""

    def run(bound):
        if hasattr(bound, "encode"):
            return bound.logits(bound(TOKENS, SOURCE))
        return bound.logits(bound(TOKENS, prefix=prefix)[0])

    logits = module.apply({"params": params}, method=run)
    assert float(jnp.abs(logits[..., :37]).max()) <= 0.7
    assert float(logits[..., 37:].max()) == np.float32(-1e30)
    found = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(found, TARGETS[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("kind", ["causal", "chat", "hybrid", "pairs"])
def test_a_loss_is_that_of_the_logits(model, kind):
    module, params = model("seq2seq" if kind == "pairs" else "gpt")
    objective = make_objective(ObjectiveConfig(kind), VOCABULARY)
    prefix = np.array([0, 3, 7], np.int32) if kind == "hybrid" else None
    batch = BATCH | ({"prefix": prefix} if kind == "hybrid" else {})
    sums = module.apply({"params": params}, method=lambda bound: objective.terms(bound, batch, True))
    (term,) = sums.values()
    wanted = -jnp.sum(logprobs(module, params, prefix) * BATCH["weights"])
    np.testing.assert_allclose(term.nats, wanted, rtol=1e-5)


def test_a_heads_loss_beside_it_too(tiny_with, filled):
    module = TaskModel(tiny_with(context_length=LENGTH, **FIELDS), "gpt", "classify", 2)
    params = filled(module, TOKENS, ONES, ONES)
    body = make_module("gpt", module.cfg)
    params["body"] = filled(body, TOKENS)  # a head's own initial parameters need no output layer
    batch = BATCH | {"types": ONES * 0, "label": np.zeros(ROWS, np.int32), "weight": np.ones(ROWS, np.float32)}
    sums = module.apply(
        {"params": params}, method=lambda bound: task_objective("classify", 0.5).terms(bound, batch, True)
    )
    logits = body.apply({"params": params["body"]}, method=lambda bound: bound.logits(bound(TOKENS)[0]))
    next_ones = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), TOKENS[:, 1:, None], axis=-1)
    np.testing.assert_allclose(sums["lm"].nats, -0.5 * next_ones.sum(), rtol=1e-5)


def test_scoring_is_that_of_the_logits(model):
    for family, scored in (("gpt", next_token_logprobs), ("seq2seq", pair_logprobs)):
        module, params = model(family)
        wanted = jnp.sum(logprobs(module, params) * BATCH["weights"], axis=1)
        np.testing.assert_allclose(scored(module, params, BATCH), wanted, rtol=1e-5)


def test_flops_of_the_transform_are_those_of_its_product(model, tiny_with):
    module, params = model("gpt")
    features = jax.ShapeDtypeStruct((1, LENGTH, module.cfg.d_model), jnp.float32)

    def transform(x):
        return module.apply({"params": params}, x, method="transform")

    plain = tiny_with(context_length=LENGTH, **FIELDS | {"output_transform": False})
    more = training_flops_per_token(module.cfg, causal=True) - training_flops_per_token(plain, causal=True)
    assert LENGTH * more == 3 * executed_flops(jax.make_jaxpr(transform)(features).jaxpr)[0]


@pytest.mark.parametrize("family", ["gpt", "bert"])
def test_padded_rows_stand_for_no_token(tiny_with, filled, family):
    plain, padded = tiny_with(n_layers=1), tiny_with(n_layers=1, pad_vocab_to_multiple_of=16)
    tokens = jnp.arange(14).reshape(2, 7) % 37
    module, wide = make_module(family, plain), make_module(family, padded)
    params = filled(wide, **tiny_inputs(family))
    cut = jax.tree.map(lambda x: x[:37] if x.shape[:1] == (48,) else x, params)

    @jax.jit
    def read(cut, params):
        features = module.apply({"params": cut}, tokens)
        features = features[0] if family == "gpt" else features
        short, long = (m.apply({"params": p}, features, method="logits") for m, p in ((module, cut), (wide, params)))
        return features, short, long, wide.apply({"params": params}, method="unembedding")

    features, short, long, (table, bias, _) = read(cut, params)
    assert long.shape[-1] == 48
    np.testing.assert_allclose(long[..., :37], short, rtol=1e-5, atol=1e-6)
    assert float(jax.nn.softmax(long)[..., 37:].sum()) == 0.0

    def loss(table, bias=None):
        return cross_entropy(features, table, bias, 0.0, tokens, jnp.ones(tokens.shape)).nats

    nats, slope = jax.jit(jax.value_and_grad(loss))(table, bias)
    assert float(nats) == pytest.approx(float(jax.jit(loss)(table[:37], None if family == "gpt" else bias[:37])))
    assert float(jnp.abs(slope[37:]).max()) == 0.0
