"""TransformerConfig: which function the stack computes, and how it is compiled and run."""

import dataclasses
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
    """How rotary positions are stretched to a context longer than the one a model was first trained with."""

    kind: Literal["none", "linear", "llama3", "yarn"] = "none"
    """linear: all angles are divided by `factor`. llama3, yarn (arXiv 2309.00071, section 3.2): only those of slowly
    rotating pairs."""
    factor: float = 1.0
    original_context: int = 0
    low: float = 1.0
    """A pair with fewer rotations than this within the original context is stretched (llama3, yarn)."""
    high: float = 4.0
    """A pair with more rotations than this is left as it is; in between, a mix of both."""
    attention_factor: float = 0.0
    """yarn's factor on queries and keys. 0: 0.1 ln(factor) + 1 (arXiv 2309.00071, section 3.4)."""

    def problems(self) -> list[str]:
        """What is wrong with it; empty if nothing is."""
        where, ramp = "model.rotary_scaling", self.kind in ("llama3", "yarn")
        found = []
        if self.factor < 1 or self.attention_factor < 0:
            found.append(
                f"{where}.factor={self.factor} must be at least 1, and attention_factor={self.attention_factor} not negative"
            )
        if ramp and (self.original_context < 1 or not 0 < self.low < self.high):
            found.append(
                f"{where}: {self.kind} wants original_context={self.original_context} above 0, "
                f"and 0 < low={self.low} < high={self.high}"
            )
        return found


