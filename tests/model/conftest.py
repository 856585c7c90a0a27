"""Random parameters, and the shapes of those of every recipe."""

import dataclasses

import jax
import numpy as np
import pytest

from bothways.configs import names
from bothways.model.axes import path_names
from bothways.recipes import Recipe
from bothways.rundir import param_shapes


@pytest.fixture(scope="session")
def filled():
    """Random parameters for a module called on these inputs: no bias is 0, no scale is 1, and nothing is compiled."""

    def fill(module, *inputs, **named) -> dict:
        rng = np.random.default_rng(0)

        def numbers(path: tuple, shape: jax.ShapeDtypeStruct) -> np.ndarray:
            std = 0.3 if path_names(path)[-1] == "kernel" else 0.5
            return rng.normal(path_names(path)[-1] == "scale", std, shape.shape).astype(np.float32)

        shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, **named)["params"])
        return jax.tree_util.tree_map_with_path(numbers, shapes)

    return fill


@pytest.fixture(scope="session")
def recipe_shapes() -> dict:
    """Name of every recipe in configs/ -> (resolved model configuration, shapes of its parameters)."""

    def shapes(recipe: Recipe) -> tuple:
        vocab_size = recipe.model.vocab_size or recipe.data.vocab_size
        # A loop over layers has the same parameters, and is traced in less time.
        model = dataclasses.replace(recipe.model, vocab_size=vocab_size, scan_layers=True)
        return model.resolved(), param_shapes(dataclasses.replace(recipe, model=model))

    return {name: shapes(recipe) for name, recipe in names().items()}
