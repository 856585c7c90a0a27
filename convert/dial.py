"""Decoders that were trained to fill masks, whole rows at once: LLaDA and Dream. They are runs of the dial, read both ways."""

import dataclasses

from bothways.convert.family import Config, Family
from bothways.convert.layout import Layout
from bothways.convert.llamas import QWEN2
from bothways.errors import InputError
from bothways.model.config import TransformerConfig


def _no_scaling(cfg: TransformerConfig) -> None:
    if cfg.rotary_scaling.kind != "none":
        raise InputError("rotary scaling, which it has not")


# LLaDA (arXiv 2502.09992) has the names of the OLMo code base.


def _llada_read(theirs: Config) -> Config:
    if theirs.get("embedding_size") not in (None, theirs["vocab_size"]):
        raise InputError(
            f"config.json: embedding_size is {theirs['embedding_size']} and vocab_size {theirs['vocab_size']}; tables with "
            "rows for no token are not supported"
        )
    return {
        "activation": "swiglu",
        "rotary_base": float(theirs.get("rope_theta") or 10_000.0),
        "n_kv_heads": theirs.get("n_kv_heads") or 0,
        "dropout_embed": theirs.get("embedding_dropout") or 0.0,
        "dropout_residual": theirs.get("residual_dropout") or 0.0,
    }


def _llada_write(cfg: TransformerConfig) -> Config:
    _no_scaling(cfg)
    return {
        "embedding_size": cfg.vocab_size,
        "rope_theta": cfg.rotary_base,
        "n_kv_heads": cfg.n_kv_heads,
        "embedding_dropout": cfg.dropout_embed,
        "residual_dropout": cfg.dropout_residual,
    }


LLADA = Family(
    name="llada",
    ours="gpt",
    layout=Layout(
        "decoder",
        {
            "model.transformer.wte": "body/embed/token",
            "model.transformer.blocks.{}.attn_norm": "block/attention_norm",
            "model.transformer.blocks.{}.q_proj": "block/attention/query",
            "model.transformer.blocks.{}.k_proj": "block/attention/key",
            "model.transformer.blocks.{}.v_proj": "block/attention/value",
            "model.transformer.blocks.{}.attn_out": "block/attention/out",
            "model.transformer.blocks.{}.ff_norm": "block/mlp_norm",
            "model.transformer.blocks.{}.ff_proj": "block/mlp/gate",
            "model.transformer.blocks.{}.up_proj": "block/mlp/up",
            "model.transformer.blocks.{}.ff_out": "block/mlp/down",
            "model.transformer.ln_f": "body/final_norm",
            "model.transformer.ff_out": "lm_head",
        },
    ),
    constants={"position_embedding": "rotary", "norm": "rms", "norm_position": "pre", "bias": False, "predicts": "own"},
    values={
        "vocab_size": ("vocab_size", None),
        "max_sequence_length": ("context_length", None),
        "d_model": ("d_model", None),
        "n_layers": ("n_layers", None),
        "n_heads": ("n_heads", None),
        "mlp_hidden_size": ("d_ff", None),
        "rms_norm_eps": ("norm_eps", 1e-5),
        "attention_dropout": ("dropout_attention", 0.0),
        "init_std": ("init_std", 0.02),
        "weight_tying": ("tie_embeddings", False),
    },
    wanted={"block_type": "llama", "layer_norm_type": "rms", "activation_type": "silu", "rope": True, "alibi": False}
    | {"include_bias": False, "include_qkv_bias": False, "attention_layer_norm": False, "input_emb_norm": False}
    | {"scale_logits": False, "block_group_size": 1},
    heads={},
    read=_llada_read,
    write=_llada_write,
    architecture=lambda cfg: "LLaDAModelLM",
    prefix="model.transformer.",
    copies={"model.transformer.ff_out.weight": "model.transformer.wte.weight"},
    classes="LLaDA",
    objective="diffusion",
)

# Dream (arXiv 2508.15487) began as Qwen 2.5: its outputs predict the next token still.
DREAM = dataclasses.replace(
    QWEN2,
    name="Dream",
    constants=QWEN2.constants | {"predicts": "next"},
    architecture=lambda cfg: "DreamModel",
    classes="Dream",
    tasks={},
    objective="diffusion",
)

FAMILIES: tuple[Family, ...] = (LLADA, DREAM)