Target = Literal["query", "key", "value", "out", "gate", "up", "down"]


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters on the projections of every block (arXiv 2106.09685); the weights of train.init_from are
    frozen."""

    rank: int = 0
    """r, the width between A and B. 0: no adapters; the whole model is trained."""
    alpha: float = 16.0
    """The output of an adapter is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Dropout on an adapter's input."""
    targets: tuple[Target, ...] = ("query", "key", "value", "out", "gate", "up", "down")
    """Projections that get an adapter; those that a model does not have are skipped."""
    frozen: Literal["float32", "bfloat16"] = "float32"
    """Type of the frozen kernels and tables while adapters are trained."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def problems(self, gated: bool) -> list[str]:
        """What is wrong with it; empty if nothing is."""
        found = []
        if self.rank < 0:
            found.append(f"model.lora.rank is {self.rank}; it must be 0 (no adapters) or more")
        if not 0 < self.alpha < float("inf"):
            found.append(f"model.lora.alpha is {self.alpha}; it must be positive")
        if not 0 <= self.dropout < 1:
            found.append(f"model.lora.dropout is {self.dropout}; it must be in [0, 1)")
        if not set(self.targets) - (set() if gated else {"gate"}):
            found.append(f"model.lora.targets is {self.targets}: this model has none of these projections")
        return found


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Everything that decides the function a model computes. Zero means: derived, see `resolved`.

    GPT, BERT and the encoder-decoder share it; the families differ in the mask that their module builds and the
    heads that it adds, not in a field here.
    """

    vocab_size: int = 0
    """V. 0: the size of the tokenizer's vocabulary."""
    pad_vocab_to_multiple_of: int = 1
    """The rows of token tables are padded to a multiple of this, so that they divide among devices. A padding row
    stands for no token: its logit is -1e30. It is included in the number of parameters."""
    context_length: int = 1024
    """Longest row of tokens, and the number of learned positions."""
    n_layers: int = 12
    d_model: int = 768
    n_heads: int = 12
    n_kv_heads: int = 0
    """G, heads of keys and values (grouped queries, arXiv 2305.13245). 0: as many as n_heads."""
    d_head: int = 0
    """K, the width of one head. 0: d_model / n_heads."""
    d_value: int = 0
    """W, the width of one head's values. 0: d_head."""
    d_ff: int = 0
    """F, the width inside the MLP. 0: 4 d_model."""

    position_embedding: Literal["learned", "sinusoidal", "sinusoidal_halves", "sinusoidal_t2t", "rotary", "none"] = (
        "learned"
    )
    """sinusoidal: alternating sines and cosines (arXiv 1706.03762, section 3.5); halves: all sines, then all cosines
    (Marian); t2t: as halves, the slowest wave exactly 10,000 times as long as the fastest (tensor2tensor; M2M-100)."""
    score_bias: Literal["", "relative", "alibi"] = ""
    """Position bias of the attention scores. relative: a number for each head and bucket of distances, shared by all
    layers (T5, arXiv 1910.10683, section 2.1); alibi: minus a slope for each head times the distance (arXiv
    2108.12409)."""
    first_position: int = 0
    """Index of the first position in sinusoidal embeddings; M2M-100 begins at 2."""
    relative_buckets: int = 32
    """Number of distance buckets; where attention is bidirectional, half of them for each side."""
    relative_distance: int = 128
    """Distances from this on share the last bucket."""
    rotary_base: float = 10_000.0
    rotary_width: int = 0
    """How many features of a head are rotated: the first ones (GPT-NeoX). 0: all."""
    rotary_base_local: float = 0.0
    """Rotary base in local layers. 0: rotary_base."""
    rotary_scaling: RotaryScaling = RotaryScaling()
    norm: Literal["layer", "rms"] = "layer"
    norm_position: Literal["pre", "post", "out", "both"] = "pre"
    """Where a sub-layer f has its norm. pre: x + f(norm(x)); post: norm(x + f(x)); out, on its output: x + norm(f(x))
    (OLMo 2, arXiv 2501.00656, section 2.1); both, before it and on its output (Gemma 2, arXiv 2408.00118)."""
    parallel: Literal["", "one_norm", "two_norms"] = ""
    """MLP and attention both read the block's input, x + attention(norm(x)) + mlp(norm(x)), through one norm (GPT-J, Phi) or
    one each (GPT-NeoX, arXiv 2204.06745, section 2.1)."""
    norm_eps: float = 1e-5
    activation: Literal["gelu", "gelu_tanh", "relu", "relu2", "silu", "swiglu", "geglu", "geglu_tanh"] = "gelu_tanh"
    bias: bool = True
    """Biases in every projection and in layer norm."""
    qkv_bias: bool = False
    """Biases of queries, keys and values where `bias` (Qwen 2) or `attention_bias` (StableLM) is False."""
    attention_bias: bool = True
    """False: no biases in attention where `bias` is True (GPT-J)."""
    mlp_bias: bool = True
    """False: no biases in the MLP where `bias` is True (Falcon, Nomic BERT)."""
    qk_norm: bool = False
    """RMS norm of queries and keys (arXiv 2302.05442, section 2)."""
    qk_norm_over: Literal["head", "all"] = "head"
    """Width of that norm: each head's width, or all heads together (OLMo 2)."""
    query_scale: float = 0.0
    """Attention scores are divided by the square root of this (Gemma). 0: of the head width."""
    score_cap: float = 0.0
    """Soft cap c of attention scores: c tanh(score / c), before masks and biases (Gemma 2, arXiv 2408.00118, section 2).
    0: none."""
    predicts: Literal["", "next", "own"] = ""
    """Which token an output predicts: `next`, the one after its position (GPT; Dream, arXiv 2508.15487), or `own`, the
    one at its position (BERT; LLaDA, arXiv 2502.09992). Empty: as the family does."""
    window: int = 0
    """Reach of local attention: a query attends to keys fewer than `window` positions away. 0: no local layers."""
    share_layers: bool = False
    """All n_layers layers share the parameters of one (ALBERT, arXiv 1909.11942, section 3.1)."""
    layer_pattern: tuple[Literal["global", "local", "nope"], ...] = ("global",)
    """Repeated over the layers: GPT-3 alternates ("global", "local"). nope: a global layer without rotary positions (arXiv
    2501.18795; SmolLM 3)."""

    segment_types: int = 0
    """Number of segment types, each with its own embedding; BERT has 2."""
    first_norm: bool = True
    """A norm before the first block's attention. ModernBERT has none there: the embeddings are already normalised."""
    embed_width: int = 0
    """E, the width of embeddings and their norm; a dense layer maps E to D, and the masked-token head D to E (ALBERT,
    arXiv 1909.11942, section 3.1; encoders only). 0: D."""
    embed_norm: bool = False
    """A norm right after the embeddings, as in BERT."""
    embed_scale: bool = False
    """Multiply token embeddings by sqrt(D) (arXiv 1706.03762, section 3.4)."""
    shared_embeddings: Literal["all", "tokens"] = "all"
    """What the two sides of an encoder-decoder share: token table, positions and norm, or the token table only (BART)."""
    tie_embeddings: bool = True
    output_scale: bool = False
    """A decoder's features are multiplied by 1/sqrt(D) before the output layer (T5, where that layer is tied)."""
    output_bias: bool = False
    """A bias for every token's logit (decoders; GPT-J, Marian)."""
    output_transform: bool = False
    """A dense layer, activation and norm between a decoder's features and its output layer, as in `masked_transform`
    (ModernBERT's decoder, arXiv 2507.11412)."""
    logit_cap: float = 0.0
    """Soft cap c of every token's logit: c tanh(logit / c), before a bias (Gemma 2, arXiv 2408.00118, section 2). 0:
    none."""
    masked_head: bool = True
    """BERT's masked-token head (encoders only). False: a body that embeds texts and can be fine-tuned."""
    masked_transform: bool = True
    """Dense layer, activation, norm and logit bias of the masked-token head. False: its output layer reads the features
    directly (EuroBERT, arXiv 2503.05500)."""
    next_sentence: bool = False
    """BERT's pooler and next-sentence head (encoders only)."""
    pooler: bool = False
    """The pooler without the next-sentence head (encoders only)."""

    dropout_embed: float = 0.0
    """Dropout on the sum of token and position embeddings."""
    dropout_attention: float = 0.0
    """Dropout on attention probabilities."""
    dropout_residual: float = 0.0
    """Dropout on each sub-layer's output before it joins the residual stream."""

    init: Literal["normal", "fan_in", "xavier"] = "normal"
    """Kernels: normal with init_std, with 1/sqrt(fan in), or with sqrt(2 / (fan in + fan out)) (Glorot, Bengio 2010).
    Embeddings always use init_std."""
    init_std: float = 0.02
    init_residual: Literal["same", "depth", "zero"] = "depth"
    """Projections that write to the residual stream. same: as the others; depth: times 1/sqrt(2L) (GPT-2); zero: 0."""

    lora: LoRAConfig = LoRAConfig()

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of activations. auto: bfloat16 on GPU and TPU, and in training steps on a CPU with AVX512-BF16; else float32. Parameters are
    always float32."""
    attention: Literal["auto", "xla", "short", "splash", "cudnn"] = "auto"
    """The kernel for masks and shapes that it supports; XLA computes the rest. auto: short, else splash on TPU, cudnn on
    GPU."""
    scan_layers: bool = False
    """Compile one block and loop over it, instead of L blocks. Same parameters, same result."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes. none: nothing; dots: all but matrix products; full: all inside a block."""

    def resolved(self) -> "TransformerConfig":
        """The same function with every derived size filled in."""
        d_head = self.d_head or self.d_model // max(self.n_heads, 1)
        return dataclasses.replace(
            self,
            n_kv_heads=self.n_kv_heads or self.n_heads,
            d_head=d_head,
            d_value=self.d_value or d_head,
            d_ff=self.d_ff or 4 * self.d_model,
        )

    @property
    def compute_dtype(self) -> "jnp.dtype":
        import jax  # not with the module: reading recipes and parsing the command line must not wait for it
        import jax.numpy as jnp

        if self.dtype == "auto":
            return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
        return jnp.dtype(self.dtype)

    @property
    def table_rows(self) -> int:
        """V, padded."""
        return -(-self.vocab_size // self.pad_vocab_to_multiple_of) * self.pad_vocab_to_multiple_of

    @property
    def narrow(self) -> int:
        """Width of the embeddings: E, or D."""
        return self.embed_width or self.d_model

    @property
    def pooled(self) -> bool:
        """Whether there is a pooler."""
        return self.next_sentence or self.pooler

    @property
    def gated(self) -> bool:
        return self.activation in ("swiglu", "geglu", "geglu_tanh")

    @property
    def norm_before(self) -> bool:
        """Whether a sub-layer reads the output of a norm; then the stack ends in a norm."""
        return self.norm_position in ("pre", "both")

    @property
    def norm_out(self) -> bool:
        """Whether a sub-layer's output goes through a norm before it is added."""
        return self.norm_position in ("out", "both")

    def layer_window(self, layer: int) -> int:
        """The window of one layer; 0 if its attention is global."""
        return self.window if self.layer_pattern[layer % len(self.layer_pattern)] == "local" else 0

    def layer_rotary_base(self, layer: int) -> float:
        """The rotary base of one layer; 0 if it has no rotary positions."""
        if self.layer_pattern[layer % len(self.layer_pattern)] == "nope":
            return 0.0
        return (self.layer_window(layer) and self.rotary_base_local) or self.rotary_base

    def problems(self) -> list[str]:
        """What is wrong with this configuration, each with its numbers; empty if nothing is."""
        found = []

        def want(ok: bool, message: str) -> None:
            if not ok:
                found.append(message)

        want(self.context_length != 1, "model.context_length is 1; a token needs another to predict or be predicted from")
        for name in ("context_length", "n_layers", "d_model", "n_heads", "pad_vocab_to_multiple_of"):
            want(getattr(self, name) > 0, f"model.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("vocab_size", "n_kv_heads", "d_head", "d_value", "d_ff", "window", "segment_types", "embed_width"):
            want(getattr(self, name) >= 0, f"model.{name} is {getattr(self, name)}; it cannot be negative")
        for name in ("dropout_embed", "dropout_attention", "dropout_residual"):
            want(0 <= getattr(self, name) < 1, f"model.{name} is {getattr(self, name)}; it must be in [0, 1)")
        if found:
            return found
        full = self.resolved()
        want(
            self.d_head > 0 or self.d_model % self.n_heads == 0,
            f"model.d_model={self.d_model} is not divisible by model.n_heads={self.n_heads}; "
            "choose a multiple, or set model.d_head",
        )
        want(
            self.n_heads % full.n_kv_heads == 0,
            f"model.n_heads={self.n_heads} is not divisible by model.n_kv_heads={full.n_kv_heads}",
        )
        want(
            self.position_embedding != "rotary" or full.d_head % 2 == 0,
            f"rotary positions turn pairs of features: the head width must be even, not {full.d_head}",
        )
        want(
            not self.position_embedding.startswith("sinusoidal") or self.narrow % 2 == 0,
            f"sinusoidal positions pair sine and cosine: model.{'embed_width' if self.embed_width else 'd_model'} must be even, "
            f"not {self.narrow}",
        )
        want(
            not self.score_bias or self.attention in ("auto", "xla"),
            f"model.attention={self.attention} does not know model.score_bias={self.score_bias}: set --model.attention xla",
        )
        for name in ("score_cap", "logit_cap", "query_scale"):
            want(getattr(self, name) >= 0, f"model.{name} is {getattr(self, name)}; it cannot be negative")
        want(
            not self.score_cap or self.attention in ("auto", "xla", "splash"),
            f"model.attention={self.attention} does not know model.score_cap={self.score_cap}: set --model.attention auto",
        )
        want(self.rotary_base > 0, f"model.rotary_base is {self.rotary_base}; it must be positive")
        want(self.rotary_base_local >= 0, f"model.rotary_base_local is {self.rotary_base_local}; it cannot be negative")
        want(len(self.layer_pattern) > 0, "model.layer_pattern is empty; give at least 'global'")
        want(
            ("local" in self.layer_pattern) == (self.window > 0),
            f"model.window={self.window} and model.layer_pattern={self.layer_pattern} disagree: "
            "local layers need a window, and a window needs local layers",
        )
        found.extend(self.rotary_scaling.problems())
        found.extend(self.lora.problems(self.gated))
        want(
            self.first_norm or self.norm_before,
            f"model.first_norm=False leaves out the norm before the first block, and norm_position={self.norm_position} has "
            "none there",
        )
        want(
            not self.parallel or self.norm_position == "pre",
            f"model.parallel={self.parallel} wants norm_position=pre, not {self.norm_position}",
        )
        want(
            not (self.parallel and not self.first_norm),
            f"model.first_norm=False and model.parallel={self.parallel} do not go together",
        )
        want(
            self.first_norm or not self.share_layers,
            "model.first_norm=False leaves out a norm of the first block only, and model.share_layers makes all blocks one",
        )
        want(
            self.rotary_width % 2 == 0 and 0 <= self.rotary_width <= full.d_head,
            f"model.rotary_width={self.rotary_width} must be even, and at most the head width {full.d_head}",
        )
        want(
            self.masked_transform or not self.embed_width,
            f"model.masked_transform=False leaves nothing that makes model.embed_width={self.embed_width} of the features",
        )
        want(
            "nope" not in self.layer_pattern or self.position_embedding == "rotary",
            f"model.layer_pattern has nope, a layer without rotary positions, and positions are {self.position_embedding}",
        )
        want(
            self.first_position >= 0 and (not self.first_position or self.position_embedding.startswith("sinusoidal")),
            f"model.first_position={self.first_position} is for sinusoidal positions, and cannot be negative; positions are "
            f"{self.position_embedding}",
        )
        want(
            self.score_bias != "relative" or 4 <= self.relative_buckets < 2 * self.relative_distance,
            f"model.relative_buckets={self.relative_buckets} must be at least 4, and half of them fewer than "
            f"model.relative_distance={self.relative_distance}",
        )
        want(self.init_std > 0, f"model.init_std is {self.init_std}; it must be positive")
        want(self.norm_eps > 0, f"model.norm_eps is {self.norm_eps}; it must be positive")
        return found
