"""Layouts by their guessed memory: the leanest of those that look too large comes first, and frozen weights are weights only."""

import dataclasses
import math
import types

import pytest

from bothways.chips import Topology
from bothways.configs import find
from bothways.model.config import LoRAConfig
from bothways.plan import training
from bothways.plan.candidates import Guess, candidates, flags

TOPOLOGY = Topology.parse("v5e:2x2")


@pytest.fixture(scope="module")
def found() -> list[Guess]:
    return candidates(find("gpt3_13b"), TOPOLOGY)


def test_of_layouts_that_look_too_large_the_leanest_comes_first(found):
    """So that one that fits after all is tried before what never would."""
    memory = [g.memory for g in found]
    assert min(memory) > 0.9 * TOPOLOGY.chip.memory
    assert memory == sorted(memory)


def test_frozen_weights_have_no_gradient_and_no_optimizer_state(found):
    recipe = find("gpt3_13b")
    lora = LoRAConfig(rank=8, frozen="bfloat16")
    small = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, lora=lora))
    whole, adapted = (min(g.memory for g in some) for some in (found, candidates(small, TOPOLOGY)))
    count = 12.85e9 / 4  # on one chip; 2 bytes each instead of 16, or 20 where gradients are added up
    assert 13 * count < whole - adapted < 19 * count


def test_of_layouts_that_were_compiled_the_fastest_that_fits_is_the_best(tiny_recipe, eight_devices, monkeypatch):
    """Whatever was guessed: here the first does not fit, and the second takes longer than the roofline says."""
    model = dataclasses.replace(tiny_recipe.model, d_model=24, vocab_size=320)
    recipe, asked = dataclasses.replace(tiny_recipe, model=model), []
    outcomes = [(False, 1.0, None), (True, 2.0, 9.0), (True, 7.0, 5.0), (True, 8.0, None)]

    def compiled(layout, topology, before):
        fits, step, scheduled = outcomes[len(asked)]
        asked.append(layout)
        known = {"memory_per_chip": 1.0, "memory_limit": 1.0, "mfu_bound": 0.5, "mfu_expected": None}
        told = {"fits": fits, "step_seconds": step, "scheduled_seconds": scheduled}
        return types.SimpleNamespace(**known, **told, flags=flags(before, layout))

    monkeypatch.setattr(training, "plan", compiled)
    topology = Topology.parse("cpu:8")
    found = training.search(recipe, topology, lambda _: None, tries=len(outcomes))
    assert [p.step_seconds for p in found] == [7.0, 8.0, 2.0, 1.0]
    assert found[0].flags == flags(recipe, asked[2])
    assert asked[0] == candidates(recipe, topology)[0].recipe  # what promises most is compiled first
    assert all(math.prod(layout.mesh.sizes(8).values()) == 8 for layout in asked)
