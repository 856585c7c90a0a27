"""A model trained with bothways, in PyTorch, for `transformers`: `AutoModelFor....from_pretrained(DIR, trust_remote_code=True)`.

This file lies beside the weights that `bothways export` writes, with modeling_bothways_layers.py, and needs nothing but
torch and transformers.
config.json says which function is computed: `family` (gpt, bert, seq2seq), `objective` and the fields of `model`.

A mask says which keys a query sees: causal (gpt), the first `prefix` tokens of a row both ways, blocks of `block_size` tokens
that see each other and all before them, or everything (bert). Padding, on either side, is seen by nobody.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel, modeling_outputs
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from .modeling_bothways_layers import Embedding, Norm, RelativeBias, alibi, rotate

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
CACHE = next(n for n in ("cache", "past_key_values") if hasattr(modeling_outputs.CausalLMOutputWithPast(), n))
"""What this version of transformers calls the cache in what a model gives back."""
NEG_INF = -1e30
"""The score of a row of the token table that stands for no token."""


class BothwaysConfig(PretrainedConfig):
    """`model` holds the fields of bothways' TransformerConfig; the names that `transformers` wants are made of them."""

    model_type = "bothways"

    def __init__(self, family="gpt", objective="causal", model=None, task=None, data=None, **others):
        self.family, self.objective, self.model, self.task, self.data = family, objective, model or {}, task, data
        names = {"hidden_size": "d_model", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
        names |= {"vocab_size": "vocab_size", "max_position_embeddings": "context_length"}
        others |= {theirs: self.model[ours] for theirs, ours in names.items() if ours in self.model}
        # An output layer tied to the embeddings reads their table; there is no second tensor for transformers to tie.
        super().__init__(**others | {"is_encoder_decoder": family == "seq2seq", "tie_word_embeddings": False})


class Attention(nn.Module):
    def __init__(self, m, layer):
        super().__init__()
        self.m, self.layer, biased = m, layer, m["bias"] and m["attention_bias"]
        widths = {"query": (m["n_heads"], m["d_head"]), "key": (m["n_kv_heads"], m["d_head"])}
        for name, (heads, width) in (widths | {"value": (m["n_kv_heads"], m["d_value"])}).items():
            setattr(self, name, nn.Linear(m["d_model"], heads * width, bias=biased or m["qkv_bias"]))
        self.out = nn.Linear(m["n_heads"] * m["d_value"], m["d_model"], bias=biased)
        self.normed = {"": (), "head": (1, 1), "all": (m["n_heads"], m["n_kv_heads"])}[
            (m["qk_norm"] and m["qk_norm_over"]) or ""
        ]
        if self.normed:
            self.query_norm, self.key_norm = (Norm(m, n * m["d_head"], rms=True) for n in self.normed)

    def heads(self, projection, x, n, norm=None):
        y = projection(x)
        y = norm(y) if norm is not None and self.m["qk_norm_over"] == "all" else y
        y = y.unflatten(-1, (n, -1)).transpose(1, 2)
        return norm(y) if norm is not None and self.m["qk_norm_over"] == "head" else y

    def forward(self, x, seen, positions, cache=None, memory=None, base=None, added=None):
        m = self.m
        q = self.heads(self.query, x, m["n_heads"], getattr(self, "query_norm", None))
        if memory is not None and cache is not None and cache.is_updated.get(self.layer):
            k, v = (getattr(cache.cross_attention_cache.layers[self.layer], name) for name in ("keys", "values"))
        else:
            source = x if memory is None else memory
            k = self.heads(self.key, source, m["n_kv_heads"], getattr(self, "key_norm", None))
            v = self.heads(self.value, source, m["n_kv_heads"])
            if m["position_embedding"] == "rotary" and memory is None and base:
                q, k = (rotate(y, positions, base, m["rotary_scaling"], m["rotary_width"]) for y in (q, k))
            if cache is not None and memory is not None:
                k, v = cache.cross_attention_cache.update(k, v, self.layer)
                cache.is_updated[self.layer] = True
            elif cache is not None:
                k, v = cache.update(k, v, self.layer)
        k, v = (y.repeat_interleave(m["n_heads"] // m["n_kv_heads"], dim=1) for y in (k, v))
        bias = torch.zeros(seen.shape, dtype=q.dtype, device=q.device)[:, None] if added is None else added.to(q.dtype)
        bias = bias.masked_fill(~seen[:, None], torch.finfo(q.dtype).min)
        dropped = m["dropout_attention"] if self.training else 0.0
        scale = (m["query_scale"] or m["d_head"]) ** -0.5
        if m["score_cap"]:
            scores = m["score_cap"] * (q @ k.transpose(2, 3) * scale / m["score_cap"]).tanh() + bias
            y = F.dropout(scores.softmax(-1, dtype=torch.float32).to(v.dtype), dropped) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropped, scale=scale)
        return self.out(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, m):
        super().__init__()
        self.activation, biased = ACTIVATIONS[m["activation"]], m["bias"] and m["mlp_bias"]
        self.up, self.down = (nn.Linear(m[a], m[b], bias=biased) for a, b in (("d_model", "d_ff"), ("d_ff", "d_model")))
        gated = m["activation"] in ("swiglu", "geglu", "geglu_tanh")
        self.gate = nn.Linear(m["d_model"], m["d_ff"], bias=biased) if gated else None

    def forward(self, x):
        return self.down(self.activation(self.up(x)) if self.gate is None else self.up(x) * self.activation(self.gate(x)))


class Block(nn.Module):
    def __init__(self, m, layer, cross):
        super().__init__()
        self.m, self.attention, self.mlp = m, Attention(m, layer), MLP(m)
        self.cross = Attention(m, layer) if cross else None
        self.at(layer)
        self.dropout = nn.Dropout(m["dropout_residual"])
        for name in ("attention", "mlp", *(["cross"] if cross else [])):
            first = name == "attention" and layer == 0 and not m["first_norm"]
            if m["norm_position"] != "out" and not (name == "mlp" and m["parallel"] == "one_norm"):
                setattr(self, f"{name}_norm", nn.Identity() if first else Norm(m, m["d_model"]))
            if m["norm_position"] in ("out", "both"):
                setattr(self, f"{name}_out_norm", Norm(m, m["d_model"]))

    def at(self, layer):
        """This block as layer number `layer`: its window, rotary base and cache; layers that share parameters are one block."""
        m, kind = self.m, self.m["layer_pattern"][layer % len(self.m["layer_pattern"])]
        self.window = m["window"] if kind == "local" else 0
        self.base = 0 if kind == "nope" else (kind == "local" and m["rotary_base_local"]) or m["rotary_base"]
        for attention in (self.attention, self.cross):
            if attention is not None:
                attention.layer = layer
        return self

    def residual(self, x, name, sublayer):
        at, y = self.m["norm_position"], x
        y = getattr(self, f"{name}_norm")(y) if at in ("pre", "both") else y
        y = sublayer(y)
        y = x + self.dropout(getattr(self, f"{name}_out_norm")(y) if at in ("out", "both") else y)
        return getattr(self, f"{name}_norm")(y) if at == "post" else y

    def forward(self, x, mask, positions, cache, memory, memory_seen, added=None):
        seen, past = mask(self.window), getattr(cache, "self_attention_cache", cache)
        beside = None
        if self.m["parallel"]:
            beside = self.mlp(self.mlp_norm(x) if self.m["parallel"] == "two_norms" else self.attention_norm(x))
        how = {"base": self.base, "added": added}
        x = self.residual(x, "attention", lambda y: self.attention(y, seen, positions, past, **how))
        if memory is not None:
            x = self.residual(x, "cross", lambda y: self.cross(y, memory_seen, positions, cache, memory))
        return self.residual(x, "mlp", self.mlp) if beside is None else x + self.dropout(beside)


class Transformer(nn.Module):
    """Tokens [B, T] to features [B, T, D]: embeddings, blocks, last norm."""

    main_input_name = "input_ids"

    def __init__(self, m, causal, cross=False, shared=None):
        super().__init__()
        self.m, self.causal = m, causal
        if shared is None:
            self.embed = Embedding(m)
        self.__dict__["embedding"] = self.embed if shared is None else shared  # no second name for shared weights
        self.layers = nn.ModuleList(Block(m, layer, cross) for layer in range(1 if m["share_layers"] else m["n_layers"]))
        self.final_norm = Norm(m, m["d_model"]) if m["norm_position"] != "post" else nn.Identity()
        self.scale = m["d_model"] ** -0.5 if m["output_scale"] and causal else 1.0
        self.relative = RelativeBias(m, not causal) if m["score_bias"] == "relative" else None

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, cache=None, prefix=None,
                block_size=None, both_ways=False, memory=None, memory_mask=None, **unused):  # fmt: skip
        past = cache.get_seq_length() if cache is not None else 0
        length = past + input_ids.shape[1]
        real = input_ids.new_ones(input_ids.shape[0], length) if attention_mask is None else attention_mask.long()
        keys = (real.cumsum(-1) - 1).clamp(min=0)
        positions = keys[:, past:]
        q, k = positions[:, :, None], keys[:, None, :]
        seen = (real[:, None, :] > 0).expand(-1, q.shape[1], -1)
        if block_size is not None:
            seen = seen & (k // block_size <= q // block_size)
        elif self.causal and not both_ways:
            seen = seen & ((k <= q) if prefix is None else (k <= q) | (k < prefix[:, None, None]))

        def mask(window):
            return seen & ((q - k).abs() < window) if window else seen

        if memory is not None:
            memory_mask = torch.ones_like(memory[..., 0]) if memory_mask is None else memory_mask
            memory_mask = (memory_mask > 0)[:, None, :].expand(-1, q.shape[1], -1)
        x = self.embedding(input_ids, positions, token_type_ids)
        added = None if self.relative is None else self.relative(positions, keys)
        added = alibi(self.m["n_heads"], positions, keys) if self.m["score_bias"] == "alibi" else added
        for layer in range(self.m["n_layers"]):
            block = self.layers[layer % len(self.layers)].at(layer)
            x = block(x, mask, positions, cache, memory, memory_mask, added)
        x = self.final_norm(x) * self.scale
        return modeling_outputs.BaseModelOutputWithPast(last_hidden_state=x, **{CACHE: cache})


class BothwaysPreTrainedModel(PreTrainedModel):
    config_class = BothwaysConfig
    base_model_prefix = "model"
    _no_split_modules = ["Block"]
    _supports_sdpa = True

    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Embedding | OutputLayer):
            if module.weight is not None:
                nn.init.normal_(module.weight, std=self.config.model["init_std"])
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)

    def get_input_embeddings(self):
        body = self.model if hasattr(self, "model") else self
        return (body.decoder if hasattr(body, "decoder") else body.encoder).embedding.table

    def get_output_embeddings(self):
        return getattr(self, "lm_head", None) if not self.config.model["tie_embeddings"] else None


