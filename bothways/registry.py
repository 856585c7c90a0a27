"""Families by name, and what each wants as input."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bothways.model.bert import BERT
from bothways.model.config import TransformerConfig
from bothways.model.gpt import GPT
from bothways.model.seq2seq import Seq2Seq

FAMILIES: dict[str, type[nn.Module]] = {"gpt": GPT, "bert": BERT, "seq2seq": Seq2Seq}


def make_module(family: str, cfg: TransformerConfig) -> nn.Module:
    """The Flax module of a family."""
    return FAMILIES[family](cfg.resolved())


def predicts(family: str, cfg: TransformerConfig) -> str:
    """Which token an output of this family's predicts: next or own."""
    return cfg.predicts or ("own" if family == "bert" else "next")


def tiny_inputs(family: str) -> dict:
    """Inputs just large enough to initialise parameters from."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return {"tokens": tokens} | ({"source": tokens} if family == "seq2seq" else {})


@functools.lru_cache(maxsize=64)
def traced_shapes(module: nn.Module, family: str, tuned: bool) -> Any:
    """Shapes of a module's parameters, traced once: that takes longer than to read a small run. Not to be changed.

    Args:
      tuned: it has a task's head.
    """
    inputs = tiny_inputs(family)
    if tuned:
        inputs |= {"segments": inputs["tokens"] + 1, "types": inputs["tokens"]}
    return jax.eval_shape(lambda: module.init(jax.random.key(0), **inputs)["params"])
