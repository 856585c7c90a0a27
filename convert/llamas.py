"""Decoders that differ from Llama in a few fields: Qwen 2, OLMo 2, SmolLM 3, Ernie 4.5, Gemma 1 to 3, StarCoder 2."""

import dataclasses

from bothways.convert import layer_types
from bothways.convert.decoders import LLAMA
from bothways.convert.family import (
    SWIGLU,
    Config,
    Family,
    Head,
    activation_of,
    published_activation,
    shortest_pattern,
    without,
)
from bothways.convert.layout import Layout
from bothways.convert.parallel import rotary_base
from bothways.model.config import TransformerConfig

_TABLE = LLAMA.layout.table
_ON_MODEL = LLAMA.tasks | {"QuestionAnswering": Head({"qa_outputs": "task_head"})}


# ---- Qwen 2, OLMo 2, SmolLM 3 -----------------------------------------------------------------------------------------

QWEN2 = dataclasses.replace(
    LLAMA,
    name="qwen2",
    constants=LLAMA.constants | {"qkv_bias": True},
    values=LLAMA.values
    | {"num_key_value_heads": ("n_kv_heads", 32), "max_position_embeddings": ("context_length", 32_768)},
    wanted={"use_sliding_window": False},
    architecture=lambda cfg: "Qwen2ForCausalLM",
    classes="Qwen2",
)

OLMO2 = dataclasses.replace(
    LLAMA,
    name="olmo2",
    layout=Layout(
        "decoder",
        without(_TABLE, "layernorm")
        | {
            "model.layers.{}.self_attn.q_norm": "block/attention/query_norm",
            "model.layers.{}.self_attn.k_norm": "block/attention/key_norm",
            "model.layers.{}.post_attention_layernorm": "block/attention_out_norm",
            "model.layers.{}.post_feedforward_layernorm": "block/mlp_out_norm",
        },
    ),
    constants=LLAMA.constants | {"norm_position": "out", "qk_norm": True, "qk_norm_over": "all"},
    values=without(LLAMA.values, "head_dim") | {"rms_norm_eps": ("norm_eps", 1e-5)},
    wanted={"attention_bias": False},
    architecture=lambda cfg: "Olmo2ForCausalLM",
    classes="Olmo2",
    tasks={"SequenceClassification": LLAMA.tasks["SequenceClassification"]},
)


def _smollm3_read(theirs: Config) -> Config:
    n, every = theirs["num_hidden_layers"], theirs.get("no_rope_layer_interval", 4)
    turned = theirs.get("no_rope_layers") or [(layer + 1) % every != 0 for layer in range(n)]
    return LLAMA.read(theirs) | {"layer_pattern": shortest_pattern(["global" if t else "nope" for t in turned[:n]])}


def _smollm3_write(cfg: TransformerConfig) -> Config:
    kinds = [cfg.layer_pattern[i % len(cfg.layer_pattern)] for i in range(cfg.n_layers)]
    return LLAMA.write(cfg) | {"no_rope_layers": [int(kind != "nope") for kind in kinds]}


SMOLLM3 = dataclasses.replace(
    LLAMA,
    name="smollm3",
    values=LLAMA.values
    | {"num_key_value_heads": ("n_kv_heads", 4), "max_position_embeddings": ("context_length", 32_768)}
    | {"tie_word_embeddings": ("tie_embeddings", True)},
    wanted={"attention_bias": False, "mlp_bias": False, "use_sliding_window": False},
    read=_smollm3_read,
    write=_smollm3_write,
    architecture=lambda cfg: "SmolLM3ForCausalLM",
    classes="SmolLM3",
    tasks=_ON_MODEL,
)

# ---- Ernie 4.5 --------------------------------------------------------------------------------------------------------


def _ernie_read(theirs: Config) -> Config:
    return {
        "activation": activation_of(theirs.get("hidden_act", "silu"), SWIGLU),
        "rotary_base": rotary_base({"rope_theta": 500_000.0} | theirs, "rope_theta"),
    }


