"""Decoders with layer norm and their own ways: GPT-NeoX (Pythia), GPT-J, Phi, OPT, BLOOM, Falcon."""

import dataclasses

from bothways.convert.decoders import GPT2, LLAMA
from bothways.convert.family import Config, Family, Head, activation_of, one_dropout, published_activation, without
from bothways.convert.layout import Layout
from bothways.errors import InputError
from bothways.model.config import TransformerConfig

_SCORES = Head({"score": "task_head"}, bias=False)


def rotary_width(theirs: Config, old: str, default: float, width: int) -> int:
    """How many features of a head are turned: rope_parameters says their share, or an older key; 0: all."""
    said = (theirs.get("rope_parameters") or {}).get("partial_rotary_factor")
    share = next(s for s in (said, theirs.get(old), default) if s is not None)
    features = int(width * share)
    if features < 1:
        raise InputError(
            f"config.json: partial_rotary_factor {share} turns none of a head's {width} features; at least two"
        )
    return 0 if features == width else features


def rope_parameters(cfg: TransformerConfig) -> Config:
    cfg = cfg.resolved()
    if cfg.rotary_scaling.kind != "none" or "nope" in cfg.layer_pattern:
        raise InputError("rotary scaling, or layers without positions, which it has not")
    share = (cfg.rotary_width or cfg.d_head) / cfg.d_head
    return {"rope_theta": cfg.rotary_base, "rope_type": "default", "partial_rotary_factor": share}


def rotary_base(theirs: Config, old: str) -> float:
    given = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    if given.get("rope_type", given.get("type", "default")) != "default":
        raise InputError(f"config.json: this rotary scaling is not supported: {given}")
    return float(given.get("rope_theta") or theirs.get(old) or 10_000.0)


# ---- GPT-NeoX ---------------------------------------------------------------------------------------------------------


