"""Encoders as they are published: BERT, DistilBERT, RoBERTa and its kin, ModernBERT."""

import dataclasses

from bothways.convert import layer_types
from bothways.convert.family import (
    Config,
    Family,
    Head,
    activation_of,
    one_dropout,
    published_activation,
)
from bothways.convert.layout import Layout
from bothways.errors import InputError
from bothways.model.config import TransformerConfig

# ---- BERT, RoBERTa ----------------------------------------------------------------------------------------------------


def _bert_table(prefix: str) -> dict[str, str]:
    layer = f"{prefix}.encoder.layer.{{}}"
    return {
        f"{prefix}.embeddings.word_embeddings": "body/embed/token",
        f"{prefix}.embeddings.position_embeddings": "body/embed/position",
        f"{prefix}.embeddings.token_type_embeddings": "body/embed/segment",
        f"{prefix}.embeddings.LayerNorm": "body/embed/norm",
        f"{layer}.attention.self.query": "block/attention/query",
        f"{layer}.attention.self.key": "block/attention/key",
        f"{layer}.attention.self.value": "block/attention/value",
        f"{layer}.attention.output.dense": "block/attention/out",
        f"{layer}.attention.output.LayerNorm": "block/attention_norm",
        f"{layer}.intermediate.dense": "block/mlp/up",
        f"{layer}.output.dense": "block/mlp/down",
        f"{layer}.output.LayerNorm": "block/mlp_norm",
        f"{prefix}.pooler.dense": "nsp/pooler",
    }


ON_TOKENS = {
    "TokenClassification": Head({"classifier": "task_head"}),
    "QuestionAnswering": Head({"qa_outputs": "task_head"}),
}
ON_POOLER = Head({"classifier": "task_head"}, pooler=True)

