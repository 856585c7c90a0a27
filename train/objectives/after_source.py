"""A target after its source, the objective of encoder-decoders: translation, and restoring hidden spans."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from bothways.config import ObjectiveConfig
from bothways.data import examples, pairs
from bothways.data.pipeline import ExampleFn, RowSource
from bothways.data.tokens import Tokens
from bothways.model.loss import cross_entropy
from bothways.train.objectives.core import Batch, Objective, Setting, Sums


def after_source(cfg: ObjectiveConfig, setting: Setting) -> Objective:
    """Next-token prediction of a target behind its source (arXiv 1706.03762); the source is a text's other language,
    or the text with spans hidden (arXiv 1910.10683, section 3.1.4)."""

    def source(tokens: Tokens, length: int, padded: bool) -> tuple[RowSource, ExampleFn]:
        if cfg.kind == "pairs":
            return pairs.PackedPairs(tokens, length, setting.vocabulary), examples.as_is
        rows = pairs.Spans(tokens, length, setting.vocabulary, cfg.mask_rate, cfg.span_length, padded)
        return rows, functools.partial(pairs.corrupted, source=rows)

    def weights(batch: Batch) -> dict[str, jax.Array]:
        return {"nll": jnp.sum(batch["weights"])}

    def terms(module: Any, batch: Batch, deterministic: bool) -> Sums:
        names = ("tokens", "source", "positions", "segments", "source_positions", "source_segments")
        features = module(*(batch[name] for name in names), deterministic)
        smoothing = 0.0 if deterministic else cfg.label_smoothing
        args = (module.transform(features), *module.unembedding(), batch["targets"], batch["weights"])
        return {"nll": cross_entropy(*args, smoothing)}

    return Objective(source, weights, terms)
