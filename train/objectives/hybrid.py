"""Next tokens in some rows, masked next tokens in the others: the objective of GPT-BERT."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from bothways.config import ObjectiveConfig
from bothways.data import examples
from bothways.data.pipeline import ExampleFn, RowSource
from bothways.data.tokens import Rows, Tokens
from bothways.train.objectives.core import Batch, Objective, Setting, Sums, token_loss


def hybrid(cfg: ObjectiveConfig, setting: Setting) -> Objective:
    """Next tokens in some rows, masked next tokens in the others, one decoder for both (arXiv 2410.24159, section 2).

    Each row weighs the same in expectation: a masked row asks for `mask_rate` of its tokens, each with 1 / mask_rate.
    """
    masking = examples.Masking(cfg.mask_rate, cfg.mask_token_prob, cfg.random_token_prob, cfg.whole_words)

    def source(tokens: Tokens, length: int, padded: bool) -> tuple[RowSource, ExampleFn]:
        return Rows(tokens, length, setting.vocabulary.pad, setting.separate, padded), functools.partial(
            examples.hybrid, vocabulary=setting.vocabulary, masking=masking, causal_share=cfg.causal_share
        )

    def weights(batch: Batch) -> dict[str, jax.Array]:
        return {"hybrid": jnp.sum(batch["weights"])}

    def terms(module: Any, batch: Batch, deterministic: bool) -> Sums:
        inputs = (batch[k] for k in ("tokens", "positions", "segments", "prefix"))
        features, _ = module(*inputs, deterministic=deterministic)
        return {"hybrid": token_loss(module, features, batch, cfg, deterministic)}

    return Objective(source, weights, terms)
