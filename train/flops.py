"""Model FLOPs from the shapes, and what chips can do at most."""

from model.config import TransformerConfig

# Dense bfloat16 FLOP/s of one device, as jax.Device.device_kind names it. Sources: Google Cloud TPU system
# architecture pages; NVIDIA data sheets for A100, H100 and H200 SXM (without sparsity).
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def layer_multiplies(cfg: TransformerConfig) -> int:
    """Multiplications per token in one block's matrix products, attention scores aside."""
    cfg = cfg.resolved()
    attention = cfg.d_model * (cfg.d_head + cfg.d_value) * (cfg.n_heads + cfg.n_kv_heads)
    mlp = cfg.d_model * cfg.d_ff * (3 if cfg.gated else 2)
    return attention + mlp


def training_flops_per_token(cfg: TransformerConfig, *, causal: bool, predicted_share: float = 1.0) -> float:
    """FLOPs of forward and backward per token: 6 per multiplication (arXiv 2204.02311, appendix B).

    Attention counts the pairs that the mask lets through: half of them under a causal mask, and those within
    the window in local layers.

    Args:
      predicted_share: share of tokens that go through the vocabulary projection.
    """
    cfg = cfg.resolved()
    pairs = 0.0
    for layer in range(cfg.n_layers):
        window = cfg.layer_window(layer) or cfg.context
        reach = min(window, cfg.context)
        seen = reach - reach * reach / (2 * cfg.context) if causal else min(2 * reach, cfg.context)
        pairs += cfg.n_heads * (cfg.d_head + cfg.d_value) * seen
    head = predicted_share * cfg.vocab_size * cfg.d_model
    return 6 * (cfg.n_layers * layer_multiplies(cfg) + pairs + head)


def seq2seq_flops_per_token(cfg: TransformerConfig) -> float:
    """The same for an encoder-decoder, per token of source and target together, where rows have as many of each.

    The decoder has cross-attention besides: its projections, and every target token looks at all of the source.
    """
    cfg = cfg.resolved()
    attention = cfg.d_model * (cfg.d_head + cfg.d_value) * (cfg.n_heads + cfg.n_kv_heads)
    cross = attention + cfg.n_heads * (cfg.d_head + cfg.d_value) * cfg.context
    encoder = training_flops_per_token(cfg, causal=False, predicted_share=0.0)
    return (encoder + training_flops_per_token(cfg, causal=True) + 6 * cfg.n_layers * cross) / 2
