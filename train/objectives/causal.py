"""Next-token prediction, the objective of GPT."""

from typing import Any

import jax
import jax.numpy as jnp

from bothways.config import ObjectiveConfig
from bothways.data import examples
from bothways.data.pipeline import ExampleFn, RowSource
from bothways.data.tokens import Rows, Tokens
from bothways.train.objectives.core import Batch, Objective, Setting, Sums, token_loss


def causal(cfg: ObjectiveConfig, setting: Setting) -> Objective:
    """Next-token prediction: the objective of GPT (GPT-1, section 3.1)."""

    def source(tokens: Tokens, length: int, padded: bool) -> tuple[RowSource, ExampleFn]:
        return Rows(tokens, length, setting.vocabulary.pad, setting.separate, padded), examples.causal

    def weights(batch: Batch) -> dict[str, jax.Array]:
        return {"nll": jnp.sum(batch["weights"])}

    def terms(module: Any, batch: Batch, deterministic: bool) -> Sums:
        # Where documents are not kept apart only padding has a segment of its own, and only held-out rows have padding: in
        # training a kernel that knows nothing but causality can be taken.
        segments = batch["segments"] if setting.separate or deterministic else None
        features, _ = module(batch["tokens"], batch["positions"], segments, deterministic=deterministic)
        return {"nll": token_loss(module, features, batch, cfg, deterministic)}

    return Objective(source, weights, terms, likelihood="nll")
