"""Objectives: what an example is, and what the loss asks for. Each is a few pure functions."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from common.config import ObjectiveConfig
from data import examples
from data.pipeline import ExampleFn
from model.loss import TokenLoss, cross_entropy

Batch = dict[str, jax.Array]
Sums = dict[str, TokenLoss]


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss is the sum over terms of (sum of nats) / (sum of weights), each division made once, globally.

    Args:
      example: row, generator -> model inputs, in numpy.
      weights: batch -> weight of every term; a function of the batch alone.
      terms: bound module, batch, deterministic -> sums of every term.
    """

    example: ExampleFn
    weights: Callable[[Batch], dict[str, jax.Array]]
    terms: Callable[[Any, Batch, bool], Sums]


def causal(cfg: ObjectiveConfig) -> Objective:
    """Next-token prediction: the objective of GPT (GPT-1, section 3.1)."""

    def terms(module: Any, batch: Batch, deterministic: bool) -> Sums:
        features, _ = module(batch["tokens"], batch["positions"], batch["segments"], deterministic=deterministic)
        smoothing = 0.0 if deterministic else cfg.label_smoothing
        return {"nll": cross_entropy(features, *module.unembedding(), batch["targets"], batch["weights"], smoothing)}

    return Objective(examples.causal, lambda batch: {"nll": jnp.sum(batch["weights"])}, terms)


OBJECTIVES: dict[str, Callable[[ObjectiveConfig], Objective]] = {"causal": causal}


def make_objective(cfg: ObjectiveConfig) -> Objective:
    return OBJECTIVES[cfg.kind](cfg)
