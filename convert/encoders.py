"""Encoders as they are published: BERT, DistilBERT, RoBERTa and its kin."""

import dataclasses

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
    wanted=BERT.wanted | {"hidden_act": "gelu"},  # of the head, whatever the blocks have
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
