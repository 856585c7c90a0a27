"""How llama.cpp names families: a table per architecture, read in both directions (convert/gguf_file.py)."""

import dataclasses
from collections.abc import Callable

from bothways.convert.family import Config


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How llama.cpp names a family.

    Args:
      family: `model_type` of the checkpoint that a file is read as.
      stems: theirs -> the checkpoint's, in front of `.weight` and `.bias`; those of layers have {}.
      config: key behind the architecture's name -> the checkpoint's key.
      said: key -> value that every file of the family has.
      means: what a file does not say, by the checkpoint's keys, from what it says.
      paired: rotary pairs are features 2k and 2k + 1, not k and k + K/2.
      norms_from_one: norms multiply by their weight, and by 1 + weight in the checkpoint.
      transposed: ends of names of matrices that the checkpoint keeps as [in, out].
      unread: ends of the checkpoint's names that llama.cpp has no place for.
    """

    family: str
    stems: dict[str, str]
    config: dict[str, str]
    said: Config = dataclasses.field(default_factory=dict)
    means: Callable[[Config], Config] = lambda config: {}
    paired: bool = False
    norms_from_one: bool = False
    transposed: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()


_BASE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "model.layers.{}.input_layernorm",
    "attn_q": "model.layers.{}.self_attn.q_proj",
    "attn_k": "model.layers.{}.self_attn.k_proj",
    "attn_v": "model.layers.{}.self_attn.v_proj",
    "attn_output": "model.layers.{}.self_attn.o_proj",
    "ffn_norm": "model.layers.{}.post_attention_layernorm",
    "ffn_gate": "model.layers.{}.mlp.gate_proj",
    "ffn_up": "model.layers.{}.mlp.up_proj",
    "ffn_down": "model.layers.{}.mlp.down_proj",
}
_QK = {"attn_q_norm": "model.layers.{}.self_attn.q_norm", "attn_k_norm": "model.layers.{}.self_attn.k_norm"}
_BOTH_NORMS = {
    "post_attention_norm": "model.layers.{}.post_attention_layernorm",
    "ffn_norm": "model.layers.{}.pre_feedforward_layernorm",
    "post_ffw_norm": "model.layers.{}.post_feedforward_layernorm",
}
_CONFIG = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "feed_forward_length": "intermediate_size",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}


def _gemma2_scale(config: Config) -> int | None:
    """llama.cpp knows the 27B by its 46 layers, and divides its scores by another width than that of a head."""
    if config.get("num_hidden_layers") == 46:
        return config.get("hidden_size", 0) // config.get("num_attention_heads", 1)
    return config.get("head_dim")


_PHI3 = {k: v for k, v in _BASE.items() if k not in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")}
ARCHITECTURES = {
    "llama": Architecture("llama", _BASE, _CONFIG, paired=True),
    "qwen2": Architecture("qwen2", _BASE, _CONFIG),
    "qwen3": Architecture("qwen3", _BASE | _QK, _CONFIG),
    "phi3": Architecture(
        "phi3",
        _PHI3 | {"attn_qkv": "model.layers.{}.self_attn.qkv_proj", "ffn_up": "model.layers.{}.mlp.gate_up_proj"},
        _CONFIG
        | {"attention.sliding_window": "sliding_window"}
        | {"rope.scaling.original_context_length": "original_max_position_embeddings"},
    ),
    "bert": Architecture(
        "bert",
        {
            "token_embd": "bert.embeddings.word_embeddings",
            "position_embd": "bert.embeddings.position_embeddings",
            "token_types": "bert.embeddings.token_type_embeddings",
            "token_embd_norm": "bert.embeddings.LayerNorm",
            "attn_q": "bert.encoder.layer.{}.attention.self.query",
            "attn_k": "bert.encoder.layer.{}.attention.self.key",
            "attn_v": "bert.encoder.layer.{}.attention.self.value",
            "attn_output": "bert.encoder.layer.{}.attention.output.dense",
            "attn_output_norm": "bert.encoder.layer.{}.attention.output.LayerNorm",
            "ffn_up": "bert.encoder.layer.{}.intermediate.dense",
            "ffn_down": "bert.encoder.layer.{}.output.dense",
            "layer_output_norm": "bert.encoder.layer.{}.output.LayerNorm",
        },
        {key: _CONFIG[key] for key in ("context_length", "embedding_length", "block_count", "attention.head_count")}
        | {"feed_forward_length": "intermediate_size", "attention.layer_norm_epsilon": "layer_norm_eps"}
        | {"tokenizer.ggml.token_type_count": "type_vocab_size"},
        said={"attention.causal": False},
        unread=("bert.pooler.dense.weight", "bert.pooler.dense.bias"),
    ),
    "gpt2": Architecture(
        "gpt2",
        {
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
            "attn_norm": "transformer.h.{}.ln_1",
            "attn_qkv": "transformer.h.{}.attn.c_attn",
            "attn_output": "transformer.h.{}.attn.c_proj",
            "ffn_norm": "transformer.h.{}.ln_2",
            "ffn_up": "transformer.h.{}.mlp.c_fc",
            "ffn_down": "transformer.h.{}.mlp.c_proj",
        },
        {"context_length": "n_positions", "embedding_length": "n_embd", "block_count": "n_layer"}
        | {"attention.head_count": "n_head", "feed_forward_length": "n_inner"}
        | {"attention.layer_norm_epsilon": "layer_norm_epsilon"},
        transposed=("c_attn", "c_proj", "c_fc"),
    ),
    "gemma": Architecture("gemma", _BASE, _CONFIG, norms_from_one=True),
    "gemma2": Architecture(
        "gemma2",
        {name: stem for name, stem in (_BASE | _BOTH_NORMS).items() if name != "output"},
        _CONFIG
        | {"attention.sliding_window": "sliding_window", "attn_logit_softcapping": "attn_logit_softcapping"}
        | {"final_logit_softcapping": "final_logit_softcapping"},
        means=lambda config: {"query_pre_attn_scalar": _gemma2_scale(config)},
        norms_from_one=True,
    ),
    "gemma3": Architecture(
        "gemma3_text",
        _BASE | _QK | _BOTH_NORMS,
        _CONFIG | {"attention.sliding_window": "sliding_window"},
        means=lambda config: {"sliding_window_pattern": 6, "query_pre_attn_scalar": config.get("head_dim")},
        norms_from_one=True,
    ),
    "olmo2": Architecture(
        "olmo2",
        {name: stem for name, stem in _BASE.items() if name not in ("attn_norm", "ffn_norm")}
        | _QK
        | {
            "post_attention_norm": "model.layers.{}.post_attention_layernorm",
            "post_ffw_norm": "model.layers.{}.post_feedforward_layernorm",
        },
        _CONFIG,
    ),
    "smollm3": Architecture("smollm3", _BASE, _CONFIG, means=lambda config: {"no_rope_layer_interval": 4}, paired=True),
    "ernie4_5": Architecture("ernie4_5", _BASE, _CONFIG),  # pairs are 2k and 2k + 1 in the checkpoint too
    "starcoder2": Architecture(
        "starcoder2",
        {name: stem for name, stem in _BASE.items() if not name.startswith("ffn_")}
        | {
            "ffn_norm": "model.layers.{}.post_attention_layernorm",
            "ffn_up": "model.layers.{}.mlp.c_fc",
            "ffn_down": "model.layers.{}.mlp.c_proj",
        },
        {
            key: name
            for key, name in _CONFIG.items()
            if not key.endswith(("rms_epsilon", "_length")) or key[:4] in ("cont", "embe")
        }
        | {"feed_forward_length": "intermediate_size", "attention.layer_norm_epsilon": "norm_epsilon"},
    ),
}
