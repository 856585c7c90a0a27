"""One family's weights in another: the same features where the masks agree, and what is new or left behind is said."""

import dataclasses

import jax
import numpy as np
import pytest

from bothways.config import ObjectiveConfig
from bothways.errors import InputError
from bothways.model.gpt import MaskedNextToken
from bothways.registry import make_module
from bothways.train.start import check_start, start_from
from tests.train.bodies import body, write

DIAL = ObjectiveConfig(kind="diffusion", block_sizes=(1, 4, 0))
ROWS = ObjectiveConfig(kind="diffusion")


@pytest.fixture(scope="module")
def homes(tiny, tmp_path_factory):
    """A GPT that was trained causally, and a BERT of the same stack."""
    home = tmp_path_factory.mktemp("starts")
    runs = {"gpt": body("gpt", tiny)}
    bert = body("bert", tiny)
    model = dataclasses.replace(runs["gpt"].recipe.model, masked_head=True)
    recipe = dataclasses.replace(bert.recipe, model=model)
    module = make_module("bert", model)
    params = jax.jit(module.init)(jax.random.key(5), np.zeros((1, 2), np.int32))["params"]
    runs["bert"] = dataclasses.replace(bert, recipe=recipe, module=module, params=params)
    for name, run in runs.items():
        write(run, home / name)
    return home, runs


def started(homes, name: str, family: str, objective: ObjectiveConfig, capsys, **model):
    """Module and parameters of a recipe that starts from a run, and what was said."""
    home, runs = homes
    was = runs[name]
    recipe = dataclasses.replace(
        was.recipe,
        family=family,
        objective=objective,
        model=dataclasses.replace(was.recipe.model, **model),
        train=dataclasses.replace(was.recipe.train, init_from=str(home / name)),
    )
    recipe.check(1)
    check_start(recipe, was.tokenizer)
    module = make_module(family, recipe.model)
    fresh = jax.jit(module.init)(jax.random.key(9), np.zeros((1, 2), np.int32))["params"]
    params = start_from(home / name, recipe, fresh, None)
    return module, params, capsys.readouterr().err


TOKENS = np.random.default_rng(0).integers(5, 300, (2, 11)).astype(np.int32)


def test_a_gpt_is_a_diffusion_model_at_blocks_of_one(homes, capsys):
    module, params, said = started(homes, "gpt", "gpt", DIAL, capsys)
    was = homes[1]["gpt"]
    found = jax.jit(lambda p: module.apply({"params": p}, TOKENS, block=1)[0])(params)
    wanted = jax.jit(lambda p: was.module.apply({"params": p}, TOKENS)[0])(was.params)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert "new" not in said
    assert "left behind" not in said


def test_a_gpt_becomes_a_bert_with_the_same_features_both_ways(homes, capsys):
    module, params, said = started(homes, "gpt", "bert", ObjectiveConfig(kind="masked"), capsys)
    was = homes[1]["gpt"]
    found = jax.jit(lambda p: module.apply({"params": p}, TOKENS))(params)
    own = MaskedNextToken(dataclasses.replace(was.module.cfg, predicts="own"))
    wanted = jax.jit(lambda p: own.apply({"params": p}, TOKENS))(was.params)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert "new and random: mlm, mlm/dense, mlm/norm" in said
    assert "predicted the next token there, and are trained to predict their own token here" in said


@pytest.mark.parametrize(("family", "model"), [("bert", {}), ("gpt", {"predicts": "own"})])
def test_a_bert_becomes_a_diffusion_model_of_whole_rows(homes, capsys, family, model):
    module, params, said = started(homes, "bert", family, ROWS, capsys, **model)
    was = homes[1]["bert"]
    positions = np.broadcast_to(np.arange(11), TOKENS.shape)
    found = jax.jit(lambda p: module.apply({"params": p}, TOKENS, None, positions, method="denoise"))(params)
    wanted = jax.jit(lambda p: was.module.apply({"params": p}, TOKENS))(was.params)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert ("left behind: mlm, mlm/dense, mlm/norm" in said) == (family == "gpt")
    assert "new" not in said


def test_a_decoders_transform_becomes_that_of_the_masked_head(tiny, tmp_path, capsys):
    """As ModernBERT's decoder has it; both biases of scores are 0 at first."""
    was = body("gpt", tiny, output_transform=True, output_bias=True)
    write(was, tmp_path / "gpt")
    plain, masked = {"output_transform": False, "output_bias": False}, ObjectiveConfig(kind="masked")
    _, params, said = started((tmp_path, {"gpt": was}), "gpt", "bert", masked, capsys, **plain)
    for name in ("dense", "norm"):
        jax.tree.map(np.testing.assert_array_equal, params["mlm"][name], was.params["mlm"][name])
    assert "new and random: mlm; left behind: lm_head;" in said


def test_another_stack_is_refused(homes, capsys):
    with pytest.raises(InputError, match="model.qk_norm is True, and there False"):
        started(homes, "gpt", "bert", ObjectiveConfig(kind="masked"), capsys, qk_norm=True)
