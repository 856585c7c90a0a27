"""One set of weights in both directions: the model with BERT's interface, the objective's sums, and a run with every command."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bothways
from bothways.config import ObjectiveConfig
from bothways.data import examples
from bothways.data.rng import ExampleRng
from bothways.data.tokenizer import made_up_vocabulary
from bothways.errors import InputError
from bothways.model.gpt import GPT, MaskedNextToken
from bothways.model.task import TaskModel
from bothways.sample import evaluate
from bothways.sample.hybrid import HybridModel
from bothways.sample.score import causal_logprobs
from bothways.train import loop
from bothways.train.objectives import make_objective

T, V = 11, 37


@pytest.fixture(scope="module")
def body(tiny):
    """(configuration, random parameters, tokens [2, T])"""
    cfg = dataclasses.replace(tiny, n_layers=2)
    tokens = jnp.asarray(np.random.default_rng(1).integers(5, V, (2, T)))
    return cfg, jax.jit(GPT(cfg).init)(jax.random.key(3), tokens)["params"], tokens


def test_the_token_at_i_is_told_by_the_output_before_it(body):
    cfg, params, tokens = body
    whole = jnp.full(2, T)
    both, _ = GPT(cfg).apply({"params": params}, tokens, prefix=whole)
    got = MaskedNextToken(cfg).apply({"params": params}, tokens)
    np.testing.assert_array_equal(got[:, 1:], both[:, :-1])


def test_read_both_ways_every_output_depends_on_every_token(body):
    cfg, params, tokens = body
    changed = jnp.where(jnp.eye(T, dtype=bool), jnp.where(tokens[0] == 6, 7, 6), tokens[0])  # row i: token i is another
    rows = jnp.concatenate([tokens[:1], changed])
    for module in (MaskedNextToken(cfg), TaskModel(cfg, "gpt", "tag", 3, both_ways=True)):
        held = params if isinstance(module, GPT) else {"body": params, "task_head": head(cfg.d_model)}
        extra = () if isinstance(module, GPT) else (jnp.ones_like(rows), jnp.zeros_like(rows))
        output = jax.jit(module.apply)({"params": held}, rows, *extra)
        assert (jnp.abs(output[1:] - output[0]).max(axis=2) > 1e-7).all()


def head(width: int) -> dict:
    return {"kernel": jax.random.normal(jax.random.key(5), (width, 3)), "bias": jnp.zeros(3)}


def test_the_loss_reads_each_row_by_its_own_mask(body):
    cfg, params, _ = body
    vocabulary = made_up_vocabulary(V)
    objective = make_objective(ObjectiveConfig(kind="hybrid", mask_rate=0.4), vocabulary)
    row = {"tokens": np.arange(6, 6 + T + 1, dtype=np.int32)[None], "segments": np.ones((1, T + 1), np.int32)}
    draws = ExampleRng(0, np.arange(1))
    rows = [examples.hybrid(row, draws, vocabulary, examples.Masking(0.4), share) for share in (1.0, 0.0)]
    batch = {k: jnp.concatenate([r[k] for r in rows]) for k in rows[0]}

    def terms(bound):
        return objective.terms(bound, batch, True)["hybrid"].nats

    got = GPT(cfg).apply({"params": params}, method=terms)
    forward, _ = GPT(cfg).apply({"params": params}, batch["tokens"][:1])
    later = MaskedNextToken(cfg).apply({"params": params}, batch["tokens"][1:])
    features = jnp.concatenate([forward, jnp.roll(later, -1, axis=1)])
    logits = GPT(cfg).apply({"params": params}, features, method="logits")
    nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)[..., 0]
    np.testing.assert_allclose(got, jnp.sum(nats * batch["weights"]), rtol=1e-5)
    assert float(objective.weights(batch)["hybrid"]) == pytest.approx(T + round(0.4 * (T - 1)) / 0.4)


def test_all_rows_forward_is_the_causal_objective(body):
    cfg, params, tokens = body
    vocabulary = made_up_vocabulary(V)
    plain = {"tokens": tokens, "targets": jnp.roll(tokens, -1, 1), "weights": jnp.ones((2, T))}
    batch = plain | {"positions": jnp.tile(jnp.arange(T), (2, 1)), "segments": jnp.ones((2, T), int)}
    losses = []
    for kind in ("causal", "hybrid"):
        objective = make_objective(ObjectiveConfig(kind=kind), vocabulary)
        ((nats, _),) = (
            GPT(cfg)
            .apply(
                {"params": params}, method=lambda m, o=objective: o.terms(m, batch | {"prefix": jnp.zeros(2, int)}, True)
            )
            .values()
        )
        losses.append(float(nats))
    assert losses[0] == losses[1]


@pytest.fixture(scope="module")
def run(tiny_recipe, tmp_path_factory, one_device):
    home = tmp_path_factory.mktemp("runs") / "hybrid"
    recipe = dataclasses.replace(tiny_recipe, objective=ObjectiveConfig(kind="hybrid", mask_rate=0.3))
    loop.train(recipe, home)
    return bothways.load(home)


def test_a_hybrid_run_continues_fills_and_scores(run, capsys):
    home = str(run.run.home)
    assert bothways.main(["sample", home, "the dog", "--max-tokens", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 3
    assert bothways.main(["fill", home, "the [MASK] sees", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["masks"]) == 1
    texts = ["the dog sees the cat", "a ship"]
    ids = [[run.tokenizer.bos, *run.tokenizer.encode(t)] for t in texts]
    expected = causal_logprobs(run.run.module, run.run.params, ids, run.recipe.model.context_length)
    assert [s.logprob for s in run.score(texts)] == pytest.approx(expected, abs=1e-3)
    scores = {rule: run.score(texts, rule)[0].logprob for rule in ("causal", "pll", "pll_word", "bound")}
    assert len(set(scores.values())) == 4
    with pytest.raises(InputError, match=r"'nonsense' is not for .* 50% .* it scores by: causal, pll, pll_word, bound"):
        run.score(texts, "nonsense")


@pytest.mark.parametrize(("share", "rule", "known"), [(0.0, "causal", "pll, pll_word, bound"), (1.0, "bound", "causal")])
def test_a_direction_without_training_is_not_scored(run, share, rule, known):
    objective = dataclasses.replace(run.recipe.objective, causal_share=share)
    other = HybridModel(dataclasses.replace(run.run, recipe=dataclasses.replace(run.recipe, objective=objective)))
    with pytest.raises(InputError, match=f"{rule!r} is not for .* {share:.0%} were read forward; it scores by: {known}$"):
        other.score(["the dog"], rule)


def test_a_hybrid_run_is_evaluated_in_both_readings(run):
    found = {f.metric: f for f in evaluate.evaluate(run, ["validation"])}
    assert {"loss", "bits_per_byte", "both_ways_mlm", "both_ways_unigram", "both_ways_bits_per_byte"} == set(found)
    for figure in found.values():
        assert figure.interval[0] <= figure.value <= figure.interval[1]


def test_what_cannot_be_is_refused_before_anything_is_read(tiny_recipe):
    for family, kind, share in (("bert", "hybrid", 0.5), ("gpt", "masked", 0.5), ("gpt", "hybrid", 1.5)):
        wanted = ObjectiveConfig(kind=kind, causal_share=share)
        recipe = dataclasses.replace(tiny_recipe, family=family, objective=wanted)
        with pytest.raises(InputError, match=r"is not for a|causal_share"):
            recipe.check(8)
