"""Planning of the step that samples: the real programs compile, and what it prints is counted by hand."""

import dataclasses
import json

import jax
import pytest

import bothways
from bothways import chips
from bothways.chips import GIB, Topology
from bothways.config import ObjectiveConfig
from bothways.errors import InputError
from bothways.plan import hlo
from bothways.plan.candidates import parameter_axes
from bothways.plan.decoding import _turn, plan_decoding
from tests.plan.test_plan import PROGRAM


@pytest.fixture(scope="module", autouse=True)
def compiled_without_optimization():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def small(recipe, **model):
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, vocab_size=37, n_layers=1, **model))


def test_a_decoding_step(tiny_recipe, eight_devices):
    recipe = small(tiny_recipe)
    cfg = recipe.model.resolved()
    d = plan_decoding(recipe, Topology.parse("cpu:8"), rows=3)
    assert (d.step, d.chips, d.fits) == ("decode", 1, True)
    parameters = sum(jax.numpy.prod(jax.numpy.array(shape)).item() for shape, _ in parameter_axes(recipe))
    assert d.memory["weights"] == 4 * parameters
    # keys and values of every place in float32, and a length per row
    assert d.memory["cache"] == 3 * (4 * cfg.context_length * cfg.n_kv_heads * (cfg.d_head + cfg.d_value) + 4)
    assert d.weights_seconds == pytest.approx(4 * parameters / chips.CPU.bandwidth)
    assert d.memory_seconds > d.weights_seconds
    assert d.step_seconds == max(d.weights_seconds, d.compute_seconds, d.memory_seconds, d.network_seconds)
    assert d.tokens_per_second == pytest.approx(3 / d.step_seconds)


def test_a_denoising_step(tiny_recipe, eight_devices):
    """Of blocks the loop with its cache; of whole rows a forward pass without one."""
    base = small(tiny_recipe, predicts="own")
    recipe = dataclasses.replace(base, objective=ObjectiveConfig(kind="diffusion", block_sizes=(4, 2)))
    cfg = recipe.model.resolved()
    d = plan_decoding(recipe, Topology.parse("cpu:8"), rows=3)
    assert (d.step, d.chips, d.fits) == ("denoise", 1, True)
    assert d.memory["cache"] == 3 * (4 * cfg.context_length * cfg.n_kv_heads * (cfg.d_head + cfg.d_value) + 4)
    assert d.tokens_per_second == pytest.approx(3 * 4 / 5 / d.step_seconds)  # four passes, and one that keeps the block
    narrow = plan_decoding(recipe, Topology.parse("cpu:8"), rows=3, block=2)
    assert d.compute_seconds == pytest.approx(2 * narrow.compute_seconds, rel=0.2)
    with pytest.raises(InputError, match="--block is 3, and tiny trains blocks of 4, 2"):
        plan_decoding(recipe, Topology.parse("cpu:8"), rows=3, block=3)
    whole = dataclasses.replace(base, objective=ObjectiveConfig(kind="diffusion"))
    assert plan_decoding(whole, Topology.parse("cpu:8"), rows=3).step == "read"


def test_as_few_chips_as_hold_it(tiny_recipe, eight_devices, monkeypatch):
    recipe = small(tiny_recipe, n_heads=4, n_kv_heads=4, d_model=24)
    one = plan_decoding(recipe, Topology.parse("cpu:8"), rows=2)
    monkeypatch.setattr(chips, "CPU", dataclasses.replace(chips.CPU, memory=0.8 * one.memory_per_chip))
    two = plan_decoding(recipe, Topology.parse("cpu:8"), rows=2)
    assert two.fits
    assert two.chips > one.chips
    assert two.memory["weights"] < one.memory["weights"]
    monkeypatch.setattr(chips, "CPU", dataclasses.replace(chips.CPU, memory=1000))
    with pytest.raises(InputError, match="do not fit on cpu:8"):
        plan_decoding(recipe, Topology.parse("cpu:8"), rows=2)


def test_one_turn_of_the_loop_is_what_a_second_turn_adds():
    endless = PROGRAM.replace("direction=LT", "direction=NE")
    turn = _turn(hlo.read(endless, 4), hlo.read(endless, 4, 2))
    whole = hlo.read(PROGRAM, 4)
    assert turn.cycles == whole.cycles / 7
    assert turn.memory == (whole.memory - 2 * 308) / 7
    assert {(c.kind, c.times) for c in turn.collectives} == {("all-gather", 1), ("reduce-scatter", 1)}


@pytest.mark.parametrize("family", ["bert", "seq2seq"])
def test_the_command_line_plans_every_family(family, capfd, eight_devices):
    name = {"bert": "shakespeare_bert", "seq2seq": "bible"}[family]
    argv = ["plan", name, "--topology", "cpu:8", "--model.n-layers", "1", "--model.context-length", "16", "--rows", "2"]
    argv += ["--data.vocab-size", "320", "--model.d-model", "16", "--optimizer.name", "adamw", "--json"]
    assert bothways.main(argv) == 0
    output = json.loads(capfd.readouterr().out)["decode"]
    assert output["step"] == ("read" if family == "bert" else "decode")
    assert output["fits"]
    assert output["memory_limit"] == 4 * GIB
    assert ("cache" in output["memory"]) == (family == "seq2seq")
    assert bothways.main([*argv, "--rows", "0"]) == 2
    assert "--rows is 0" in capfd.readouterr().err
