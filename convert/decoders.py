"""Decoders as they are published: GPT-1, GPT-2, and the Llama family: Llama, Mistral, Qwen 3, Phi-3."""

import dataclasses

from bothways.convert.family import SWIGLU, Config, Family, Head, activation_of, published_activation
from bothways.convert.layout import Layout
from bothways.errors import InputError
from bothways.model.config import RotaryScaling, TransformerConfig

# ---- GPT-2 ------------------------------------------------------------------------------------------------------------

GPT2 = Family(
    name="gpt2",
    ours="gpt",
    layout=Layout(
        "decoder",
        {
            "transformer.wte": "body/embed/token",
            "transformer.wpe": "body/embed/position",
            "transformer.h.{}.ln_1": "block/attention_norm",
            "transformer.h.{}.attn.c_attn": "block/attention/query block/attention/key block/attention/value",
            "transformer.h.{}.attn.c_proj": "block/attention/out",
            "transformer.h.{}.ln_2": "block/mlp_norm",
            "transformer.h.{}.mlp.c_fc": "block/mlp/up",
            "transformer.h.{}.mlp.c_proj": "block/mlp/down",
            "transformer.ln_f": "body/final_norm",
            "lm_head": "lm_head",
        },
        transposed=False,
    ),
    constants={"position_embedding": "learned", "norm": "layer", "norm_position": "pre", "bias": True},
    values={
        "vocab_size": ("vocab_size", None),
        "n_positions": ("context_length", 1024),
        "n_embd": ("d_model", None),
        "n_layer": ("n_layers", None),
        "n_head": ("n_heads", None),
        "n_inner": ("d_ff", 0),
        "layer_norm_epsilon": ("norm_eps", 1e-5),
        "embd_pdrop": ("dropout_embed", 0.1),
        "attn_pdrop": ("dropout_attention", 0.1),
        "resid_pdrop": ("dropout_residual", 0.1),
        "initializer_range": ("init_std", 0.02),
        "tie_word_embeddings": ("tie_embeddings", True),
    },
    wanted={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    heads={},
    read=lambda theirs: {"activation": activation_of(theirs.get("activation_function", "gelu_new"))},
    write=lambda cfg: {"activation_function": published_activation(cfg.activation)},
    architecture=lambda cfg: "GPT2LMHeadModel",
    prefix="transformer.",
    copies={"lm_head.weight": "transformer.wte.weight"},
    buffers=(".attn.bias", ".attn.masked_bias"),
    classes="GPT2",
    tasks={
        "SequenceClassification": Head({"score": "task_head"}, bias=False),
        "TokenClassification": Head({"classifier": "task_head"}),
        "QuestionAnswering": Head({"qa_outputs": "task_head"}),
    },
)

# ---- GPT-1 ------------------------------------------------------------------------------------------------------------

GELUS = {"gelu": "gelu_tanh", "relu": "relu"}
"""Its "gelu" is the approximation by tanh."""
OPENAI_GPT = dataclasses.replace(
    GPT2,
    name="openai-gpt",
    layout=Layout(
        "decoder",
        {
            "transformer.tokens_embed": "body/embed/token",
            "transformer.positions_embed": "body/embed/position",
            **{stem: ours for stem, ours in GPT2.layout.table.items() if stem.startswith("transformer.h.")},
            "lm_head": "lm_head",
        },
        transposed=False,
    ),
    constants=GPT2.constants | {"norm_position": "post"},
    values={k: v for k, v in GPT2.values.items() if k not in ("n_inner", "n_positions")}
    | {"n_positions": ("context_length", 512)},
    wanted={},
    read=lambda theirs: {"activation": activation_of(theirs.get("afn", "gelu"), GELUS)},
    write=lambda cfg: {"afn": published_activation(cfg.activation, GELUS)},
    architecture=lambda cfg: "OpenAIGPTLMHeadModel",
    copies={"lm_head.weight": "transformer.tokens_embed.weight"},
    buffers=(".attn.bias", ".position_ids"),
    classes="OpenAIGPT",
    tasks={"SequenceClassification": GPT2.tasks["SequenceClassification"]},
)

# ---- Llama ------------------------------------------------------------------------------------------------------------


def _scaling_read(theirs: Config) -> RotaryScaling:
    """rope_scaling, or rope_parameters as it is called since transformers 5."""
    given = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}
    kind = given.get("rope_type", given.get("type", "default"))
    known = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor"}
    known |= {"partial_rotary_factor", "high_freq_factor", "beta_slow", "beta_fast", "attention_factor", "truncate"}
    if (
        kind not in ("default", "linear", "dynamic", "llama3", "yarn")
        or set(given) - known
        or not given.get("truncate", True)
        or given.get("partial_rotary_factor", 1.0) != 1.0
    ):
        raise InputError(
            f"config.json: this rotary scaling is not supported: {given}; there are linear, dynamic, llama3, yarn"
        )
    if kind in ("default", "dynamic"):  # dynamic differs from none only beyond max_position_embeddings, our context
        return RotaryScaling()
    if kind == "linear":
        return RotaryScaling("linear", float(given["factor"]))
    original = given.get("original_max_position_embeddings") or theirs["max_position_embeddings"]
    low, high = ("low_freq_factor", "high_freq_factor") if kind == "llama3" else ("beta_slow", "beta_fast")
    return RotaryScaling(
        kind,
        float(given["factor"]),
        int(original),
        float(given.get(low) or 1.0),
        float(given.get(high) or 32.0),
        float(given.get("attention_factor") or 0.0),
    )


