"""FLOPs: the model's from its shapes, and those of a program from its trace."""

import math
from typing import Any

import jax
import numpy as np

from common.recipe import Recipe
from model.config import TransformerConfig


def layer_multiplies(cfg: TransformerConfig) -> int:
    """Multiplications per token in one block's matrix products, attention scores aside."""
    cfg = cfg.resolved()
    attention = cfg.d_model * (cfg.d_head + cfg.d_value) * (cfg.n_heads + cfg.n_kv_heads)
    mlp = cfg.d_model * cfg.d_ff * (3 if cfg.gated else 2)
    return attention + mlp


def training_flops_per_token(cfg: TransformerConfig, *, causal: bool, predicted_share: float = 1.0) -> float:
    """FLOPs of forward and backward per token: 6 per multiplication (arXiv 2204.02311, appendix B).

    Attention counts the pairs that the mask lets through: half of them under a causal mask, and those within
    the window in local layers.

    Args:
      predicted_share: share of tokens that go through the vocabulary projection.
    """
    cfg = cfg.resolved()
    pairs = 0.0
    for layer in range(cfg.n_layers):
        window = cfg.layer_window(layer) or cfg.context
        reach = min(window, cfg.context)
        seen = reach - reach * reach / (2 * cfg.context) if causal else min(2 * reach, cfg.context)
        pairs += cfg.n_heads * (cfg.d_head + cfg.d_value) * seen
    head = predicted_share * cfg.vocab_size * cfg.d_model
    return 6 * (cfg.n_layers * layer_multiplies(cfg) + pairs + head)


def seq2seq_flops_per_token(cfg: TransformerConfig) -> float:
    """The same for an encoder-decoder, per token of source and target together, where rows have as many of each.

    The decoder has cross-attention besides: its projections, and every target token looks at all of the source.
    """
    cfg = cfg.resolved()
    attention = cfg.d_model * (cfg.d_head + cfg.d_value) * (cfg.n_heads + cfg.n_kv_heads)
    cross = attention + cfg.n_heads * (cfg.d_head + cfg.d_value) * cfg.context
    encoder = training_flops_per_token(cfg, causal=False, predicted_share=0.0)
    return (encoder + training_flops_per_token(cfg, causal=True) + 6 * cfg.n_layers * cross) / 2


def tokens_per_row(recipe: Recipe) -> int:
    """Tokens that a row of the batch holds; an encoder-decoder's has a source and a target."""
    return recipe.model.context * (2 if recipe.family == "seq2seq" else 1)


def recipe_flops_per_token(recipe: Recipe) -> float:
    """training_flops_per_token of a recipe, at its full context; of an encoder-decoder, seq2seq_flops_per_token."""
    if recipe.family == "seq2seq":
        return seq2seq_flops_per_token(recipe.model)
    causal = recipe.objective.kind == "causal"
    share = recipe.objective.mask_rate if recipe.objective.kind == "masked" else 1.0
    return training_flops_per_token(recipe.model, causal=causal, predicted_share=share)


def executed_flops(jaxpr: Any) -> np.ndarray:
    """FLOPs of all matrix products in a traced program, over all devices, loops counted as often as they turn.

    More than the model's: what is recomputed counts again, and so do scores that a mask hides. A loop of unknown
    length counts once; of the branches of a conditional, the dearest counts.

    Returns:
      [2]: all of them, and those inside Pallas kernels.
    """
    total = np.zeros(2)
    for eqn in jaxpr.eqns:
        leaves = jax.tree.leaves(eqn.params, is_leaf=_is_jaxpr)
        inner = [executed_flops(getattr(j, "jaxpr", j)) for j in leaves if _is_jaxpr(j)]
        match eqn.primitive.name:
            case "dot_general":
                (contracted, _), _ = eqn.params["dimension_numbers"]
                width = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
                total[0] += 2.0 * width * math.prod(eqn.outvars[0].aval.shape)
            case "scan":
                total += eqn.params["length"] * sum(inner)
            case "cond":
                total += max(inner, key=lambda pair: pair[0])
            case "shard_map":
                total += eqn.params["mesh"].size * sum(inner)
            case "pallas_call":
                estimate = eqn.params.get("cost_estimate")
                turns = math.prod(n for n in eqn.params["grid_mapping"].grid if isinstance(n, int))
                total += estimate.flops if estimate else turns * sum(inner)[0]
            case _:
                total += sum(inner)
    return total


def _is_jaxpr(x: Any) -> bool:
    return hasattr(getattr(x, "jaxpr", x), "eqns")