class BothwaysModel(BothwaysPreTrainedModel):
    """The body: features, no head."""

    def __init__(self, config):
        super().__init__(config)
        m = config.model
        if config.family == "bert":
            self.encoder = Transformer(m, causal=False)
        elif config.family == "gpt":
            self.decoder = Transformer(m, causal=True)
        else:
            self.embed = Embedding(m)
            self.encoder = Transformer(m, causal=False, shared=self.embed)
            if m["shared_embeddings"] == "tokens":
                self.target_embed = Embedding(m, shared=self.embed.token)
            target = self.target_embed if m["shared_embeddings"] == "tokens" else self.embed
            self.decoder = Transformer(m, causal=True, cross=True, shared=target)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **inputs):
        body = self.encoder if self.config.family != "gpt" else self.decoder
        return body(input_ids, attention_mask, **inputs)


class OutputLayer(nn.Module):
    """What scores have of their own: a table, where it is not the token embeddings, and a bias."""

    def __init__(self, m, rows):
        super().__init__()
        self.weight = None if m["tie_embeddings"] else nn.Parameter(torch.empty(rows, m["embed_width"] or m["d_model"]))
        self.bias = nn.Parameter(torch.zeros(rows)) if m["output_bias"] else None


class OutputTransform(nn.Module):
    """What stands between features and output layer: dense, activation, norm; and BERT's bias of so many scores."""

    def __init__(self, m, rows):
        super().__init__()
        self.activation = ACTIVATIONS[m["activation"]]
        width = m["embed_width"] or m["d_model"]
        self.dense, self.norm = nn.Linear(m["d_model"], width, bias=m["bias"]), Norm(m, width)
        self.bias = nn.Parameter(torch.zeros(rows)) if rows else None

    def forward(self, x):
        return self.norm(self.activation(self.dense(x)))


