"""Encoders beside BERT: ALBERT, whose layers are one and whose embeddings are narrow, and MPNet, with relative positions too."""

import dataclasses

from bothways.convert.encoders import BERT, ON_POOLER, ON_TOKENS, ROBERTA
from bothways.convert.family import Family
from bothways.convert.layout import Layout

_ALBERT_LAYER = "albert.encoder.albert_layer_groups.{}.albert_layers.0"
ALBERT = dataclasses.replace(
    BERT,
    name="albert",
    layout=Layout(
        "encoder",
        {
            "albert.embeddings.word_embeddings": "body/embed/token",
            "albert.embeddings.position_embeddings": "body/embed/position",
            "albert.embeddings.token_type_embeddings": "body/embed/segment",
            "albert.embeddings.LayerNorm": "body/embed/norm",
            "albert.encoder.embedding_hidden_mapping_in": "body/embed/widen",
            **{f"{_ALBERT_LAYER}.attention.{name}": f"block/attention/{name}" for name in ("query", "key", "value")},
            f"{_ALBERT_LAYER}.attention.dense": "block/attention/out",
            f"{_ALBERT_LAYER}.attention.LayerNorm": "block/attention_norm",
            f"{_ALBERT_LAYER}.ffn": "block/mlp/up",
            f"{_ALBERT_LAYER}.ffn_output": "block/mlp/down",
            f"{_ALBERT_LAYER}.full_layer_layer_norm": "block/mlp_norm",
            "albert.pooler": "nsp/pooler",
            "predictions.dense": "mlm/dense",
            "predictions.LayerNorm": "mlm/norm",
            "predictions": "mlm",
            "predictions.decoder": "lm_head",
            "sop_classifier.classifier": "nsp/classes",
        },
    ),
    constants=BERT.constants | {"share_layers": True},
    values=BERT.values
    | {"embedding_size": ("embed_width", 128), "attention_probs_dropout_prob": ("dropout_attention", 0.0)},
    wanted=BERT.wanted | {"num_hidden_groups": 1, "inner_group_num": 1},
    heads={"masked_head": "predictions.", "next_sentence": "sop_classifier.", "pooler": "albert.pooler."},
    read=lambda theirs: BERT.read({"hidden_act": "gelu_new", "hidden_dropout_prob": 0.0} | theirs),
    write=lambda cfg: BERT.write(cfg) | {"embedding_size": cfg.narrow},
    architecture=lambda cfg: (
        "AlbertForPreTraining" if cfg.next_sentence else "AlbertForMaskedLM" if cfg.masked_head else "AlbertModel"
    ),
    prefix="albert.",
    copies={
        "predictions.decoder.weight": "albert.embeddings.word_embeddings.weight",
        "predictions.decoder.bias": "predictions.bias",
    },
    classes="Albert",
    tasks=ON_TOKENS | {"SequenceClassification": ON_POOLER, "MultipleChoice": ON_POOLER},
)

_MPNET_LAYER = "mpnet.encoder.layer.{}"
MPNET = dataclasses.replace(
    ROBERTA,
    name="mpnet",
    layout=Layout(
        "encoder",
        {
            "mpnet.embeddings.word_embeddings": "body/embed/token",
            "mpnet.embeddings.position_embeddings": "body/embed/position",
            "mpnet.embeddings.LayerNorm": "body/embed/norm",
            "mpnet.encoder.relative_attention_bias": "body/relative",
            f"{_MPNET_LAYER}.attention.attn.q": "block/attention/query",
            f"{_MPNET_LAYER}.attention.attn.k": "block/attention/key",
            f"{_MPNET_LAYER}.attention.attn.v": "block/attention/value",
            f"{_MPNET_LAYER}.attention.attn.o": "block/attention/out",
            f"{_MPNET_LAYER}.attention.LayerNorm": "block/attention_norm",
            f"{_MPNET_LAYER}.intermediate.dense": "block/mlp/up",
            f"{_MPNET_LAYER}.output.dense": "block/mlp/down",
            f"{_MPNET_LAYER}.output.LayerNorm": "block/mlp_norm",
            "mpnet.pooler.dense": "nsp/pooler",
            "lm_head.dense": "mlm/dense",
            "lm_head.layer_norm": "mlm/norm",
            "lm_head": "mlm",
            "lm_head.decoder": "lm_head",
        },
        first_position=2,
    ),
    constants=BERT.constants
    | {"segment_types": 0, "score_bias": "relative", "relative_buckets": 32, "relative_distance": 128},
    wanted=BERT.wanted | {"relative_attention_num_buckets": 32, "hidden_act": "gelu"},  # of the head
    heads={"masked_head": "lm_head.", "pooler": "mpnet.pooler."},
    architecture=lambda cfg: "MPNetForMaskedLM" if cfg.masked_head else "MPNetModel",
    prefix="mpnet.",
    copies={
        "lm_head.decoder.weight": "mpnet.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
    classes="MPNet",
)

FAMILIES: tuple[Family, ...] = (ALBERT, MPNET)
