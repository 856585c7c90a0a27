"""Decoders with the blocks of a Llama, layer norm for RMS norm, and rotary positions on part of each head: StableLM, Nemotron."""

import dataclasses

from bothways.convert.decoders import LLAMA
from bothways.convert.family import ACTIVATIONS, SWIGLU, Config, Family, activation_of, published_activation, without
from bothways.convert.layout import Layout
from bothways.convert.parallel import rope_parameters, rotary_base, rotary_width
from bothways.model.config import TransformerConfig

_ON_FEATURES = without(LLAMA.tasks, "QuestionAnswering")

# ---- StableLM ---------------------------------------------------------------------------------------------------------


def _stablelm_read(theirs: Config) -> Config:
    width = theirs["hidden_size"] // theirs["num_attention_heads"]
    return {
        "activation": activation_of(theirs.get("hidden_act", "silu"), SWIGLU),
        "parallel": "one_norm" if theirs.get("use_parallel_residual", False) else "",
        "rotary_base": rotary_base(theirs, "rope_theta"),
        "rotary_width": rotary_width(theirs, "partial_rotary_factor", 0.25, width),
    }


def _stablelm_write(cfg: TransformerConfig) -> Config:
    return {
        "hidden_act": published_activation(cfg.activation, SWIGLU),
        "use_parallel_residual": cfg.parallel == "one_norm",
        "rope_parameters": rope_parameters(cfg),
    }


STABLELM = dataclasses.replace(
    LLAMA,
    name="stablelm",
    constants={"position_embedding": "rotary", "norm": "layer", "norm_position": "pre", "bias": True}
    | {"attention_bias": False, "mlp_bias": False, "dropout_embed": 0.0},
    values=without(LLAMA.values, "rms_norm_eps", "head_dim")
    | {"layer_norm_eps": ("norm_eps", 1e-5), "num_key_value_heads": ("n_kv_heads", 32)}
    | {"max_position_embeddings": ("context_length", 4096), "use_qkv_bias": ("qkv_bias", False)}
    | {"hidden_dropout": ("dropout_residual", 0.0)},  # theirs is behind the MLP only
    wanted={"qk_layernorm": False},
    read=_stablelm_read,
    write=_stablelm_write,
    architecture=lambda cfg: "StableLmForCausalLM",
    classes="StableLm",
    tasks=_ON_FEATURES,
)

# ---- Nemotron ---------------------------------------------------------------------------------------------------------

_ACTIVATIONS = {"relu2": "relu2"} | ACTIVATIONS


def _nemotron_read(theirs: Config) -> Config:
    width = theirs.get("head_dim") or theirs["hidden_size"] // theirs["num_attention_heads"]
    return {
        "activation": activation_of(theirs.get("hidden_act", "relu2"), _ACTIVATIONS),
        "rotary_base": rotary_base(theirs, "rope_theta"),
        "rotary_width": rotary_width(theirs, "partial_rotary_factor", 0.5, width),
    }


NEMOTRON = dataclasses.replace(
    LLAMA,
    name="nemotron",
    layout=Layout("decoder", without(LLAMA.layout.table, "gate_proj"), norms_from_zero=True),
    constants={"position_embedding": "rotary", "norm": "layer", "norm_position": "pre", "bias": True}
    | {"dropout_embed": 0.0, "dropout_residual": 0.0},
    values=without(LLAMA.values, "rms_norm_eps")
    | {"norm_eps": ("norm_eps", 1e-5), "max_position_embeddings": ("context_length", 4096)}
    | {"initializer_range": ("init_std", 0.0134), "attention_bias": ("attention_bias", False)}
    | {"mlp_bias": ("mlp_bias", False)},
    wanted={},
    read=_nemotron_read,
    write=lambda cfg: {
        "hidden_act": published_activation(cfg.activation, _ACTIVATIONS),
        "rope_parameters": rope_parameters(cfg),
    },
    architecture=lambda cfg: "NemotronForCausalLM",
    classes="Nemotron",
)

FAMILIES: tuple[Family, ...] = (STABLELM, NEMOTRON)