def _scaling_write(scaling: RotaryScaling) -> Config | None:
    if scaling.kind == "none":
        return None
    found: Config = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        low, high = ("low_freq_factor", "high_freq_factor") if scaling.kind == "llama3" else ("beta_slow", "beta_fast")
        found |= {"original_max_position_embeddings": scaling.original_context, low: scaling.low, high: scaling.high}
    return found | ({"attention_factor": scaling.attention_factor} if scaling.attention_factor else {})


def _llama_read(theirs: Config) -> Config:
    old = (theirs.get("rope_parameters") or {}).get("rope_theta")
    return {
        "activation": activation_of(theirs.get("hidden_act", "silu"), SWIGLU),
        "rotary_base": float(old or theirs.get("rope_theta") or 10_000.0),
        "rotary_scaling": _scaling_read(theirs),
    }


LLAMA = Family(
    name="llama",
    ours="gpt",
    layout=Layout(
        "decoder",
        {
            "model.embed_tokens": "body/embed/token",
            "model.layers.{}.input_layernorm": "block/attention_norm",
            "model.layers.{}.self_attn.q_proj": "block/attention/query",
            "model.layers.{}.self_attn.k_proj": "block/attention/key",
            "model.layers.{}.self_attn.v_proj": "block/attention/value",
            "model.layers.{}.self_attn.o_proj": "block/attention/out",
            "model.layers.{}.post_attention_layernorm": "block/mlp_norm",
            "model.layers.{}.mlp.gate_proj": "block/mlp/gate",
            "model.layers.{}.mlp.up_proj": "block/mlp/up",
            "model.layers.{}.mlp.down_proj": "block/mlp/down",
            "model.norm": "body/final_norm",
            "lm_head": "lm_head",
        },
    ),
    constants={"position_embedding": "rotary", "norm": "rms", "norm_position": "pre", "bias": False, "dropout_embed": 0.0}
    | {"dropout_residual": 0.0},
    values={
        "vocab_size": ("vocab_size", None),
        "max_position_embeddings": ("context_length", 2048),
        "hidden_size": ("d_model", None),
        "num_hidden_layers": ("n_layers", None),
        "num_attention_heads": ("n_heads", None),
        "num_key_value_heads": ("n_kv_heads", 0),
        "head_dim": ("d_head", 0),
        "intermediate_size": ("d_ff", None),
        "rms_norm_eps": ("norm_eps", 1e-6),
        "attention_dropout": ("dropout_attention", 0.0),
        "initializer_range": ("init_std", 0.02),
        "tie_word_embeddings": ("tie_embeddings", False),
    },
    wanted={"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
    heads={},
    read=_llama_read,
    write=lambda cfg: {
        "hidden_act": published_activation(cfg.activation, SWIGLU),
        "rope_theta": cfg.rotary_base,
        "rope_scaling": _scaling_write(cfg.rotary_scaling),
    },
    architecture=lambda cfg: "LlamaForCausalLM",
    prefix="model.",
    copies={"lm_head.weight": "model.embed_tokens.weight"},
    buffers=(".rotary_emb.inv_freq",),
    classes="Llama",
    tasks={
        "SequenceClassification": Head({"score": "task_head"}, bias=False),
        "TokenClassification": Head({"score": "task_head"}),
        "QuestionAnswering": Head({"qa_outputs": "task_head"}, prefix="transformer."),
    },
)

# ---- Mistral, Qwen 3, Phi-3 -------------------------------------------------------------------------------------------


def _windowed_read(theirs: Config, default: int | None) -> Config:
    """Mistral's window: in every layer, or in none."""
    window = theirs.get("sliding_window", default) or 0
    return _llama_read(theirs) | {"window": window, "layer_pattern": ("local",) if window else ("global",)}


def _windowed_write(cfg: TransformerConfig) -> Config:
    return LLAMA.write(cfg) | {"sliding_window": cfg.window or None}


MISTRAL = dataclasses.replace(
    LLAMA,
    name="mistral",
    values=LLAMA.values
    | {"num_key_value_heads": ("n_kv_heads", 8), "max_position_embeddings": ("context_length", 131_072)},
    wanted={},
    read=lambda theirs: _windowed_read(theirs, 4096),
    write=_windowed_write,
    architecture=lambda cfg: "MistralForCausalLM",
    classes="Mistral",
    tasks=LLAMA.tasks | {"QuestionAnswering": Head({"qa_outputs": "task_head"})},
)

QWEN3 = dataclasses.replace(
    LLAMA,
    name="qwen3",
    layout=Layout(
        "decoder",
        LLAMA.layout.table
        | {
            "model.layers.{}.self_attn.q_norm": "block/attention/query_norm",
            "model.layers.{}.self_attn.k_norm": "block/attention/key_norm",
        },
    ),
    constants=LLAMA.constants | {"qk_norm": True},
    values=LLAMA.values
    | {"head_dim": ("d_head", 128), "num_key_value_heads": ("n_kv_heads", 32)}
    | {"max_position_embeddings": ("context_length", 32_768)},
    wanted={"attention_bias": False, "use_sliding_window": False},
    architecture=lambda cfg: "Qwen3ForCausalLM",
    classes="Qwen3",
)

PHI3 = dataclasses.replace(
    LLAMA,
    name="phi3",
    layout=Layout(
        "decoder",
        {
            stem: ours
            for stem, ours in LLAMA.layout.table.items()
            if not stem.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))
        }
        | {
            "model.layers.{}.self_attn.qkv_proj": "block/attention/query block/attention/key block/attention/value",
            "model.layers.{}.mlp.gate_up_proj": "block/mlp/gate block/mlp/up",
        },
    ),
    constants={k: v for k, v in LLAMA.constants.items() if not k.startswith("dropout")},
    values=LLAMA.values
    | {"rms_norm_eps": ("norm_eps", 1e-5), "max_position_embeddings": ("context_length", 4096)}
    | {"resid_pdrop": ("dropout_residual", 0.0), "embd_pdrop": ("dropout_embed", 0.0)},
    wanted={"partial_rotary_factor": 1.0},
    read=lambda theirs: _windowed_read(theirs, None),
    write=lambda cfg: _windowed_write(cfg) | {"original_max_position_embeddings": cfg.context_length},
    architecture=lambda cfg: "Phi3ForCausalLM",
    classes="Phi3",
    tasks={name: head for name, head in LLAMA.tasks.items() if name != "QuestionAnswering"},
)