class WithOutputLayer(BothwaysPreTrainedModel):
    """A body under scores of all tokens."""

    def __init__(self, config):
        super().__init__(config)
        self.model = BothwaysModel(config)
        m, table = config.model, self.get_input_embeddings()
        self.lm_head = OutputLayer(m, table.num_embeddings) if m["output_bias"] or not m["tie_embeddings"] else None
        masked = config.family == "bert"
        transformed = m["masked_transform" if masked else "output_transform"]
        self.mlm = OutputTransform(m, table.num_embeddings if masked else 0) if transformed else None

    def scores(self, features):
        m = self.config.model
        features = features if self.mlm is None else self.mlm(features)
        logits = F.linear(features, (self.get_input_embeddings() if m["tie_embeddings"] else self.lm_head).weight).float()
        logits = m["logit_cap"] * (logits / m["logit_cap"]).tanh() if m["logit_cap"] else logits
        for bias in (getattr(layer, "bias", None) for layer in (self.lm_head, self.mlm)):
            logits = logits if bias is None else logits + bias
        filling = torch.arange(logits.shape[-1], device=logits.device) >= self.config.vocab_size
        return logits.masked_fill(filling, NEG_INF) if self.config.vocab_size < logits.shape[-1] else logits

    def loss(self, logits, labels):
        return None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