ERNIE = dataclasses.replace(
    LLAMA,
    name="ernie4_5",
    constants=without(LLAMA.constants, "bias") | {"dropout_attention": 0.0},
    values=without(LLAMA.values, "attention_dropout")
    | {"use_bias": ("bias", False), "rms_norm_eps": ("norm_eps", 1e-5), "tie_word_embeddings": ("tie_embeddings", True)}
    | {"head_dim": ("d_head", 128), "num_key_value_heads": ("n_kv_heads", 2)}
    | {"max_position_embeddings": ("context_length", 131_072)},
    wanted={},
    read=_ernie_read,
    write=lambda cfg: {
        "hidden_act": published_activation(cfg.activation, SWIGLU),
        "rope_theta": cfg.rotary_base,
    },
    architecture=lambda cfg: "Ernie4_5ForCausalLM",
    classes="Ernie4_5",
    paired=True,
    tasks={},
)

# ---- Gemma ------------------------------------------------------------------------------------------------------------

_GELU = {"gelu_pytorch_tanh": "geglu_tanh", "gelu_new": "geglu_tanh"}


def _gemma_read(theirs: Config) -> Config:
    """Gemma 1 says "gelu" and means the approximation by tanh, unless `hidden_activation` says another."""
    activation = theirs.get("hidden_activation") or theirs.get("hidden_act", "gelu_pytorch_tanh")
    activation = "gelu_pytorch_tanh" if activation == "gelu" else activation
    found = LLAMA.read(theirs | {"hidden_act": "silu"})
    return found | {"activation": activation_of(activation, _GELU)}


GEMMA = dataclasses.replace(
    LLAMA,
    name="gemma",
    layout=dataclasses.replace(LLAMA.layout, norms_from_zero=True),
    constants=LLAMA.constants | {"embed_scale": True},
    values=LLAMA.values
    | {"head_dim": ("d_head", 256), "num_key_value_heads": ("n_kv_heads", 16)}
    | {"max_position_embeddings": ("context_length", 8192), "tie_word_embeddings": ("tie_embeddings", True)},
    wanted={"attention_bias": False, "use_bidirectional_attention": None},
    read=_gemma_read,
    write=lambda cfg: LLAMA.write(cfg) | {"hidden_act": published_activation(cfg.activation, _GELU)},
    architecture=lambda cfg: "GemmaForCausalLM",
    classes="Gemma",
    tasks={name: head for name, head in LLAMA.tasks.items() if name != "QuestionAnswering"},
)


def _cap(theirs: Config, key: str, missing: float = 0.0) -> float:
    """A soft cap. null says that there is none; a config.json without the key means `missing`."""
    return float(theirs.get(key, missing) or 0.0)


def _gemma2_read(theirs: Config) -> Config:
    pattern = layer_types.pattern(theirs, 2, last=True)
    return _gemma_read(theirs) | {
        "layer_pattern": pattern,
        "window": theirs.get("sliding_window", 4096) if "local" in pattern else 0,
        "score_cap": _cap(theirs, "attn_logit_softcapping", 50.0),
        "logit_cap": _cap(theirs, "final_logit_softcapping", 30.0),
    }


def _gemma2_write(cfg: TransformerConfig) -> Config:
    theirs = GEMMA.write(cfg)
    return theirs | {
        "hidden_activation": theirs["hidden_act"],
        "layer_types": layer_types.types(cfg),
        "sliding_window": cfg.window or 4096,
        "attn_logit_softcapping": cfg.score_cap or None,
        "final_logit_softcapping": cfg.logit_cap or None,
    }


def _gemma3_read(theirs: Config) -> Config:
    pattern = layer_types.pattern(theirs, theirs.get("sliding_window_pattern") or 6, last=True)
    return {
        "activation": activation_of(theirs.get("hidden_activation", "gelu_pytorch_tanh"), _GELU),
        "layer_pattern": pattern,
        "window": theirs.get("sliding_window", 4096) if "local" in pattern else 0,
        "logit_cap": _cap(theirs, "final_logit_softcapping"),
    } | layer_types.rotary_bases(theirs, ("rope_theta", "rope_local_base_freq"), (1_000_000.0, 10_000.0))


