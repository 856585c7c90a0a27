"""Encoders with rotary positions beside ModernBERT: EuroBERT, which is a Llama without its causal mask, and Nomic BERT."""

import dataclasses

from bothways.convert import layer_types
from bothways.convert.decoders import LLAMA
from bothways.convert.encoders import BERT, ON_POOLER, ON_TOKENS
from bothways.convert.family import Config, Family, Head, activation_of, one_dropout, published_activation
from bothways.convert.layout import Layout
from bothways.errors import InputError
from bothways.model.config import TransformerConfig

_TAGS = {"TokenClassification": ON_TOKENS["TokenClassification"]}

# ---- EuroBERT ---------------------------------------------------------------------------------------------------------


def _eurobert_read(theirs: Config) -> Config:
    """No tensor says that there is a masked-token head where its output layer is tied, so `architectures` does."""
    kinds = theirs.get("architectures") or ["EuroBertForMaskedLM"]
    return LLAMA.read(theirs) | {"masked_head": str(kinds[0]).endswith("ForMaskedLM")}


_EUROBERT_HEAD = Head(
    {"dense": "task_head/dense", "classifier": "task_head"},
    hidden="gelu",
    hidden_bias=True,
    pool_key="classifier_pooling",
    pools={"late": "late", "token": "bos", "mean": "mean"},
)

EUROBERT = dataclasses.replace(
    LLAMA,
    name="eurobert",
    ours="bert",
    layout=dataclasses.replace(LLAMA.layout, body="encoder"),
    constants=LLAMA.constants | {"masked_transform": False},
    values=LLAMA.values | {"rms_norm_eps": ("norm_eps", 1e-5), "max_position_embeddings": ("context_length", 8192)},
    read=_eurobert_read,
    architecture=lambda cfg: "EuroBertForMaskedLM" if cfg.masked_head else "EuroBertModel",
    classes="EuroBert",
    tasks=_TAGS | {"SequenceClassification": _EUROBERT_HEAD},
)

# ---- Nomic BERT -------------------------------------------------------------------------------------------------------

_GATES = {"silu": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh", "gelu_new": "geglu_tanh"}
_FIRST_NAMES = {
    "n_embd": "d_model",
    "n_layer": "n_layers",
    "n_head": "n_heads",
    "n_inner": "d_ff",
    "n_positions": "context_length",
    "layer_norm_epsilon": "norm_eps",
    "embd_pdrop": "dropout_embed",
    "attn_pdrop": "dropout_attention",
    "resid_pdrop": "dropout_residual",
}
"""Keys of the checkpoints from before `transformers` had a class of them -> our fields."""
_FIRST_VALUES = {"activation_function": "swiglu", "rotary_emb_fraction": 1.0, "rotary_scaling_factor": None}
_FIRST_VALUES |= dict.fromkeys(("qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias", "use_rms_norm", "causal"), False)
_FIRST_VALUES |= dict.fromkeys(("prenorm", "parallel_block", "rotary_emb_interleaved"), False)
"""What else their config.json says, and must."""


def _nomic_read(theirs: Config) -> Config:
    for key, want in _FIRST_VALUES.items():
        if theirs.get(key, want) != want:
            raise InputError(
                f"config.json: {key} is {theirs[key]!r}; a nomic_bert with that is not supported, only {want!r}"
            )
    found: Config = {"activation": activation_of(theirs.get("hidden_act", "silu"), _GATES)}
    found |= dict.fromkeys(("dropout_embed", "dropout_residual"), theirs.get("hidden_dropout_prob", 0.0))
    found |= layer_types.rotary_bases(theirs, ("rotary_emb_base", ""), (1000.0, 0.0))
    return found | {ours: theirs[key] for key, ours in _FIRST_NAMES.items() if theirs.get(key) is not None}


def _nomic_write(cfg: TransformerConfig) -> Config:
    return {
        "hidden_act": published_activation(cfg.activation, _GATES),
        "hidden_dropout_prob": one_dropout(cfg),
        "rope_parameters": {"rope_theta": cfg.rotary_base, "rope_type": "default"},
    }


_LAYER = "nomic_bert.encoder.layers.{}"
NOMIC_BERT = dataclasses.replace(
    BERT,
    name="nomic_bert",
    layout=Layout(
        "encoder",
        {
            "nomic_bert.embeddings.word_embeddings": "body/embed/token",
            "nomic_bert.embeddings.token_type_embeddings": "body/embed/segment",
            "nomic_bert.emb_ln": "body/embed/norm",
            f"{_LAYER}.attn.Wqkv": "block/attention/query block/attention/key block/attention/value",
            f"{_LAYER}.attn.out_proj": "block/attention/out",
            f"{_LAYER}.norm1": "block/attention_norm",
            f"{_LAYER}.mlp.fc11": "block/mlp/up",
            f"{_LAYER}.mlp.fc12": "block/mlp/gate",
            f"{_LAYER}.mlp.fc2": "block/mlp/down",
            f"{_LAYER}.norm2": "block/mlp_norm",
            "nomic_bert.pooler.dense": "nsp/pooler",
            "cls.predictions.transform.dense": "mlm/dense",
            "cls.predictions.transform.layer_norm": "mlm/norm",
            "cls.predictions": "mlm",
        },
    ),
    constants=BERT.constants
    | {"position_embedding": "rotary", "attention_bias": False, "mlp_bias": False, "tie_embeddings": True}
    | {"next_sentence": False},
    values={
        "vocab_size": ("vocab_size", None),
        "max_position_embeddings": ("context_length", 2048),
        "hidden_size": ("d_model", 768),
        "num_hidden_layers": ("n_layers", 12),
        "num_attention_heads": ("n_heads", 12),
        "head_dim": ("d_head", 0),
        "intermediate_size": ("d_ff", 3072),
        "type_vocab_size": ("segment_types", 2),
        "layer_norm_eps": ("norm_eps", 1e-12),
        "attention_probs_dropout_prob": ("dropout_attention", 0.0),
        "initializer_range": ("init_std", 0.02),
    },
    wanted={"tie_word_embeddings": True},
    heads={"masked_head": "cls.predictions.", "pooler": "nomic_bert.pooler."},
    read=_nomic_read,
    write=_nomic_write,
    architecture=lambda cfg: "NomicBertForMaskedLM" if cfg.masked_head else "NomicBertModel",
    prefix="nomic_bert.",
    copies={
        "cls.predictions.decoder.weight": "nomic_bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    classes="NomicBert",
    tasks=_TAGS | {"SequenceClassification": ON_POOLER},
)

FAMILIES: tuple[Family, ...] = (EUROBERT, NOMIC_BERT)
