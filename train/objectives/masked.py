"""Masked language modelling and next-sentence prediction, the objectives of BERT."""

from typing import Any

import jax
import jax.numpy as jnp

from bothways.config import ObjectiveConfig
from bothways.data import examples
from bothways.data.pipeline import ExampleFn, RowSource
from bothways.data.tokens import Tokens
from bothways.train.objectives.core import Batch, Objective, Setting, Sums, class_loss, token_loss


def masked(cfg: ObjectiveConfig, setting: Setting) -> Objective:
    """Masked language modelling, and next-sentence prediction where the recipe asks for it (arXiv 1810.04805, 3.1)."""
    masking = examples.Masking(cfg.mask_rate, cfg.mask_token_prob, cfg.random_token_prob, cfg.whole_words)

    def source(tokens: Tokens, length: int, padded: bool) -> tuple[RowSource, ExampleFn]:
        pairs = {"pairs": cfg.next_sentence, "separate": setting.separate, "padded": padded}
        return examples.masked_source(tokens, length, setting.vocabulary, masking, **pairs)

    def weights(batch: Batch) -> dict[str, jax.Array]:
        mlm = {"mlm": jnp.sum(batch["weights"])}
        return mlm | ({"nsp": jnp.sum(batch["pair_weight"])} if cfg.next_sentence else {})

    def terms(module: Any, batch: Batch, deterministic: bool) -> Sums:
        features = module(batch["tokens"], batch["positions"], batch["segments"], batch.get("types"), deterministic)
        hidden = jnp.take_along_axis(
            features, batch["mask_positions"][..., None], axis=1
        )  # only these meet the vocabulary
        sums = {"mlm": token_loss(module, hidden, batch, cfg, deterministic)}
        if cfg.next_sentence:
            sums["nsp"] = class_loss(module.next_sentence(features), batch["random_next"], batch["pair_weight"])
        return sums

    return Objective(source, weights, terms)
