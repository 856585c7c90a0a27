"""Small parts of bothways models in PyTorch, beside modeling_bothways.py: norm, positions, embeddings."""

import math

import torch
from torch import nn


class Norm(nn.Module):
    """Layer norm or RMS norm, computed in float32."""

    def __init__(self, m, width, rms=None):
        super().__init__()
        self.rms, self.eps = m["norm"] == "rms" if rms is None else rms, m["norm_eps"]
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if m["bias"] and not self.rms else None

    def forward(self, x):
        y = x.float()
        y = y if self.rms else y - y.mean(-1, keepdim=True)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps) * self.weight.float()
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)


def rotary_frequencies(width, base, scaling):
    """Angle per position of each of the width/2 pairs; and what queries and keys are multiplied by."""
    pairs = torch.arange(width // 2, dtype=torch.float64)
    plain = base ** (-pairs / (width // 2))
    kind, context, high, low = (scaling[k] for k in ("kind", "original_context", "high", "low"))
    kept, factor = {"none": 1.0, "linear": 0.0}.get(kind), 1.0
    if kind == "llama3":
        turns = context * plain / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    elif kind == "yarn":
        first, last = (width // 2 * math.log(context / (2 * math.pi * t)) / math.log(base) for t in (high, low))
        first, last = max(math.floor(first), 0), min(math.ceil(last), width - 1)
        kept = 1 - ((pairs - first) / max(last - first, 1e-3)).clamp(0, 1)
        factor = scaling["attention_factor"] or 0.1 * math.log(scaling["factor"]) + 1
    return (kept * plain + (1 - kept) * plain / scaling["factor"]).float(), factor


def rotate(x, positions, base, scaling, width=0):
    """Rotary positions on x [B, H, T, K]; feature k is paired with feature k + K/2. Of `width` features only, where not 0."""
    if width and width < x.shape[-1]:
        return torch.cat([rotate(x[..., :width], positions, base, scaling), x[..., width:]], dim=-1)
    frequency, factor = rotary_frequencies(x.shape[-1], base, scaling)
    angle = positions[:, None, :, None].float() * frequency.to(x.device)
    cos, sin = factor * angle.cos(), factor * angle.sin()
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def sinusoid(positions, width, kind):
    """Waves on positions [B, T]: sines and cosines in turn, or (halves, t2t) all sines and then all cosines."""
    half = width // 2
    steps = max(half - 1, 1) if kind == "sinusoidal_t2t" else half
    frequency = (10_000.0 ** (-torch.arange(half, dtype=torch.float64) / steps)).float().to(positions.device)
    angle = positions[..., None].float() * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1 if kind == "sinusoidal" else -2).flatten(-2)


class RelativeBias(nn.Embedding):
    """T5's numbers for each bucket of distances and head."""

    def __init__(self, m, both_ways):
        super().__init__(m["relative_buckets"], m["n_heads"])
        self.distance, self.both_ways = m["relative_distance"], both_ways

    def forward(self, q, k):
        """[B, H, T, S] of positions [B, T] and [B, S]."""
        away = k[:, None, :] - q[:, :, None]
        count = self.num_embeddings // 2 if self.both_ways else self.num_embeddings
        first = (away > 0).long() * count if self.both_ways else 0
        apart = away.abs() if self.both_ways else (-away).clamp(min=0)
        exact = count // 2
        far = (apart.clamp(min=1).float() / exact).log() * ((count - exact) / math.log(self.distance / exact))
        far = (exact + far.long()).clamp(max=count - 1)
        return super().forward(first + torch.where(apart < exact, apart, far)).permute(0, 3, 1, 2)


def alibi(heads, q, k):
    """ALiBi: a slope for each head times the distance, taken from the scores [B, H, T, S]."""
    n = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8 * i / n) for i in range(1, n + 1)] + [2.0 ** (-4 * i / n) for i in range(1, 2 * (heads - n), 2)]
    away = (k[:, None, :] - q[:, :, None]).abs()[:, None].float()
    return -torch.tensor(slopes, device=q.device)[:, None, None] * away


class Embedding(nn.Module):
    def __init__(self, m, shared=None):
        super().__init__()
        self.m, width = m, m["embed_width"] or m["d_model"]
        filled_up = -(-m["vocab_size"] // m["pad_vocab_to_multiple_of"]) * m["pad_vocab_to_multiple_of"]
        if shared is None:
            self.token = nn.Embedding(filled_up, width)
        self.__dict__["table"] = self.token if shared is None else shared  # no second name for shared weights
        self.position = nn.Embedding(m["context_length"], width) if m["position_embedding"] == "learned" else None
        self.segment = nn.Embedding(m["segment_types"], width) if m["segment_types"] else None
        self.norm = Norm(m, width) if m["embed_norm"] else nn.Identity()
        self.widen = nn.Linear(width, m["d_model"], bias=m["bias"]) if m["embed_width"] else nn.Identity()
        self.dropout = nn.Dropout(m["dropout_embed"])

    def forward(self, tokens, positions, types=None):
        x = self.table(tokens) * (self.table.embedding_dim**0.5 if self.m["embed_scale"] else 1.0)
        if self.position is not None:
            x = x + self.position(positions.clamp(max=self.m["context_length"] - 1))
        elif self.m["position_embedding"].startswith("sinusoidal"):
            first = positions + self.m["first_position"]
            x = x + sinusoid(first, x.shape[-1], self.m["position_embedding"]).to(x.dtype)
        if self.segment is not None:
            x = x + self.segment(torch.zeros_like(tokens) if types is None else types)
        return self.widen(self.dropout(self.norm(x)))
