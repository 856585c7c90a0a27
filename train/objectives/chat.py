"""Next-token prediction of the answers in conversations: instruction tuning."""

from typing import Any

import jax
import jax.numpy as jnp

from bothways.config import ObjectiveConfig
from bothways.data.conversation_rows import PackedConversations, answered
from bothways.data.pipeline import ExampleFn, RowSource
from bothways.data.tokens import Tokens
from bothways.train.objectives.core import Batch, Objective, Setting, Sums, token_loss


def chat(cfg: ObjectiveConfig, setting: Setting) -> Objective:
    """Next-token prediction of every answer and of the token that ends it, given all before it (arXiv 2203.02155, section
    3.5); the rest of a conversation is context, and no conversation sees another."""

    def source(tokens: Tokens, length: int, padded: bool) -> tuple[RowSource, ExampleFn]:
        return PackedConversations(tokens, length + 1, setting.vocabulary), answered

    def weights(batch: Batch) -> dict[str, jax.Array]:
        return {"nll": jnp.sum(batch["weights"])}

    def terms(module: Any, batch: Batch, deterministic: bool) -> Sums:
        features, _ = module(batch["tokens"], batch["positions"], batch["segments"], deterministic=deterministic)
        return {"nll": token_loss(module, features, batch, cfg, deterministic)}

    return Objective(source, weights, terms, likelihood="nll")
