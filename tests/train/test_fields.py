"""Every field of the optimizer and of the objective changes what is computed: the program, the schedule, or the batch."""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import numpy as np
import pytest

from bothways.config import ObjectiveConfig, OptimizerConfig
from bothways.data import pipeline
from bothways.data.contrasts import Sets
from bothways.data.tokenizer import made_up_vocabulary
from bothways.data.tokens import Tokens
from bothways.registry import make_module, tiny_inputs
from bothways.train.objectives import make_objective
from bothways.train.optimizer import make_optimizer
from tests.train.test_step import config_of

ADAM, MUON = {"weight_decay": 0.1}, {"name": "muon"}
OPTIMIZER = {
    "name": ("lion", ADAM),
    "learning_rate": (0.013, ADAM),
    "adam_learning_rate": (0.017, MUON),
    "schedule": ("linear", ADAM),
    "warmup_steps": (7, ADAM),
    "decay_steps": (31, ADAM),
    "decay_fraction": (0.7, {"schedule": "wsd"}),
    "final_lr_ratio": (0.3, ADAM),
    "b1": (0.7, ADAM),
    "b2": (0.83, ADAM),
    "eps": (1e-3, ADAM),
    "momentum": (0.77, MUON),
    "weight_decay": (0.3, ADAM),
    "clip_norm": (0.11, ADAM),
}
"""Another value of the field, beside these others."""

MASKED, HYBRID, CONTRAST = {"kind": "masked"}, {"kind": "hybrid"}, {"kind": "contrastive"}
OBJECTIVE = {
    "kind": ("hybrid", {}),
    "causal_share": (0.9, HYBRID),
    "mask_rate": (0.6, MASKED),
    "block_sizes": ((2,), {"kind": "diffusion"}),
    "weighting": ("flat", {"kind": "diffusion"}),
    "span_length": (1.0, {"kind": "spans"}),
    "mask_token_prob": (0.1, MASKED),
    "random_token_prob": (0.0, MASKED),
    "whole_words": (True, MASKED),
    "next_sentence": (True, MASKED),
    "label_smoothing": (0.2, {}),
    "loss": ("cosent", CONTRAST),
    "pool": ("last", CONTRAST),
    "text_length": (7, CONTRAST),
    "temperature": (0.3, CONTRAST),
    "margin": (0.3, CONTRAST | {"loss": "triplet"}),
    "widths": ((5, 11), CONTRAST),
}


@pytest.fixture(scope="module")
def shapes(tiny):
    """Of a GPT's parameters: Muon asks for their names."""
    module = make_module("gpt", dataclasses.replace(tiny, n_layers=1))
    return jax.eval_shape(module.init, jax.random.key(0), **tiny_inputs("gpt"))["params"]


def update_program(shapes, **fields) -> str:
    optimizer = make_optimizer(OptimizerConfig(**fields), 100)
    state = jax.eval_shape(optimizer.init, shapes)
    return str(jax.make_jaxpr(optimizer.update)(shapes, state, shapes))


def twice(effect: Callable, known: dict = {}, **fields) -> object:  # noqa: B006  (kept between tests)
    """An effect that is the same each time; found twice for each set of fields, and then remembered."""
    key = effect.func, tuple(fields.items())
    if key not in known:
        known[key] = effect(**fields)
        assert known[key] == effect(**fields)
    return known[key]


@pytest.mark.parametrize("field", OPTIMIZER)
def test_a_field_of_the_optimizer_changes_the_update(field, shapes):
    value, others = OPTIMIZER[field]
    effect = functools.partial(update_program, shapes)
    assert twice(effect, **others) != effect(**others | {field: value})


def objective_effect(tiny, **fields) -> tuple[dict[str, bytes], str]:
    """The first batches that an objective draws, and the program of its loss."""
    cfg = ObjectiveConfig(**fields)
    family = {"masked": "bert", "spans": "seq2seq"}.get(cfg.kind, "gpt")
    model = config_of(family, dataclasses.replace(tiny, n_layers=1))
    model = dataclasses.replace(model, next_sentence=cfg.next_sentence)
    ids = np.random.default_rng(0).integers(5, tiny.vocab_size, 600).astype(np.int32)
    ids[::75] = 2
    objective = make_objective(cfg, made_up_vocabulary(tiny.vocab_size))
    sets = Sets(4, ([2], [3]), np.arange(2.0)) if cfg.kind == "contrastive" else None
    rows, example = objective.source(Tokens(ids, np.arange(0, 600, 75), 600, sets=sets), 22, False)
    batches = pipeline.training_batches(rows, example, batch_size=8, seed=0)
    batch = next(itertools.islice(batches, 1, 2))
    module = make_module(family, model)
    params = jax.eval_shape(module.init, jax.random.key(0), **tiny_inputs(family))["params"]

    def loss(params, batch):
        def run(bound):
            return objective.terms(bound, batch, False)

        return module.apply({"params": params}, rngs={"dropout": jax.random.key(0)}, method=run)

    return {name: np.asarray(x).tobytes() for name, x in batch.items()}, str(jax.make_jaxpr(loss)(params, batch))


@pytest.mark.parametrize("field", OBJECTIVE)
def test_a_field_of_the_objective_changes_the_batch_or_the_loss(field, tiny):
    value, others = OBJECTIVE[field]
    effect = functools.partial(objective_effect, tiny)
    assert twice(effect, **others) != effect(**others | {field: value})


def test_every_field_is_tested_above():
    for config, table in ((OptimizerConfig, OPTIMIZER), (ObjectiveConfig, OBJECTIVE)):
        assert {field.name for field in dataclasses.fields(config)} == set(table)
