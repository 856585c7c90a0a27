"""The published families: for each one table of tensors and one of configuration values, read in both directions."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Literal

from common.errors import InputError
from convert.layout import Layout
from model.config import RotaryScaling, TransformerConfig

Config = dict[str, Any]
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
INITIAL = ("init", "init_std", "init_residual", "dtype", "scan_layers", "remat")
"""Fields that a checkpoint says nothing of: how weights began, and how the program is laid out."""


OLD_NAMES = {".gamma": ".weight", ".beta": ".bias"}
"""Norms' parameters as BERT's first checkpoints call them."""


@dataclasses.dataclass(frozen=True)
class Family:
    """One way of publishing a model.

    Args:
      name: `model_type` in config.json.
      ours: our family.
      constants: fields of TransformerConfig that are always so.
      values: their key -> our field, with the value that a config.json without the key means.
      wanted: their key -> the value it must have where it is there; a model with another is none that we compute.
      heads: our field -> the prefix of its tensors. The field is true where the checkpoint has such tensors.
      read: the fields that need more than a name: their config -> ours.
      write: the other direction.
      prefix: of the body's names in a checkpoint that has heads.
      copies: tensors that some checkpoints hold twice, and under which name they count.
      buffers: ends of names that hold no parameters.
    """

    name: str
    ours: Literal["gpt", "bert"]
    layout: Layout
    constants: Config
    values: dict[str, tuple[str, Any]]
    wanted: Config
    heads: dict[str, str]
    read: Callable[[Config], Config]
    write: Callable[[TransformerConfig], Config]
    architecture: Callable[[TransformerConfig], str]
    prefix: str
    copies: dict[str, str]
    buffers: tuple[str, ...] = ()

    def config(self, theirs: Config, names: Iterable[str]) -> TransformerConfig:
        """Our configuration, from theirs and the names of the tensors.

        Raises:
          InputError: a value is missing, or makes another function than ours.
        """
        for key, want in self.wanted.items():
            if theirs.get(key, want) != want:
                raise InputError(
                    f"config.json: {key} is {theirs[key]!r}; a {self.name} with that is not supported, only {want!r}"
                )
        fields: Config = dict(self.constants)
        for key, (ours, default) in self.values.items():
            value = theirs.get(key)
            if value is None and default is None:
                raise InputError(f"config.json of a {self.name} must say {key!r}, and does not")
            fields[ours] = default if value is None else value
        try:
            fields |= self.read(theirs)
        except (KeyError, TypeError, AttributeError) as e:
            raise InputError(f"config.json of this {self.name} is not understood: {type(e).__name__} {e}") from e
        names = list(names)
        for ours, stem in self.heads.items():
            fields[ours] = any(n.startswith(stem) for n in names)
        if fields.get("next_sentence"):
            fields["pooler"] = False
        return TransformerConfig(**fields).resolved()

    def config_json(self, cfg: TransformerConfig) -> Config:
        """Their configuration, from ours. `differences` says whether it means the same."""
        same = {key: getattr(cfg, ours) for key, (ours, _) in self.values.items()}
        theirs = {"architectures": [self.architecture(cfg)], "model_type": self.name, "dtype": "float32"}
        return theirs | self.wanted | same | self.write(cfg)

    def differences(self, cfg: TransformerConfig) -> list[str]:
        """Why this family cannot hold a configuration of ours; empty if it can."""
        stems = [self.prefix, *(stem for ours, stem in self.heads.items() if getattr(cfg, ours))]
        stems += [self.heads["pooler"]] if cfg.next_sentence and "pooler" in self.heads else []
        try:
            back = self.config(self.config_json(cfg), stems)
        except (InputError, KeyError) as e:
            return [str(e)]
        mine, theirs = dataclasses.asdict(cfg.resolved()), dataclasses.asdict(back)
        return [f"{k}={theirs[k]}, not {mine[k]}" for k in mine if mine[k] != theirs[k] and k not in INITIAL]

    def absent(self, cfg: TransformerConfig) -> set[str]:
        """Tensors that there are for every layer but the first, where that lacks its first norm."""
        stems = [stem for stem, ours in self.layout.table.items() if ours == "block/attention_norm"]
        return set() if cfg.first_norm else {stems[0].format(0) + suffix for suffix in (".weight", ".bias")}

    def plain(self, tensors: dict[str, Any], tied: bool) -> dict[str, Any]:
        """Tensors under the names of the table: body with its prefix, no buffers, no copies.

        Args:
          tied: the output layer is the token embeddings; a tensor of its own must be a copy of them.

        Raises:
          InputError: what should be a copy is not one.
        """
        found = {}
        for name, tensor in tensors.items():
            if not (self.buffers and name.endswith(self.buffers)):
                for old, new in OLD_NAMES.items():
                    name = name.removesuffix(old) + new if name.endswith(old) else name
                found[name] = tensor
        if not any(name.startswith(self.prefix) for name in found):  # a body saved without heads
            found = {self.prefix + name: tensor for name, tensor in found.items()}
        for copy, original in self.copies.items():
            if copy in found and original in found and (tied or copy.endswith(".bias")):
                if found[copy].shape != found[original].shape or (found[copy] != found[original]).any():
                    raise InputError(
                        f"{copy} and {original} should be one tensor and differ: is tie_word_embeddings right?"
                    )
                del found[copy]
        return found


def _activation(theirs: str, allowed: dict[str, str] = ACTIVATIONS) -> str:
    if theirs not in allowed:
        raise InputError(f"config.json: the activation {theirs!r} is not among {', '.join(allowed)}")
    return allowed[theirs]


def _published_activation(ours: str, allowed: dict[str, str] = ACTIVATIONS) -> str:
    return next((theirs for theirs, mine in allowed.items() if mine == ours), ours)


def _one_dropout(cfg: TransformerConfig) -> float:
    if cfg.dropout_embed != cfg.dropout_residual:
        raise InputError(
            f"dropout_embed={cfg.dropout_embed} and dropout_residual={cfg.dropout_residual} are one number there"
        )
    return cfg.dropout_embed


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
    constants={"positions": "learned", "norm": "layer", "norm_position": "pre", "bias": True},
    values={
        "vocab_size": ("vocab_size", None),
        "n_positions": ("context", 1024),
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
    read=lambda theirs: {"activation": _activation(theirs.get("activation_function", "gelu_new"))},
    write=lambda cfg: {"activation_function": _published_activation(cfg.activation)},
    architecture=lambda cfg: "GPT2LMHeadModel",
    prefix="transformer.",
    copies={"lm_head.weight": "transformer.wte.weight"},
    buffers=(".attn.bias", ".attn.masked_bias"),
)

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
    constants={"positions": "learned", "norm": "layer", "norm_position": "post", "bias": True, "embed_norm": True},
    values={
        "vocab_size": ("vocab_size", None),
        "max_position_embeddings": ("context", 512),
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
        "activation": _activation(theirs.get("hidden_act", "gelu")),
        "dropout_embed": theirs.get("hidden_dropout_prob", 0.1),
        "dropout_residual": theirs.get("hidden_dropout_prob", 0.1),
    },
    write=lambda cfg: {"hidden_act": _published_activation(cfg.activation), "hidden_dropout_prob": _one_dropout(cfg)},
    architecture=lambda cfg: (
        "BertForPreTraining" if cfg.next_sentence else "BertForMaskedLM" if cfg.masked_head else "BertModel"
    ),
    prefix="bert.",
    copies={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    buffers=(".position_ids", ".token_type_ids"),
)


def _roberta_read(theirs: Config) -> Config:
    if theirs.get("pad_token_id", 1) != 1:
        raise InputError(
            f"config.json: a roberta counts positions from pad_token_id + 1; only 1 is supported, not {theirs['pad_token_id']}"
        )
    return BERT.read(theirs) | {"context": theirs.get("max_position_embeddings", 514) - 2}


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
    write=lambda cfg: BERT.write(cfg) | {"max_position_embeddings": cfg.context + 2, "pad_token_id": 1},
    architecture=lambda cfg: "RobertaForMaskedLM" if cfg.masked_head else "RobertaModel",
    prefix="roberta.",
    copies={
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
)

# ---- ModernBERT -------------------------------------------------------------------------------------------------------

LAYER_KINDS = {"full_attention": "dense", "sliding_attention": "local"}


def _shortest_pattern(kinds: list[str]) -> tuple[str, ...]:
    """The fewest layers that, repeated, give these."""
    n = next(n for n in range(1, len(kinds) + 1) if all(k == kinds[i % n] for i, k in enumerate(kinds)))
    return tuple(kinds[:n])


def _modernbert_read(theirs: Config) -> Config:
    n, every = theirs["num_hidden_layers"], theirs.get("global_attn_every_n_layers", 3)
    types = theirs.get("layer_types") or ["sliding_attention" if i % every else "full_attention" for i in range(n)]
    bases = theirs.get("rope_parameters") or {}
    for kind, values in bases.items():
        if values and values.get("rope_type", "default") != "default":
            raise InputError(f"config.json: rope_parameters of {kind} has rope_type {values['rope_type']!r}, not default")

    def base(kind: str, old: str, default: float) -> float:
        return float((bases.get(kind) or {}).get("rope_theta") or theirs.get(old) or default)

    pattern = _shortest_pattern([LAYER_KINDS[t] for t in types])
    return {
        "layer_pattern": pattern,
        "window": theirs.get("local_attention", 128) // 2 + 1 if "local" in pattern else 0,
        "rotary_base": base("full_attention", "global_rope_theta", 160_000.0),
        "rotary_base_local": base("sliding_attention", "local_rope_theta", 10_000.0),
        "dropout_residual": theirs.get("mlp_dropout", 0.0),
    }


def _modernbert_write(cfg: TransformerConfig) -> Config:
    kinds = {ours: theirs for theirs, ours in LAYER_KINDS.items()}
    bases = {"full_attention": cfg.rotary_base, "sliding_attention": cfg.rotary_base_local or cfg.rotary_base}
    return {
        "layer_types": [kinds[cfg.layer_pattern[i % len(cfg.layer_pattern)]] for i in range(cfg.n_layers)],
        "local_attention": 2 * max(cfg.window - 1, 0),
        "rope_parameters": {kind: {"rope_theta": base, "rope_type": "default"} for kind, base in bases.items()},
        "mlp_dropout": cfg.dropout_residual,
    }


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
    constants={"positions": "rotary", "norm": "layer", "norm_position": "pre", "bias": False, "embed_norm": True}
    | {"first_norm": False, "activation": "geglu", "tie_embeddings": True, "next_sentence": False, "pooler": False},
    values={
        "vocab_size": ("vocab_size", None),
        "max_position_embeddings": ("context", 8192),
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
)

# ---- Llama ------------------------------------------------------------------------------------------------------------


def _scaling_read(theirs: Config) -> RotaryScaling:
    """rope_scaling, or rope_parameters as it is called since transformers 5."""
    given = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}
    kind = given.get("rope_type", given.get("type", "default"))
    known = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor"}
    known |= {"high_freq_factor", "beta_slow", "beta_fast", "attention_factor", "truncate"}
    if (
        kind not in ("default", "linear", "dynamic", "llama3", "yarn")
        or set(given) - known
        or not given.get("truncate", True)
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
    return found | ({"attention_factor": scaling.amplitude} if scaling.amplitude else {})


def _llama_read(theirs: Config) -> Config:
    old = (theirs.get("rope_parameters") or {}).get("rope_theta")
    return {
        "activation": _activation(theirs.get("hidden_act", "silu"), {"silu": "swiglu"}),
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
    constants={"positions": "rotary", "norm": "rms", "norm_position": "pre", "bias": False, "dropout_embed": 0.0}
    | {"dropout_residual": 0.0},
    values={
        "vocab_size": ("vocab_size", None),
        "max_position_embeddings": ("context", 2048),
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
        "hidden_act": _published_activation(cfg.activation, {"silu": "swiglu"}),
        "rope_theta": cfg.rotary_base,
        "rope_scaling": _scaling_write(cfg.rotary_scaling),
    },
    architecture=lambda cfg: "LlamaForCausalLM",
    prefix="model.",
    copies={"lm_head.weight": "model.embed_tokens.weight"},
    buffers=(".rotary_emb.inv_freq",),
)

FAMILIES = {family.name: family for family in (GPT2, BERT, ROBERTA, MODERNBERT, LLAMA)}


def family_of(theirs: Config) -> Family:
    """Raises InputError for a model_type that is not here."""
    name = theirs.get("model_type")
    if name not in FAMILIES:
        raise InputError(f"config.json is of the family {name!r}; there are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def family_for(cfg: TransformerConfig, ours: str) -> Family:
    """The published family that computes the function of a configuration of ours.

    Raises:
      InputError: none does; says for each in what it differs.
    """
    reasons = []
    for family in FAMILIES.values():
        if family.ours == ours:
            different = family.differences(cfg)
            if not different:
                return family
            reasons.append(f"  - {family.name} has " + ", ".join(different))
    raise InputError("no published family computes what this run does:\n" + "\n".join(reasons))
