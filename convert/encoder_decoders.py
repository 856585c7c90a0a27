"""Encoder-decoders as they are published: BART, mBART, Marian, Pegasus, M2M-100 (NLLB); T5 and mT5."""

import dataclasses

from bothways.convert.family import ACTIVATIONS, Config, Family, activation_of, one_dropout, published_activation, without
from bothways.convert.layout import Layout
from bothways.errors import InputError
from bothways.model.config import TransformerConfig

# ---- BART, mBART, Marian, Pegasus, M2M-100 ----------------------------------------------------------------------------

_ACTIVATIONS = ACTIVATIONS | {"swish": "silu", "silu": "silu"}


def _side(side: str, learned: bool, embed_norm: bool, final_norm: bool) -> dict[str, str]:
    """The table of one side; of a decoder with its cross-attention."""
    blocks, layer = f"{side}/stack/blocks", f"model.{side}.layers.{{}}"
    embed = "embed" if side == "encoder" else "target_embed"
    found = {f"model.{side}.embed_positions": f"{embed}/position"} if learned else {}
    found |= {f"model.{side}.layernorm_embedding": f"{embed}/norm"} if embed_norm else {}
    found |= {f"model.{side}.layer_norm": f"{side}/final_norm"} if final_norm else {}
    cross = {"encoder_attn": "cross"} if side == "decoder" else {}
    for theirs, ours in {"self_attn": "attention", **cross}.items():
        names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}
        found |= {f"{layer}.{theirs}.{a}": f"{blocks}/{ours}/{b}" for a, b in names.items()}
        found[f"{layer}.{theirs}_layer_norm"] = f"{blocks}/{ours}_norm"
    names = {"fc1": "mlp/up", "fc2": "mlp/down", "final_layer_norm": "mlp_norm"}
    return found | {f"{layer}.{a}": f"{blocks}/{b}" for a, b in names.items()}


def _layout(learned: bool, embed_norm: bool, final_norm: bool) -> Layout:
    how = {"learned": learned, "embed_norm": embed_norm, "final_norm": final_norm}
    table = {"model.shared": "embed/token", **_side("encoder", **how), **_side("decoder", **how)}
    return Layout("", table | {"final_logits_bias": "lm_head/bias"}, first_position=2, as_row="lm_head/bias")


_SIZES = ("layers", "attention_heads", "ffn_dim")


def _bart_read(theirs: Config) -> Config:
    for name in _SIZES:
        encoder, decoder = theirs[f"encoder_{name}"], theirs[f"decoder_{name}"]
        if encoder != decoder:
            raise InputError(
                f"config.json: encoder_{name} is {encoder} and decoder_{name} {decoder}; sides of different sizes are not "
                "supported"
            )
    if theirs.get("decoder_vocab_size") not in (None, theirs["vocab_size"]):
        raise InputError(
            f"config.json: decoder_vocab_size is {theirs['decoder_vocab_size']} and vocab_size {theirs['vocab_size']}; "
            "one vocabulary for both sides is supported"
        )
    dropout = theirs.get("dropout", 0.1)
    return {
        "activation": activation_of(theirs.get("activation_function", "gelu"), _ACTIVATIONS),
        "dropout_embed": dropout,
        "dropout_residual": dropout,
    }


def _bart_write(cfg: TransformerConfig) -> Config:
    sizes = dict(zip(_SIZES, (cfg.n_layers, cfg.n_heads, cfg.resolved().d_ff), strict=True))
    return {
        "activation_function": published_activation(cfg.activation, _ACTIVATIONS),
        "dropout": one_dropout(cfg),
        "is_encoder_decoder": True,
        **{f"decoder_{name}": size for name, size in sizes.items()},
    }


