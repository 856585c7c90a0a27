"""A target after its source, the objective of encoder-decoders: translation, and restoring hidden spans."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bothways.config import ObjectiveConfig
from bothways.data import examples
from bothways.data.pairs import PackedPairs, Spans, corrupted
from bothways.data.pipeline import ExampleFn, RowSource
from bothways.data.tokens import Tokens
from bothways.train.objectives.core import Batch, Objective, Setting, Sums, token_loss


def after_source(cfg: ObjectiveConfig, source: Callable[[Tokens, int, bool], tuple[RowSource, ExampleFn]]) -> Objective:
    """Next-token prediction of a target behind its source (arXiv 1706.03762)."""

    def weights(batch: Batch) -> dict[str, jax.Array]:
        return {"nll": jnp.sum(batch["weights"])}

    def terms(module: Any, batch: Batch, deterministic: bool) -> Sums:
        names = ("tokens", "source", "positions", "segments", "source_positions", "source_segments")
        features = module(*(batch[name] for name in names), deterministic)
        return {"nll": token_loss(module, features, batch, cfg, deterministic)}

    return Objective(source, weights, terms, likelihood="nll")


def pairs(cfg: ObjectiveConfig, setting: Setting) -> Objective:
    """The source is the text in another language, or whatever else the corpus pairs with it."""

    def source(tokens: Tokens, length: int, padded: bool) -> tuple[RowSource, ExampleFn]:
        return PackedPairs(tokens, length, setting.vocabulary), examples.as_is

    return after_source(cfg, source)


def spans(cfg: ObjectiveConfig, setting: Setting) -> Objective:
    """The source is the text with spans hidden, the target what they hide (arXiv 1910.10683, section 3.1.4)."""

    def source(tokens: Tokens, length: int, padded: bool) -> tuple[RowSource, ExampleFn]:
        rows = Spans(tokens, length, setting.vocabulary, cfg.mask_rate, cfg.span_length, padded)
        return rows, functools.partial(corrupted, source=rows)

    return after_source(cfg, source)