class BothwaysForCausalLM(WithOutputLayer, GenerationMixin):
    """`prefix` [B]: so many first tokens of a row see each other both ways. `block_size`: the dial's mask, without a cache."""

    def __init__(self, config):
        super().__init__(config)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, cache=None, labels=None, use_cache=None, prefix=None,
                past_key_values=None, block_size=None, both_ways=False, **unused):  # fmt: skip
        cache = past_key_values if cache is None else cache
        cache = DynamicCache() if use_cache and cache is None else cache
        how = {"prefix": prefix, "block_size": block_size, "both_ways": both_ways}
        out = self.model(input_ids, attention_mask, cache=cache, **how)
        logits = self.scores(out.last_hidden_state)
        loss = self.loss(logits[:, :-1], labels[:, 1:]) if labels is not None else None
        return modeling_outputs.CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})


class Pooler(nn.Module):
    """tanh of a dense layer on the first token; two classes say whether the second text follows the first."""

    def __init__(self, m, classes=True):
        super().__init__()
        self.pooler = nn.Linear(m["d_model"], m["d_model"], bias=m["bias"])
        self.classes = nn.Linear(m["d_model"], 2, bias=m["bias"]) if classes and m["next_sentence"] else None

    def forward(self, features):
        return self.pooler(features[:, 0]).tanh()


class BothwaysForMaskedLM(WithOutputLayer):
    """logits[:, t] are of token t, which may be masked. A gpt is read both ways, or in blocks of `block_size`."""

    def __init__(self, config):
        super().__init__(config)
        m = config.model
        if config.family == "bert":
            self.nsp = Pooler(m) if m["next_sentence"] or m["pooler"] else None
        self.post_init()

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, labels=None, block_size=None, **unused):
        how = {"token_type_ids": token_type_ids, "block_size": block_size, "both_ways": True}
        features = self.model(input_ids, attention_mask, **how).last_hidden_state
        if self.config.family == "gpt" and self.config.model["predicts"] != "own":
            features = features.roll(1, dims=1)  # what predicts the next token stands one position before it
        logits = self.scores(features)
        return modeling_outputs.MaskedLMOutput(loss=self.loss(logits, labels), logits=logits)


class BothwaysForConditionalGeneration(WithOutputLayer, GenerationMixin):
    """The encoder reads the source both ways, the decoder writes the target after it."""

    def __init__(self, config):
        super().__init__(config)
        self.post_init()

    def get_encoder(self, *_, **__):
        return self.model.encoder

    def forward(self, input_ids=None, attention_mask=None, decoder_input_ids=None, decoder_attention_mask=None,
                encoder_outputs=None, cache=None, past_key_values=None, labels=None, use_cache=None, **unused):  # fmt: skip
        encoder_outputs = encoder_outputs or self.model.encoder(input_ids, attention_mask)
        cache = past_key_values if cache is None else cache
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if use_cache and cache is None else cache
        if decoder_input_ids is None:  # a target begins with the token that the decoder starts with
            shifted = labels.masked_fill(labels == -100, self.config.pad_token_id)[:, :-1]
            decoder_input_ids = F.pad(shifted, (1, 0), value=self.config.decoder_start_token_id)
        seen = {"memory": encoder_outputs[0], "memory_mask": attention_mask}
        out = self.model.decoder(decoder_input_ids, decoder_attention_mask, cache=cache, **seen)
        logits = self.scores(out.last_hidden_state)
        given = {"encoder_last_hidden_state": encoder_outputs[0], CACHE: cache}
        return modeling_outputs.Seq2SeqLMOutput(loss=self.loss(logits, labels), logits=logits, **given)
