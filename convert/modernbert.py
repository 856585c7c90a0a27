"""ModernBERT, and the decoder of the same blocks (arXiv 2412.13663; arXiv 2507.11412)."""

import dataclasses

from bothways.convert import layer_types
from bothways.convert.family import Config, Family, Head
from bothways.convert.layout import Layout
from bothways.model.config import TransformerConfig

_TABLE = {
    "model.embeddings.tok_embeddings": "body/embed/token",
    "model.embeddings.norm": "body/embed/norm",
    "model.layers.{}.attn_norm": "block/attention_norm",
    "model.layers.{}.attn.Wo": "block/attention/out",
    "model.layers.{}.mlp_norm": "block/mlp_norm",
    "model.layers.{}.mlp.Wi": "block/mlp/gate block/mlp/up",
    "model.layers.{}.mlp.Wo": "block/mlp/down",
    "model.final_norm": "body/final_norm",
}
_CONSTANTS: Config = {"position_embedding": "rotary", "norm": "layer", "norm_position": "pre", "bias": False}
_CONSTANTS |= {"embed_norm": True, "first_norm": False, "activation": "geglu"}
_VALUES = {
    "vocab_size": ("vocab_size", None),
    "max_position_embeddings": ("context_length", 8192),
    "hidden_size": ("d_model", None),
    "num_hidden_layers": ("n_layers", None),
    "num_attention_heads": ("n_heads", None),
    "intermediate_size": ("d_ff", None),
    "norm_eps": ("norm_eps", 1e-5),
    "attention_dropout": ("dropout_attention", 0.0),
    "embedding_dropout": ("dropout_embed", 0.0),
    "initializer_range": ("init_std", 0.02),
}
_WANTED = dict.fromkeys(("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"), False)
_WANTED |= {"hidden_activation": "gelu", "classifier_activation": "gelu"}
_HEAD = Head(
    {"head.dense": "task_head/dense", "head.norm": "task_head/norm", "classifier": "task_head"},
    hidden="gelu",
    hidden_norm=True,
)


def _read(theirs: Config) -> Config:
    pattern = layer_types.pattern(theirs, theirs.get("global_attn_every_n_layers", 3), last=False)
    return {
        "layer_pattern": pattern,
        "window": theirs.get("local_attention", 128) // 2 + 1 if "local" in pattern else 0,
        "dropout_residual": theirs.get("mlp_dropout", 0.0),
    } | layer_types.rotary_bases(theirs, ("global_rope_theta", "local_rope_theta"), (160_000.0, 10_000.0))


def _write(cfg: TransformerConfig) -> Config:
    return {
        "layer_types": layer_types.types(cfg),
        "local_attention": 2 * max(cfg.window - 1, 0),
        "rope_parameters": layer_types.rope_parameters(cfg),
        "mlp_dropout": cfg.dropout_residual,
    }


# ---- the encoder ------------------------------------------------------------------------------------------------------

MODERNBERT = Family(
    name="modernbert",
    ours="bert",
    layout=Layout(
        "encoder",
        _TABLE
        | {
            "model.layers.{}.attn.Wqkv": "block/attention/query block/attention/key block/attention/value",
            "head.dense": "mlm/dense",
            "head.norm": "mlm/norm",
            "decoder": "mlm",
        },
    ),
    constants=_CONSTANTS | {"tie_embeddings": True, "next_sentence": False, "pooler": False},
    values=_VALUES,
    wanted=_WANTED | {"decoder_bias": True, "tie_word_embeddings": True},
    heads={"masked_head": "decoder."},
    read=_read,
    write=_write,
    architecture=lambda cfg: "ModernBertForMaskedLM" if cfg.masked_head else "ModernBertModel",
    prefix="model.",
    copies={"decoder.weight": "model.embeddings.tok_embeddings.weight"},
    classes="ModernBert",
    tasks=dict.fromkeys(
        ("SequenceClassification", "MultipleChoice"),
        dataclasses.replace(_HEAD, pool_key="classifier_pooling", pools={"token": "cls", "mean": "mean"}),
    )
    | dict.fromkeys(("TokenClassification", "QuestionAnswering"), _HEAD),
)

# ---- the decoder ------------------------------------------------------------------------------------------------------


def _decoder_read(theirs: Config) -> Config:
    """A query of a local layer sees half of `local_attention`, itself among it."""
    found = _read(theirs)
    return found | {"window": theirs.get("local_attention", 128) // 2 if "local" in found["layer_pattern"] else 0}


MODERNBERT_DECODER = dataclasses.replace(
    MODERNBERT,
    name="modernbert-decoder",
    ours="gpt",
    layout=Layout(
        "decoder",
        _TABLE
        | {
            "model.layers.{}.attn.q_proj": "block/attention/query",
            "model.layers.{}.attn.k_proj": "block/attention/key",
            "model.layers.{}.attn.v_proj": "block/attention/value",
            "lm_head.dense": "mlm/dense",
            "lm_head.norm": "mlm/norm",
            "decoder": "lm_head",
        },
    ),
    constants=_CONSTANTS | {"output_transform": True},
    values=_VALUES | {"decoder_bias": ("output_bias", True), "tie_word_embeddings": ("tie_embeddings", True)},
    wanted=_WANTED,
    heads={},
    read=_decoder_read,
    write=lambda cfg: _write(cfg) | {"local_attention": 2 * cfg.window},
    architecture=lambda cfg: "ModernBertDecoderForCausalLM",
    classes="ModernBertDecoder",
    tasks={"SequenceClassification": dataclasses.replace(_HEAD, bias=False)},
)