BART = Family(
    name="bart",
    ours="seq2seq",
    layout=_layout(learned=True, embed_norm=True, final_norm=False),
    constants={"position_embedding": "learned", "norm": "layer", "norm_position": "post", "norm_eps": 1e-5, "bias": True}
    | {"embed_norm": True, "shared_embeddings": "tokens", "tie_embeddings": True},
    values={
        "vocab_size": ("vocab_size", None),
        "max_position_embeddings": ("context_length", 1024),
        "d_model": ("d_model", None),
        "encoder_layers": ("n_layers", None),
        "encoder_attention_heads": ("n_heads", None),
        "encoder_ffn_dim": ("d_ff", None),
        "scale_embedding": ("embed_scale", False),
        "attention_dropout": ("dropout_attention", 0.0),
        "init_std": ("init_std", 0.02),
    },
    wanted={"tie_word_embeddings": True},
    heads={"output_bias": "final_logits_bias"},
    read=_bart_read,
    write=_bart_write,
    architecture=lambda cfg: "BartForConditionalGeneration",
    prefix="model.",
    copies={
        "lm_head.weight": "model.shared.weight",
        "model.encoder.embed_tokens.weight": "model.shared.weight",
        "model.decoder.embed_tokens.weight": "model.shared.weight",
    },
    classes="Bart",
)

MBART = dataclasses.replace(
    BART,
    name="mbart",
    layout=_layout(learned=True, embed_norm=True, final_norm=True),
    constants=BART.constants | {"norm_position": "pre"},
    architecture=lambda cfg: "MBartForConditionalGeneration",
    classes="MBart",
)

_SINUSOIDS = tuple(f"model.{side}.embed_positions.weight" for side in ("encoder", "decoder"))
"""Computed, and stored nevertheless by older versions."""
_WAVES = BART.constants | {"position_embedding": "sinusoidal_halves", "embed_norm": False, "shared_embeddings": "all"}
MARIAN = dataclasses.replace(
    BART,
    name="marian",
    layout=_layout(learned=False, embed_norm=False, final_norm=False),
    constants=_WAVES,
    wanted=BART.wanted | {"share_encoder_decoder_embeddings": True},
    architecture=lambda cfg: "MarianMTModel",
    buffers=_SINUSOIDS,
    classes="Marian",
)

PEGASUS = dataclasses.replace(
    BART,
    name="pegasus",
    layout=_layout(learned=False, embed_norm=False, final_norm=True),
    constants=_WAVES | {"norm_position": "pre"},
    architecture=lambda cfg: "PegasusForConditionalGeneration",
    buffers=_SINUSOIDS,
    classes="Pegasus",
)

M2M_100 = dataclasses.replace(
    PEGASUS,
    name="m2m_100",
    constants=PEGASUS.constants | {"position_embedding": "sinusoidal_t2t", "first_position": 2},
    values=BART.values | {"scale_embedding": ("embed_scale", True), "attention_dropout": ("dropout_attention", 0.1)},
    read=lambda theirs: _bart_read({"activation_function": "relu"} | theirs),
    architecture=lambda cfg: "M2M100ForConditionalGeneration",
    pad=1,
    classes="M2M100",
)

# ---- T5, mT5 ----------------------------------------------------------------------------------------------------------

_FEED_FORWARD = {"relu": "relu", "gelu": "gelu", "gated-gelu": "geglu_tanh", "gated-silu": "swiglu"}


def _t5_side(side: str) -> dict[str, str]:
    blocks, block = f"{side}/stack/blocks", f"{side}.block.{{}}.layer"
    found = {
        f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias": f"{side}/relative",
        f"{side}.final_layer_norm": f"{side}/final_norm",
    }
    cross = {"EncDecAttention": "cross"} if side == "decoder" else {}
    for i, (theirs, ours) in enumerate({"SelfAttention": "attention", **cross}.items()):
        names = {"q": "query", "k": "key", "v": "value", "o": "out"}
        found |= {f"{block}.{i}.{theirs}.{a}": f"{blocks}/{ours}/{b}" for a, b in names.items()}
        found[f"{block}.{i}.layer_norm"] = f"{blocks}/{ours}_norm"
    last = f"{block}.{1 + len(cross)}"
    names = {"wi": "mlp/up", "wi_0": "mlp/gate", "wi_1": "mlp/up", "wo": "mlp/down"}
    found |= {f"{last}.DenseReluDense.{a}": f"{blocks}/{b}" for a, b in names.items()}
    return found | {f"{last}.layer_norm": f"{blocks}/mlp_norm"}


