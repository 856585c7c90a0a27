"""FLOPs: counted in a trace, and computed from shapes."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from bothways.config import ObjectiveConfig
from bothways.flops import executed_flops, recipe_flops_per_token, seq2seq_flops_per_row
from bothways.model.adapters import join, split
from bothways.model.config import LoRAConfig
from bothways.recipes import Recipe
from bothways.registry import make_module


def test_executed_flops_count_loops_and_recomputation():
    def f(w):
        def turn(x, _):
            return jax.checkpoint(lambda y: jnp.sin(y @ w))(x), None

        return jax.lax.scan(turn, jnp.ones((3, 5)), length=7)[0].sum()

    one = 2 * 3 * 5 * 5
    shape = jax.ShapeDtypeStruct((5, 5), jnp.float32)
    forward = executed_flops(jax.make_jaxpr(f)(shape).jaxpr)
    assert forward.tolist() == [7 * one, 0]
    assert executed_flops(jax.make_jaxpr(jax.grad(f))(shape).jaxpr)[0] == 7 * 4 * one  # again, and two products back


@pytest.mark.parametrize("fields", [{}, {"embed_width": 7}, {"masked_transform": False}])
def test_flops_of_a_masked_head_are_those_of_its_products(tiny_with, fields):
    """And of the layer behind narrow embeddings; the share of tokens that are predicted goes through the head alone."""
    cfg, share = tiny_with(context_length=11, **fields), 3 / 11
    module, tokens = make_module("bert", cfg), jnp.zeros((1, 11), jnp.int32)
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), tokens))

    def scores(params):
        features = module.apply(params, tokens)
        return module.apply(params, features[:, :3], method="logits")

    recipe = Recipe(family="bert", model=cfg, objective=ObjectiveConfig("masked", mask_rate=share))
    spare = 2 * 3 * cfg.narrow * (cfg.table_rows - cfg.vocab_size)
    products = executed_flops(jax.make_jaxpr(scores)(params).jaxpr)[0] - spare
    assert 11 * recipe_flops_per_token(recipe) / 3 == pytest.approx(products, rel=1e-12)


def test_flops_of_an_encoder_decoder_are_those_of_its_products(tiny_with):
    """With a target shorter than its source; the drawn mask computes what causality hides, and the head is not here."""
    cfg, length = tiny_with(context_length=11, n_kv_heads=1, d_value=5), 7
    module, tokens, source = make_module("seq2seq", cfg), jnp.zeros((1, length), jnp.int32), jnp.zeros((1, 11), jnp.int32)
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), tokens, source))
    traced = jax.make_jaxpr(lambda params: module.apply(params, tokens, source))(params)
    hidden = cfg.n_layers * cfg.n_heads * (cfg.d_head + cfg.d_value) * length**2 / 2
    head = length * cfg.vocab_size * cfg.d_model
    assert executed_flops(traced.jaxpr)[0] == seq2seq_flops_per_row(cfg, length) / 3 + 2 * (hidden - head)


def test_flops_of_adapters_leave_the_gradients_of_frozen_weights_out(tiny_with):
    """Those of a step's trace: the gradient of what is trained, given tokens whose embeddings have none."""
    cfg = tiny_with(context_length=11, lora=LoRAConfig(rank=3))
    module, tokens = make_module("gpt", cfg), jnp.zeros((1, 11), jnp.int32)
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), tokens)["params"])
    adapters, frozen = split(params)

    def loss(adapters, frozen):
        features, _ = module.apply({"params": join(adapters, frozen)}, tokens)
        return module.apply({"params": join(adapters, frozen)}, features, method="logits").sum()

    executed = executed_flops(jax.make_jaxpr(jax.grad(loss))(adapters, frozen).jaxpr)[0]
    assert 11 * recipe_flops_per_token(Recipe(model=cfg)) == pytest.approx(executed, rel=0.1)
    whole = dataclasses.replace(cfg, lora=LoRAConfig())
    assert recipe_flops_per_token(Recipe(model=cfg)) < recipe_flops_per_token(Recipe(model=whole))


@pytest.mark.parametrize(("predicts", "same"), [("next", True), ("own", False)])
def test_blocks_of_one_are_one_stream_where_next_tokens_are_predicted(tiny_with, predicts, same):
    cfg = tiny_with(context_length=11, predicts=predicts)
    found = [
        recipe_flops_per_token(Recipe(model=cfg, objective=o))
        for o in (ObjectiveConfig("diffusion", block_sizes=(1,)), ObjectiveConfig())
    ]
    assert (found[0] == found[1]) == same
