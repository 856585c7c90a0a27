"""FLOPs: the model's from its shapes, and those of a program from its trace."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from bothways.data.pairs import span_lengths
from bothways.model.config import TransformerConfig
from bothways.recipes import Recipe
from bothways.registry import predicts


def layer_multiplies(cfg: TransformerConfig) -> int:
    """Multiplications per token in one block's matrix products, attention scores aside."""
    cfg = cfg.resolved()
    attention = cfg.d_model * (cfg.d_head + cfg.d_value) * (cfg.n_heads + cfg.n_kv_heads)
    mlp = cfg.d_model * cfg.d_ff * (3 if cfg.gated else 2)
    return attention + mlp


def adapter_multiplies(cfg: TransformerConfig) -> int:
    """Multiplications per token in the adapters of one block."""
    cfg = cfg.resolved()
    heads, groups = cfg.n_heads, cfg.n_kv_heads
    widths = {"query": heads * cfg.d_head, "key": groups * cfg.d_head, "value": groups * cfg.d_value}
    widths |= {"out": heads * cfg.d_value, "up": cfg.d_ff, "down": cfg.d_ff} | ({"gate": cfg.d_ff} if cfg.gated else {})
    return cfg.lora.rank * sum(cfg.d_model + width for name, width in widths.items() if name in cfg.lora.targets)


def per_multiplication(cfg: TransformerConfig) -> int:
    """FLOPs of training per multiplication with a weight: 2 forward, 2 for the input's gradient, and 2 for the weight's
    where it is trained (arXiv 2204.02311, appendix B)."""
    return 4 if cfg.lora.rank else 6


def blocks_flops_per_token(cfg: TransformerConfig) -> int:
    """Of training, in the matrix products of all blocks, attention scores aside."""
    each = per_multiplication(cfg) * layer_multiplies(cfg) + 6 * adapter_multiplies(cfg)
    return cfg.n_layers * each


def training_flops_per_token(
    cfg: TransformerConfig, *, causal: bool, predicted_share: float = 1.0, masked_head: bool = False
) -> float:
    """FLOPs of forward and backward per token (`per_multiplication`).

    Attention counts the pairs that the mask lets through: half of them under a causal mask, and those within
    the window in local layers.

    Args:
      predicted_share: share of tokens that go through the vocabulary projection.
      masked_head: they go through a bert's head, which has a transform of its own.
    """
    cfg = cfg.resolved()
    pairs = 0.0
    for layer in range(cfg.n_layers):
        window = cfg.layer_window(layer) or cfg.context_length
        reach = min(window, cfg.context_length)
        seen = reach - reach * reach / (2 * cfg.context_length) if causal else min(2 * reach, cfg.context_length)
        pairs += cfg.n_heads * (cfg.d_head + cfg.d_value) * seen
    transform = cfg.masked_transform if masked_head else cfg.output_transform
    head = predicted_share * cfg.narrow * (cfg.vocab_size + (cfg.d_model if transform else 0))
    widen = cfg.embed_width * cfg.d_model
    return blocks_flops_per_token(cfg) + 6 * pairs + per_multiplication(cfg) * (head + widen)


def seq2seq_flops_per_row(cfg: TransformerConfig, target: int) -> float:
    """The same for an encoder-decoder, per row: `context` tokens of source and `target` of target.

    The decoder has cross-attention besides: queries and outputs of the target's tokens, keys and values of the
    source's, and every token of the target looks at all of the source.
    """
    cfg = cfg.resolved()
    width, source = cfg.d_head + cfg.d_value, cfg.context_length
    cross = cfg.d_model * width * (target * cfg.n_heads + source * cfg.n_kv_heads)
    scores = target * source * cfg.n_heads * width
    encoder = source * training_flops_per_token(cfg, causal=False, predicted_share=0.0)
    decoder = target * training_flops_per_token(dataclasses.replace(cfg, context_length=target), causal=True)
    return encoder + decoder + cfg.n_layers * (per_multiplication(cfg) * cross + 6 * scores)


def target_length(recipe: Recipe) -> int:
    """Tokens of target in a row of an encoder-decoder; those of hidden spans are fewer than the source's."""
    objective, context = recipe.objective, recipe.model.context_length
    return span_lengths(context, objective.mask_rate, objective.span_length)[1] if objective.kind == "spans" else context


def tokens_per_row(recipe: Recipe) -> int:
    """Tokens that a row of the batch holds; an encoder-decoder's has a source and a target."""
    if recipe.objective.kind == "contrastive":
        return len(recipe.data.text_fields) * (recipe.objective.text_length or recipe.model.context_length)
    return recipe.model.context_length + (target_length(recipe) if recipe.family == "seq2seq" else 0)


def recipe_flops_per_token(recipe: Recipe) -> float:
    """training_flops_per_token of a recipe, at its full context; of an encoder-decoder, source and target together."""
    if recipe.family == "seq2seq":
        return seq2seq_flops_per_row(recipe.model, target_length(recipe)) / tokens_per_row(recipe)
    if recipe.objective.kind == "contrastive":
        read = dataclasses.replace(
            recipe.model, context_length=recipe.objective.text_length or recipe.model.context_length
        )
        return training_flops_per_token(read, causal=recipe.family == "gpt", predicted_share=0.0)
    causal, masked_head = recipe.objective.kind in ("causal", "chat"), recipe.family == "bert"
    sizes = set(recipe.objective.block_sizes) if recipe.objective.kind == "diffusion" else set()
    causal |= sizes == {1} and predicts(recipe.family, recipe.model) == "next"  # one stream of clean tokens
    if sizes and sizes != {0} and not causal:
        # Hidden and clean tokens; each of the two sees half of the row, and its own block, which is not counted.
        return blocks_flops_per_token(recipe.model) + training_flops_per_token(recipe.model, causal=False)
    share = recipe.objective.mask_rate if recipe.objective.kind == "masked" else 1.0
    return training_flops_per_token(recipe.model, causal=causal, predicted_share=share, masked_head=masked_head)


def executed_flops(jaxpr: Any) -> np.ndarray:
    """FLOPs of all matrix products in a traced program, over all devices, loops counted as often as they turn.

    More than the model's: what is recomputed counts again, and so do scores that a mask hides. A loop of unknown
    length counts once; of the branches of a conditional, the dearest counts.

    Returns:
      [2]: all of them, and those inside Pallas kernels.
    """
    total = np.zeros(2)
    for eqn in jaxpr.eqns:
        inner = [] if eqn.primitive.name == "pallas_call" else [executed_flops(j) for j in inner_programs(eqn)]
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
                total += kernel_flops(eqn)
            case _:
                total += sum(inner)
    return total


def kernel_flops(call: Any) -> float:
    """FLOPs of one call of a Pallas kernel: by its own cost estimate, or its products as often as its grid turns."""
    if estimate := call.params.get("cost_estimate"):
        return float(estimate.flops)
    turns = math.prod(n for n in call.params["grid_mapping"].grid if isinstance(n, int))
    return turns * float(sum(executed_flops(j)[0] for j in inner_programs(call)))


def inner_programs(eqn: Any) -> list[Any]:
    """The traced programs that one equation runs."""
    leaves = jax.tree.leaves(eqn.params, is_leaf=_is_jaxpr)
    return [getattr(j, "jaxpr", j) for j in leaves if _is_jaxpr(j)]


def _is_jaxpr(x: Any) -> bool:
    return hasattr(getattr(x, "jaxpr", x), "eqns")