def _gemma3_write(cfg: TransformerConfig) -> Config:
    return {
        "hidden_activation": published_activation(cfg.activation, _GELU),
        "layer_types": layer_types.types(cfg),
        "sliding_window": cfg.window or 4096,
        "rope_parameters": layer_types.rope_parameters(cfg),
        "final_logit_softcapping": cfg.logit_cap or None,
    }


GEMMA2 = dataclasses.replace(
    GEMMA,
    name="gemma2",
    layout=Layout(
        "decoder",
        without(_TABLE, "post_attention_layernorm")
        | {
            "model.layers.{}.post_attention_layernorm": "block/attention_out_norm",
            "model.layers.{}.pre_feedforward_layernorm": "block/mlp_norm",
            "model.layers.{}.post_feedforward_layernorm": "block/mlp_out_norm",
        },
        norms_from_zero=True,
    ),
    constants=GEMMA.constants | {"norm_position": "both"},
    values=GEMMA.values | {"query_pre_attn_scalar": ("query_scale", 256), "num_key_value_heads": ("n_kv_heads", 4)},
    read=_gemma2_read,
    write=_gemma2_write,
    architecture=lambda cfg: "Gemma2ForCausalLM",
    classes="Gemma2",
)

GEMMA3 = dataclasses.replace(
    GEMMA2,
    name="gemma3_text",
    layout=dataclasses.replace(
        GEMMA2.layout,
        table=GEMMA2.layout.table
        | {
            "model.layers.{}.self_attn.q_norm": "block/attention/query_norm",
            "model.layers.{}.self_attn.k_norm": "block/attention/key_norm",
        },
    ),
    constants=GEMMA2.constants | {"qk_norm": True},
    values=GEMMA2.values | {"max_position_embeddings": ("context_length", 131_072)},
    wanted={"attention_bias": False, "use_bidirectional_attention": False}
    | {"attn_logit_softcapping": None},  # which `transformers` reads and does not follow
    read=_gemma3_read,
    write=_gemma3_write,
    architecture=lambda cfg: "Gemma3ForCausalLM",
    classes="Gemma3Text",
    tasks={"SequenceClassification": LLAMA.tasks["SequenceClassification"]},
)

# ---- StarCoder 2 ------------------------------------------------------------------------------------------------------


def _starcoder2_read(theirs: Config) -> Config:
    window, activation = theirs.get("sliding_window") or 0, theirs.get("hidden_act", "gelu_pytorch_tanh")
    return LLAMA.read(theirs | {"hidden_act": "silu"}) | {
        "activation": activation_of(activation),
        "window": window,
        "layer_pattern": ("local",) if window else ("global",),
    }


STARCODER2 = dataclasses.replace(
    LLAMA,
    name="starcoder2",
    layout=Layout(
        "decoder",
        without(_TABLE, "gate_proj", "up_proj", "down_proj")
        | {"model.layers.{}.mlp.c_fc": "block/mlp/up", "model.layers.{}.mlp.c_proj": "block/mlp/down"},
    ),
    constants={"position_embedding": "rotary", "norm": "layer", "norm_position": "pre", "bias": True},
    values=without(LLAMA.values, "rms_norm_eps", "head_dim")
    | {"norm_epsilon": ("norm_eps", 1e-5), "num_key_value_heads": ("n_kv_heads", 2)}
    | {"max_position_embeddings": ("context_length", 4096), "initializer_range": ("init_std", 0.018042)}
    | {"residual_dropout": ("dropout_residual", 0.0), "embedding_dropout": ("dropout_embed", 0.0)}
    | {"tie_word_embeddings": ("tie_embeddings", True)},
    wanted={"use_bias": True},
    read=_starcoder2_read,
    write=lambda cfg: (
        LLAMA.write(cfg) | {"hidden_act": published_activation(cfg.activation), "sliding_window": cfg.window or None}
    ),
    architecture=lambda cfg: "Starcoder2ForCausalLM",
    classes="Starcoder2",
    tasks={name: head for name, head in LLAMA.tasks.items() if name != "QuestionAnswering"},
)

FAMILIES: tuple[Family, ...] = (QWEN2, OLMO2, SMOLLM3, ERNIE, GEMMA, GEMMA2, GEMMA3, STARCODER2)
