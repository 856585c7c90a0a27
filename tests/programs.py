"""Programs of training, traced and compiled once for all runs of a process that ask for the same."""

import contextlib
import functools
import pickle
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from bothways.data.tokenizer import Vocabulary
from bothways.recipes import Recipe
from bothways.train import loop
from bothways.train.tuning import FinetuneRunner


def once(make: Callable[..., Any], key: Callable[..., Hashable]) -> Callable[..., Any]:
    """`make`, whose results are kept: `key` is, of its arguments, all that a result depends on."""
    kept: dict[Hashable, Any] = {}

    @functools.wraps(make)
    def found(*args: Any, **options: Any) -> Any:
        of = key(*args, **options), jax.config.read("jax_disable_most_optimizations")
        if of not in kept:
            kept[of] = make(*args, **options)
        return kept[of]

    return found


def flat(tree: Any) -> Hashable:
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple(leaves)


def of_objective(recipe: Recipe, vocabulary: Vocabulary) -> Hashable:
    return recipe.family, recipe.model, recipe.objective, recipe.data, pickle.dumps(vocabulary)


def of_train_step(module: Any, objective: Any, optimizer: Any, mesh: Any, shardings: Any, **options: Any) -> Hashable:
    return module, objective, optimizer, mesh, flat(shardings), tuple(sorted(options.items()))


def of_eval_step(module: Any, objective: Any, mesh: Any, shardings: Any) -> Hashable:
    return module, objective, mesh, flat(shardings)


def compiled_init(init_state: Callable[..., Any]) -> Callable[..., Any]:
    """`init_state`, traced once for a module, whose parameters depend on the shapes of its inputs alone."""

    def made(module: Any, inputs: Any, optimizer: Any) -> Callable[[Any], Any]:
        shapes = {name: (x.shape, x.dtype) for name, x in inputs.items()}

        def fresh(seed: Any) -> Any:
            return init_state(module, {name: jnp.zeros(*shape) for name, shape in shapes.items()}, optimizer, seed)

        return jax.jit(fresh)

    compiled = once(made, lambda module, inputs, optimizer: (module, optimizer))
    return lambda module, inputs, optimizer, seed: compiled(module, inputs, optimizer)(seed)


TUNED = "shapes", "shardings", "fresh", "frozen", "step", "read"
"""What FinetuneRunner._programs sets."""


def programs_of_tuning(make: Callable[[FinetuneRunner], None]) -> Callable[[FinetuneRunner], None]:
    """FinetuneRunner._programs; where there are adapters, it also places the weights that they are for."""

    def key(tuner: FinetuneRunner) -> Hashable:
        body = flat(jax.tree.map(lambda x: (x.shape, str(x.dtype)), tuner.run.params))
        return tuner.module, tuner.mesh, tuner.cfg, tuner.steps, tuner.task.kind, tuner.recipe.model, body

    def made(tuner: FinetuneRunner) -> dict[str, Any]:
        before = set(vars(tuner))
        make(tuner)
        assert set(vars(tuner)) == before | set(TUNED), "FinetuneRunner._programs sets something else"
        return {name: getattr(tuner, name) for name in TUNED}

    kept = once(made, key)
    return lambda tuner: make(tuner) if tuner.cfg.lora.rank else vars(tuner).update(kept(tuner))


@contextlib.contextmanager
def kept_programs() -> Iterator[None]:
    """In here runs with the same module, objective, optimizer and mesh have one train step, one evaluation and one start.

    Objectives and optimizers are the same where they were made of the same configuration, and only there: they are
    functions, which are compared by identity.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "objective_of", once(loop.objective_of, of_objective))
        patch.setattr(loop, "make_optimizer", once(loop.make_optimizer, lambda cfg, steps: (cfg, steps)))
        patch.setattr(loop, "make_train_step", once(loop.make_train_step, of_train_step))
        patch.setattr(loop, "make_eval_step", once(loop.make_eval_step, of_eval_step))
        patch.setattr(loop, "init_state", compiled_init(loop.init_state))
        patch.setattr(FinetuneRunner, "_programs", programs_of_tuning(FinetuneRunner._programs))
        yield
