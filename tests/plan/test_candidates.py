"""Layouts by their guessed memory: the leanest of those that look too large comes first, and frozen weights are weights only."""

import dataclasses

import pytest

from bothways.chips import Topology
from bothways.configs import find
from bothways.model.config import LoRAConfig
from bothways.plan.candidates import Guess, candidates

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