BERT = Family(
    name="bert",
    ours="bert",
    layout=Layout(
        "encoder",
        _bert_table("bert")
        | {
            "cls.predictions.transform.dense": "mlm/dense",
            "cls.predictions.transform.LayerNorm": "mlm/norm",
            "cls.predictions": "mlm",
            "cls.predictions.decoder": "lm_head",
            "cls.seq_relationship": "nsp/classes",
        },
    ),
    constants={
        "position_embedding": "learned",
        "norm": "layer",
        "norm_position": "post",
        "bias": True,
        "embed_norm": True,
    },
    values={
        "vocab_size": ("vocab_size", None),
        "max_position_embeddings": ("context_length", 512),
        "hidden_size": ("d_model", None),
        "num_hidden_layers": ("n_layers", None),
        "num_attention_heads": ("n_heads", None),
        "intermediate_size": ("d_ff", None),
        "type_vocab_size": ("segment_types", 2),
        "layer_norm_eps": ("norm_eps", 1e-12),
        "attention_probs_dropout_prob": ("dropout_attention", 0.1),
        "initializer_range": ("init_std", 0.02),
        "tie_word_embeddings": ("tie_embeddings", True),
    },
    wanted={"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False},
    heads={"masked_head": "cls.predictions.", "next_sentence": "cls.seq_relationship.", "pooler": "bert.pooler."},
    read=lambda theirs: {
        "activation": activation_of(theirs.get("hidden_act", "gelu")),
        "dropout_embed": theirs.get("hidden_dropout_prob", 0.1),
        "dropout_residual": theirs.get("hidden_dropout_prob", 0.1),
    },
    write=lambda cfg: {"hidden_act": published_activation(cfg.activation), "hidden_dropout_prob": one_dropout(cfg)},
    architecture=lambda cfg: (
        "BertForPreTraining" if cfg.next_sentence else "BertForMaskedLM" if cfg.masked_head else "BertModel"
    ),
    prefix="bert.",
    copies={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    buffers=(".position_ids", ".token_type_ids"),
    classes="Bert",
    tasks=ON_TOKENS | {"SequenceClassification": ON_POOLER, "MultipleChoice": ON_POOLER},
)


def _roberta_read(theirs: Config) -> Config:
    if theirs.get("pad_token_id", 1) != 1:
        raise InputError(
            f"config.json: a roberta counts positions from pad_token_id + 1; only 1 is supported, not {theirs['pad_token_id']}"
        )
    return BERT.read(theirs) | {"context_length": theirs.get("max_position_embeddings", 514) - 2}


ROBERTA = dataclasses.replace(
    BERT,
    name="roberta",
    layout=Layout(
        "encoder",
        _bert_table("roberta")
        | {
            "lm_head.dense": "mlm/dense",
            "lm_head.layer_norm": "mlm/norm",
            "lm_head": "mlm",
            "lm_head.decoder": "lm_head",
        },
        first_position=2,
    ),
    constants=BERT.constants | {"segment_types": 1},
    values={k: v for k, v in BERT.values.items() if k not in ("max_position_embeddings", "type_vocab_size")},
    wanted=BERT.wanted | {"type_vocab_size": 1, "hidden_act": "gelu"},
    heads={"masked_head": "lm_head.", "pooler": "roberta.pooler."},
    read=_roberta_read,
    write=lambda cfg: BERT.write(cfg) | {"max_position_embeddings": cfg.context_length + 2, "pad_token_id": 1},
    architecture=lambda cfg: "RobertaForMaskedLM" if cfg.masked_head else "RobertaModel",
    prefix="roberta.",
    copies={
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
    pad=1,
    classes="Roberta",
    tasks=ON_TOKENS
    | {
        "SequenceClassification": Head(
            {"classifier.dense": "task_head/dense", "classifier.out_proj": "task_head"}, hidden="tanh"
        ),
        "MultipleChoice": ON_POOLER,
    },
)

XLM_ROBERTA = dataclasses.replace(
    ROBERTA,
    name="xlm-roberta",
    architecture=lambda cfg: "XLMRobertaForMaskedLM" if cfg.masked_head else "XLMRobertaModel",
    classes="XLMRoberta",
)
CAMEMBERT = dataclasses.replace(
    ROBERTA,
    name="camembert",
    architecture=lambda cfg: "CamembertForMaskedLM" if cfg.masked_head else "CamembertModel",
    classes="Camembert",
)

# ---- ELECTRA ----------------------------------------------------------------------------------------------------------


_GUESSES = ("dense", "dense_prediction")
"""The discriminator's head, which says of each token whether it was replaced: a body comes in without it."""


def _electra_read(theirs: Config) -> Config:
    narrow, width = theirs.get("embedding_size", 128), theirs["hidden_size"]
    return BERT.read(theirs) | {"embed_width": 0 if narrow == width else narrow}


_ELECTRA_HEAD = Head({"classifier.dense": "task_head/dense", "classifier.out_proj": "task_head"}, hidden="gelu")
ELECTRA = dataclasses.replace(
    BERT,
    name="electra",
    layout=Layout(
        "encoder",
        {stem: ours for stem, ours in _bert_table("electra").items() if ours != "nsp/pooler"}
        | {
            "electra.embeddings_project": "body/embed/widen",
            "generator_predictions.dense": "mlm/dense",
            "generator_predictions.LayerNorm": "mlm/norm",
            "generator_lm_head": "mlm lm_head",
        },
    ),
    constants=BERT.constants | {"next_sentence": False, "pooler": False},
    values=BERT.values,
    heads={"masked_head": "generator_lm_head."},
    read=_electra_read,
    write=lambda cfg: BERT.write(cfg) | {"embedding_size": cfg.narrow},
    architecture=lambda cfg: "ElectraForMaskedLM" if cfg.masked_head else "ElectraModel",
    prefix="electra.",
    copies={"generator_lm_head.weight": "electra.embeddings.word_embeddings.weight"},
    buffers=(*BERT.buffers, *(f"discriminator_predictions.{n}.{e}" for n in _GUESSES for e in ("weight", "bias"))),
    classes="Electra",
    tasks=ON_TOKENS
    | {
        "SequenceClassification": _ELECTRA_HEAD,
        "MultipleChoice": Head({"sequence_summary.summary": "task_head/dense", "classifier": "task_head"}, hidden="gelu"),
    },
)

# ---- DistilBERT -------------------------------------------------------------------------------------------------------

_DISTIL_HEAD = Head({"pre_classifier": "task_head/dense", "classifier": "task_head"}, hidden="relu")
_DISTIL = "distilbert.transformer.layer.{}"
DISTILBERT = dataclasses.replace(
    BERT,
    name="distilbert",
    layout=Layout(
        "encoder",
        {
            "distilbert.embeddings.word_embeddings": "body/embed/token",
            "distilbert.embeddings.position_embeddings": "body/embed/position",
            "distilbert.embeddings.LayerNorm": "body/embed/norm",
            f"{_DISTIL}.attention.q_lin": "block/attention/query",
            f"{_DISTIL}.attention.k_lin": "block/attention/key",
            f"{_DISTIL}.attention.v_lin": "block/attention/value",
            f"{_DISTIL}.attention.out_lin": "block/attention/out",
            f"{_DISTIL}.sa_layer_norm": "block/attention_norm",
            f"{_DISTIL}.ffn.lin1": "block/mlp/up",
            f"{_DISTIL}.ffn.lin2": "block/mlp/down",
            f"{_DISTIL}.output_layer_norm": "block/mlp_norm",
            "vocab_transform": "mlm/dense",
            "vocab_layer_norm": "mlm/norm",
            "vocab_projector": "mlm lm_head",
        },
    ),
    constants=BERT.constants | {"norm_eps": 1e-12, "segment_types": 0, "next_sentence": False, "pooler": False},
    values={
        "vocab_size": ("vocab_size", None),
        "max_position_embeddings": ("context_length", 512),
        "dim": ("d_model", None),
        "n_layers": ("n_layers", None),
        "n_heads": ("n_heads", None),
        "hidden_dim": ("d_ff", None),
        "attention_dropout": ("dropout_attention", 0.1),
        "initializer_range": ("init_std", 0.02),
        "tie_word_embeddings": ("tie_embeddings", True),
    },
    wanted={},
    heads={"masked_head": "vocab_projector."},
    read=lambda theirs: {
        "activation": activation_of(theirs.get("activation", "gelu")),
        "dropout_embed": theirs.get("dropout", 0.1),
        "dropout_residual": theirs.get("dropout", 0.1),
    },
    write=lambda cfg: {"activation": published_activation(cfg.activation), "dropout": one_dropout(cfg)},
    architecture=lambda cfg: "DistilBertForMaskedLM" if cfg.masked_head else "DistilBertModel",
    prefix="distilbert.",
    copies={"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
    buffers=(".position_ids",),
    classes="DistilBert",
    tasks=ON_TOKENS | {"SequenceClassification": _DISTIL_HEAD, "MultipleChoice": _DISTIL_HEAD},
)

# ---- ModernBERT -------------------------------------------------------------------------------------------------------


def _modernbert_read(theirs: Config) -> Config:
    pattern = layer_types.pattern(theirs, theirs.get("global_attn_every_n_layers", 3), last=False)
    return {
        "layer_pattern": pattern,
        "window": theirs.get("local_attention", 128) // 2 + 1 if "local" in pattern else 0,
        "dropout_residual": theirs.get("mlp_dropout", 0.0),
    } | layer_types.rotary_bases(theirs, ("global_rope_theta", "local_rope_theta"), (160_000.0, 10_000.0))


def _modernbert_write(cfg: TransformerConfig) -> Config:
    return {
        "layer_types": layer_types.types(cfg),
        "local_attention": 2 * max(cfg.window - 1, 0),
        "rope_parameters": layer_types.rope_parameters(cfg),
        "mlp_dropout": cfg.dropout_residual,
    }


_MODERN = Head(
    {"head.dense": "task_head/dense", "head.norm": "task_head/norm", "classifier": "task_head"},
    hidden="gelu",
    hidden_norm=True,
)

MODERNBERT = Family(
    name="modernbert",
    ours="bert",
    layout=Layout(
        "encoder",
        {
            "model.embeddings.tok_embeddings": "body/embed/token",
            "model.embeddings.norm": "body/embed/norm",
            "model.layers.{}.attn_norm": "block/attention_norm",
            "model.layers.{}.attn.Wqkv": "block/attention/query block/attention/key block/attention/value",
            "model.layers.{}.attn.Wo": "block/attention/out",
            "model.layers.{}.mlp_norm": "block/mlp_norm",
            "model.layers.{}.mlp.Wi": "block/mlp/gate block/mlp/up",
            "model.layers.{}.mlp.Wo": "block/mlp/down",
            "model.final_norm": "body/final_norm",
            "head.dense": "mlm/dense",
            "head.norm": "mlm/norm",
            "decoder": "mlm",
        },
    ),
    constants={"position_embedding": "rotary", "norm": "layer", "norm_position": "pre", "bias": False, "embed_norm": True}
    | {"first_norm": False, "activation": "geglu", "tie_embeddings": True, "next_sentence": False, "pooler": False},
    values={
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
    },
    wanted={"attention_bias": False, "mlp_bias": False, "norm_bias": False, "classifier_bias": False}
    | {"decoder_bias": True, "hidden_activation": "gelu", "classifier_activation": "gelu", "tie_word_embeddings": True},
    heads={"masked_head": "decoder."},
    read=_modernbert_read,
    write=_modernbert_write,
    architecture=lambda cfg: "ModernBertForMaskedLM" if cfg.masked_head else "ModernBertModel",
    prefix="model.",
    copies={"decoder.weight": "model.embeddings.tok_embeddings.weight"},
    classes="ModernBert",
    tasks=dict.fromkeys(
        ("SequenceClassification", "MultipleChoice"), dataclasses.replace(_MODERN, pool_key="classifier_pooling")
    )
    | dict.fromkeys(("TokenClassification", "QuestionAnswering"), _MODERN),
)