def _neox_read(theirs: Config) -> Config:
    return {
        "activation": activation_of(theirs.get("hidden_act", "gelu")),
        "parallel": "two_norms" if theirs.get("use_parallel_residual", True) else "",
        "rotary_base": rotary_base(theirs, "rotary_emb_base"),
        "rotary_width": rotary_width(theirs, "rotary_pct", 0.25, theirs["hidden_size"] // theirs["num_attention_heads"]),
    } | {name: theirs.get("hidden_dropout", 0.0) for name in ("dropout_embed", "dropout_residual")}


def _neox_write(cfg: TransformerConfig) -> Config:
    return {
        "hidden_act": published_activation(cfg.activation),
        "use_parallel_residual": cfg.parallel == "two_norms",
        "hidden_dropout": one_dropout(cfg),
        "rope_parameters": rope_parameters(cfg),
    }


GPT_NEOX = Family(
    name="gpt_neox",
    ours="gpt",
    layout=Layout(
        "decoder",
        {
            "gpt_neox.embed_in": "body/embed/token",
            "gpt_neox.layers.{}.input_layernorm": "block/attention_norm",
            "gpt_neox.layers.{}.attention.query_key_value": "block/attention/query block/attention/key block/attention/value",
            "gpt_neox.layers.{}.attention.dense": "block/attention/out",
            "gpt_neox.layers.{}.post_attention_layernorm": "block/mlp_norm",
            "gpt_neox.layers.{}.mlp.dense_h_to_4h": "block/mlp/up",
            "gpt_neox.layers.{}.mlp.dense_4h_to_h": "block/mlp/down",
            "gpt_neox.final_layer_norm": "body/final_norm",
            "embed_out": "lm_head",
        },
        by_head=True,
    ),
    constants={"position_embedding": "rotary", "norm": "layer", "norm_position": "pre", "bias": True},
    values={
        "vocab_size": ("vocab_size", None),
        "max_position_embeddings": ("context_length", 2048),
        "hidden_size": ("d_model", None),
        "num_hidden_layers": ("n_layers", None),
        "num_attention_heads": ("n_heads", None),
        "intermediate_size": ("d_ff", None),
        "layer_norm_eps": ("norm_eps", 1e-5),
        "attention_dropout": ("dropout_attention", 0.0),
        "initializer_range": ("init_std", 0.02),
        "tie_word_embeddings": ("tie_embeddings", False),
    },
    wanted={"attention_bias": True},
    heads={},
    read=_neox_read,
    write=_neox_write,
    architecture=lambda cfg: "GPTNeoXForCausalLM",
    prefix="gpt_neox.",
    copies={"embed_out.weight": "gpt_neox.embed_in.weight"},
    buffers=(".attention.bias", ".masked_bias", ".rotary_emb.inv_freq"),
    classes="GPTNeoX",
    tasks=GPT2.tasks,
)

# ---- GPT-J ------------------------------------------------------------------------------------------------------------


def _gptj_read(theirs: Config) -> Config:
    width = theirs["n_embd"] // theirs["n_head"]
    turned = theirs.get("rotary_dim", 64) or width
    return GPT2.read(theirs) | {"rotary_width": 0 if turned == width else turned}


GPTJ = dataclasses.replace(
    GPT2,
    name="gptj",
    layout=Layout(
        "decoder",
        {
            "transformer.wte": "body/embed/token",
            "transformer.h.{}.ln_1": "block/attention_norm",
            "transformer.h.{}.attn.q_proj": "block/attention/query",
            "transformer.h.{}.attn.k_proj": "block/attention/key",
            "transformer.h.{}.attn.v_proj": "block/attention/value",
            "transformer.h.{}.attn.out_proj": "block/attention/out",
            "transformer.h.{}.mlp.fc_in": "block/mlp/up",
            "transformer.h.{}.mlp.fc_out": "block/mlp/down",
            "transformer.ln_f": "body/final_norm",
            "lm_head": "lm_head",
        },
    ),
    constants={"position_embedding": "rotary", "norm": "layer", "norm_position": "pre", "bias": True}
    | {"attention_bias": False, "parallel": "one_norm", "output_bias": True, "tie_embeddings": False},
    values={k: v for k, v in GPT2.values.items() if k != "tie_word_embeddings"}
    | {"n_positions": ("context_length", 2048)},
    wanted={"tie_word_embeddings": False},
    read=_gptj_read,
    write=lambda cfg: GPT2.write(cfg) | {"rotary_dim": cfg.rotary_width or cfg.resolved().d_head},
    architecture=lambda cfg: "GPTJForCausalLM",
    copies={},
    buffers=(".attn.bias", ".attn.masked_bias", ".attn.embed_positions"),
    classes="GPTJ",
    tasks={"SequenceClassification": _SCORES, "QuestionAnswering": Head({"qa_outputs": "task_head"})},
    paired=True,
)

# ---- Phi --------------------------------------------------------------------------------------------------------------


def _phi_read(theirs: Config) -> Config:
    width = theirs["hidden_size"] // theirs["num_attention_heads"]
    return {
        "activation": activation_of(theirs.get("hidden_act", "gelu_new")),
        "rotary_base": rotary_base(theirs, "rope_theta"),
        "rotary_width": rotary_width(theirs, "partial_rotary_factor", 0.5, width),
    }


PHI = dataclasses.replace(
    LLAMA,
    name="phi",
    layout=Layout(
        "decoder",
        {
            "model.embed_tokens": "body/embed/token",
            "model.layers.{}.input_layernorm": "block/attention_norm",
            "model.layers.{}.self_attn.q_proj": "block/attention/query",
            "model.layers.{}.self_attn.k_proj": "block/attention/key",
            "model.layers.{}.self_attn.v_proj": "block/attention/value",
            "model.layers.{}.self_attn.dense": "block/attention/out",
            "model.layers.{}.mlp.fc1": "block/mlp/up",
            "model.layers.{}.mlp.fc2": "block/mlp/down",
            "model.final_layernorm": "body/final_norm",
            "lm_head": "lm_head",
        },
    ),
    constants={"position_embedding": "rotary", "norm": "layer", "norm_position": "pre", "bias": True}
    | {"parallel": "one_norm", "output_bias": True, "tie_embeddings": False},
    values={k: v for k, v in LLAMA.values.items() if k not in ("rms_norm_eps", "head_dim", "tie_word_embeddings")}
    | {"layer_norm_eps": ("norm_eps", 1e-5), "resid_pdrop": ("dropout_residual", 0.0)}
    | {"embd_pdrop": ("dropout_embed", 0.0)},
    wanted={"qk_layernorm": False, "tie_word_embeddings": False},
    read=_phi_read,
    write=lambda cfg: {"hidden_act": published_activation(cfg.activation), "rope_parameters": rope_parameters(cfg)},
    architecture=lambda cfg: "PhiForCausalLM",
    copies={},
    classes="Phi",
    tasks={name: head for name, head in LLAMA.tasks.items() if name != "QuestionAnswering"},
)

# ---- OPT --------------------------------------------------------------------------------------------------------------


def _opt_read(theirs: Config) -> Config:
    narrow = theirs.get("word_embed_proj_dim")
    if narrow not in (None, theirs["hidden_size"]):
        raise InputError(
            f"config.json: word_embed_proj_dim is {narrow}; embeddings narrower than the model are not supported"
        )
    return {"activation": activation_of(theirs.get("activation_function", "relu"))} | {
        name: theirs.get("dropout", 0.1) for name in ("dropout_embed", "dropout_residual")
    }


def _opt_write(cfg: TransformerConfig) -> Config:
    return {
        "activation_function": published_activation(cfg.activation),
        "dropout": one_dropout(cfg),
        "word_embed_proj_dim": cfg.d_model,
    }


OPT = dataclasses.replace(
    GPT2,
    name="opt",
    layout=Layout(
        "decoder",
        {
            "model.decoder.embed_tokens": "body/embed/token",
            "model.decoder.embed_positions": "body/embed/position",
            "model.decoder.layers.{}.self_attn_layer_norm": "block/attention_norm",
            "model.decoder.layers.{}.self_attn.q_proj": "block/attention/query",
            "model.decoder.layers.{}.self_attn.k_proj": "block/attention/key",
            "model.decoder.layers.{}.self_attn.v_proj": "block/attention/value",
            "model.decoder.layers.{}.self_attn.out_proj": "block/attention/out",
            "model.decoder.layers.{}.final_layer_norm": "block/mlp_norm",
            "model.decoder.layers.{}.fc1": "block/mlp/up",
            "model.decoder.layers.{}.fc2": "block/mlp/down",
            "model.decoder.final_layer_norm": "body/final_norm",
            "lm_head": "lm_head",
        },
        first_position=2,
    ),
    constants=GPT2.constants | {"norm_eps": 1e-5},
    values={
        "vocab_size": ("vocab_size", None),
        "max_position_embeddings": ("context_length", 2048),
        "hidden_size": ("d_model", None),
        "num_hidden_layers": ("n_layers", None),
        "num_attention_heads": ("n_heads", None),
        "ffn_dim": ("d_ff", None),
        "attention_dropout": ("dropout_attention", 0.0),
        "init_std": ("init_std", 0.02),
        "tie_word_embeddings": ("tie_embeddings", True),
    },
    wanted={"do_layer_norm_before": True, "enable_bias": True, "layer_norm_elementwise_affine": True}
    | {"_remove_final_layer_norm": False},
    read=_opt_read,
    write=_opt_write,
    architecture=lambda cfg: "OPTForCausalLM",
    prefix="model.decoder.",
    copies={"lm_head.weight": "model.decoder.embed_tokens.weight"},
    buffers=(),
    classes="OPT",
    tasks={"SequenceClassification": _SCORES, "QuestionAnswering": Head({"qa_outputs": "task_head"})},
)

# ---- BLOOM ------------------------------------------------------------------------------------------------------------


def _bloom_read(theirs: Config) -> Config:
    """Sizes have two names each: those of the first checkpoints, and those of transformers."""
    return {
        "d_model": theirs["hidden_size"] if "hidden_size" in theirs else theirs["n_embed"],
        "n_layers": theirs["n_layer"] if "n_layer" in theirs else theirs["num_hidden_layers"],
        "n_heads": theirs["n_head"] if "n_head" in theirs else theirs["num_attention_heads"],
        "context_length": theirs.get("seq_length") or 2048,
    } | dict.fromkeys(("dropout_embed", "dropout_residual"), theirs.get("hidden_dropout", 0.0))


BLOOM = dataclasses.replace(
    GPT_NEOX,
    name="bloom",
    layout=Layout(
        "decoder",
        {
            "transformer.word_embeddings": "body/embed/token",
            "transformer.word_embeddings_layernorm": "body/embed/norm",
            "transformer.h.{}.input_layernorm": "block/attention_norm",
            "transformer.h.{}.self_attention.query_key_value": (
                "block/attention/query block/attention/key block/attention/value"
            ),
            "transformer.h.{}.self_attention.dense": "block/attention/out",
            "transformer.h.{}.post_attention_layernorm": "block/mlp_norm",
            "transformer.h.{}.mlp.dense_h_to_4h": "block/mlp/up",
            "transformer.h.{}.mlp.dense_4h_to_h": "block/mlp/down",
            "transformer.ln_f": "body/final_norm",
            "lm_head": "lm_head",
        },
        by_head=True,
    ),
    constants={"position_embedding": "none", "score_bias": "alibi", "norm": "layer", "norm_position": "pre", "bias": True}
    | {"embed_norm": True, "activation": "gelu_tanh"},
    values={
        "vocab_size": ("vocab_size", None),
        "layer_norm_epsilon": ("norm_eps", 1e-5),
        "attention_dropout": ("dropout_attention", 0.0),
        "initializer_range": ("init_std", 0.02),
        "tie_word_embeddings": ("tie_embeddings", True),
    },
    wanted={"apply_residual_connection_post_layernorm": False},
    read=_bloom_read,
    write=lambda cfg: {
        "hidden_size": cfg.d_model,
        "n_layer": cfg.n_layers,
        "n_head": cfg.n_heads,
        "seq_length": cfg.context_length,
        "hidden_dropout": one_dropout(cfg),
    },
    architecture=lambda cfg: "BloomForCausalLM",
    prefix="transformer.",
    copies={"lm_head.weight": "transformer.word_embeddings.weight"},
    buffers=(),
    classes="Bloom",
)

# ---- Falcon -----------------------------------------------------------------------------------------------------------


def _falcon_read(theirs: Config) -> Config:
    """Three ways of building a layer: one norm for both sub-layers (7B), the new architecture with two (40B, 180B) or one (11B),
    or a sub-layer after the other."""
    new, heads = theirs.get("new_decoder_architecture", False), theirs["num_attention_heads"]
    norms = theirs.get("num_ln_in_parallel_attn") or (2 if new else 1)
    if not new and norms != 1:
        raise InputError(
            f"config.json: num_ln_in_parallel_attn is {norms} without new_decoder_architecture; only 1 is supported"
        )
    parallel = "two_norms" if norms == 2 else "one_norm"
    single = theirs.get("multi_query", True) and not new
    return {
        "activation": activation_of(theirs.get("activation", "gelu")),
        "parallel": parallel if new or theirs.get("parallel_attn", True) else "",
        "n_kv_heads": 1 if single else theirs.get("num_kv_heads") or heads,
        "rotary_base": rotary_base(theirs, "rope_theta"),
        **dict.fromkeys(("attention_bias", "mlp_bias"), theirs.get("bias", False)),
    }


def _falcon_write(cfg: TransformerConfig) -> Config:
    new = cfg.parallel == "two_norms" or cfg.n_kv_heads not in (1, cfg.n_heads)
    return {
        "activation": published_activation(cfg.activation),
        "new_decoder_architecture": new,
        "num_ln_in_parallel_attn": (2 if cfg.parallel == "two_norms" else 1) if new else None,
        "parallel_attn": bool(cfg.parallel),
        "multi_query": cfg.n_kv_heads == 1 and not new,
        "num_kv_heads": cfg.n_kv_heads,
        "bias": cfg.attention_bias and cfg.mlp_bias,
        "rope_parameters": {"rope_theta": cfg.rotary_base, "rope_type": "default"},
    }


_FALCON_NORMS = {"one_norm": (".ln_attn", ".ln_mlp", ".post_attention_layernorm"), "": (".ln_attn", ".ln_mlp")}
_FALCON_NORMS["two_norms"] = (".input_layernorm", ".post_attention_layernorm")
FALCON = dataclasses.replace(
    BLOOM,
    name="falcon",
    layout=dataclasses.replace(
        BLOOM.layout,
        table=without(BLOOM.layout.table, ".word_embeddings_layernorm")
        | {"transformer.h.{}.ln_attn": "block/attention_norm", "transformer.h.{}.ln_mlp": "block/mlp_norm"},
    ),
    unused=lambda cfg: _FALCON_NORMS[cfg.parallel],
    constants={
        "position_embedding": "rotary",
        "norm": "layer",
        "norm_position": "pre",
        "bias": True,
        "dropout_embed": 0.0,
    },
    values={
        "vocab_size": ("vocab_size", None),
        "max_position_embeddings": ("context_length", 2048),
        "hidden_size": ("d_model", None),
        "num_hidden_layers": ("n_layers", None),
        "num_attention_heads": ("n_heads", None),
        "ffn_hidden_size": ("d_ff", 0),
        "layer_norm_epsilon": ("norm_eps", 1e-5),
        "attention_dropout": ("dropout_attention", 0.0),
        "hidden_dropout": ("dropout_residual", 0.0),
        "initializer_range": ("init_std", 0.02),
        "tie_word_embeddings": ("tie_embeddings", True),
    },
    wanted={"alibi": False},
    read=_falcon_read,
    write=_falcon_write,
    architecture=lambda cfg: "FalconForCausalLM",
    classes="Falcon",
    tasks=GPT2.tasks | {"QuestionAnswering": Head({"qa_outputs": "task_head"})},
)

FAMILIES: tuple[Family, ...] = (GPT_NEOX, GPTJ, PHI, OPT, BLOOM, FALCON)