def _t5_read(theirs: Config) -> Config:
    layers = theirs["num_layers"]
    if theirs.get("num_decoder_layers") not in (None, layers):
        raise InputError(
            f"config.json: num_layers is {layers} and num_decoder_layers {theirs['num_decoder_layers']}; sides of different "
            "sizes are not supported"
        )
    dropout = theirs.get("dropout_rate", 0.1)
    return {
        "output_scale": theirs.get("scale_decoder_outputs", theirs.get("tie_word_embeddings") is not False),
        "activation": activation_of(theirs.get("feed_forward_proj", "relu"), _FEED_FORWARD),
        "context_length": theirs.get("n_positions") or 512,
        **dict.fromkeys(("dropout_embed", "dropout_residual", "dropout_attention"), dropout),
    }


def _t5_write(cfg: TransformerConfig) -> Config:
    dropout = one_dropout(cfg)
    if cfg.dropout_attention != dropout:
        raise InputError(f"dropout_attention={cfg.dropout_attention} and dropout_residual={dropout} are one number there")
    return {
        "scale_decoder_outputs": cfg.output_scale,
        "tie_word_embeddings": cfg.output_scale,  # which scales and ties nothing (transformers)
        "feed_forward_proj": published_activation(cfg.activation, _FEED_FORWARD),
        "n_positions": cfg.context_length,
        "dropout_rate": dropout,
        "num_decoder_layers": cfg.n_layers,
        "is_encoder_decoder": True,
    }


T5 = Family(
    name="t5",
    ours="seq2seq",
    layout=Layout("", {"shared": "embed/token", **_t5_side("encoder"), **_t5_side("decoder"), "lm_head": "lm_head"}),
    constants={
        "position_embedding": "none",
        "score_bias": "relative",
        "norm": "rms",
        "norm_position": "pre",
        "bias": False,
        "query_scale": 1.0,
    },
    values={
        "vocab_size": ("vocab_size", None),
        "d_model": ("d_model", None),
        "num_layers": ("n_layers", None),
        "num_heads": ("n_heads", None),
        "d_kv": ("d_head", None),
        "d_ff": ("d_ff", None),
        "relative_attention_num_buckets": ("relative_buckets", 32),
        "relative_attention_max_distance": ("relative_distance", 128),
        "layer_norm_epsilon": ("norm_eps", 1e-6),
    },
    wanted={},
    heads={},
    read=_t5_read,
    write=_t5_write,
    architecture=lambda cfg: "T5ForConditionalGeneration",
    prefix="",
    copies={
        "lm_head.weight": "shared.weight",
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    },
    buffers=(".EncDecAttention.relative_attention_bias.weight",),
    classes="T5",
    unused=lambda cfg: (".wi",) if cfg.gated else (".wi_0", ".wi_1"),
    untied="lm_head.",
)


def _mt5_write(cfg: TransformerConfig) -> Config:
    return without(_t5_write(cfg), "scale_decoder_outputs")


MT5 = dataclasses.replace(
    T5,
    name="mt5",
    read=lambda theirs: _t5_read({"feed_forward_proj": "gated-gelu"} | theirs | {"scale_decoder_outputs": False}),
    write=_mt5_write,
    architecture=lambda cfg: "MT5ForConditionalGeneration",
    classes="MT5",
)

FAMILIES: tuple[Family, ...] = (BART, MBART, MARIAN, PEGASUS, M2M_100, T5, MT5)
