"""Masked diffusion in blocks, the dial from GPT to BERT: blocks of 1 are next-token prediction, a block as long as the row
masked diffusion over all of it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from bothways.config import ObjectiveConfig
from bothways.data.conversation_rows import conversation_rows
from bothways.data.diffusion import diffused
from bothways.data.pipeline import ExampleFn, RowSource
from bothways.data.tokens import Rows, Tokens
from bothways.train.objectives.core import Batch, Objective, Setting, Sums, token_loss


def diffusion(cfg: ObjectiveConfig, setting: Setting) -> Objective:
    """A bound on the negative log-likelihood of every token given the blocks before its own (arXiv 2503.09573, equation
    8), per token that is predicted.

    Hidden and clean tokens go through in one pass, so that a block sees clean blocks before it. Where every block is the
    row, or one token that a model of next tokens predicts, one of the two streams says it all, and is read alone.
    """
    sizes, predicts = set(cfg.block_sizes), setting.predicts
    only_hidden, only_clean = sizes == {0}, sizes == {1} and predicts == "next"

    def source(tokens: Tokens, length: int, padded: bool) -> tuple[RowSource, ExampleFn]:
        rows: RowSource | None = conversation_rows(tokens, length, setting.vocabulary)
        rows = rows or Rows(tokens, length - 1, setting.vocabulary.pad, setting.separate, padded)
        flat = cfg.weighting == "flat" and not padded  # held out, it is the bound
        ask = {"vocabulary": setting.vocabulary, "block_sizes": cfg.block_sizes, "predicts": predicts, "flat": flat}
        return rows, functools.partial(diffused, **ask)

    def weights(batch: Batch) -> dict[str, jax.Array]:
        return {"bound": jnp.sum(batch["scored"])}

    def terms(module: Any, batch: Batch, deterministic: bool) -> Sums:
        one = sizes - {0}
        block = one.pop() if len(sizes) == 1 and one else batch["block"]
        segments = (
            batch["segments"] if setting.separate or only_hidden or deterministic else None
        )  # held out, rows have padding
        hidden = None if only_clean else batch["tokens"]
        clean = None if only_hidden else batch["targets"]
        features = module.denoise(hidden, clean, batch["positions"], segments, block, deterministic)
        return {"bound": token_loss(module, features, batch, cfg, deterministic)}

    return Objective(source, weights, terms, likelihood="bound")
