"""The reference of benchmarks.chars: characters in plain PyTorch at the setting that nanoGPT's README gives for a CPU.

    python -m benchmarks.chars_reference TRAIN.txt HELD.txt

4 layers, 128 wide, 4 heads, context 64, batch 12, no dropout, no biases, learned positions, GELU, tied embeddings; AdamW
(0.9, 0.99), weight decay 0.1 on matrices, gradients clipped at 1, 1e-3 after 100 steps of warm-up, down a cosine to
1e-4 at step 2,000. Prints one JSON object; seconds are those of the steps, without imports and evaluation.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

LAYERS, WIDTH, HEADS, CONTEXT, BATCH, STEPS, WARM, HIGH, LOW = 4, 128, 4, 64, 12, 2000, 100, 1e-3, 1e-4


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.before_attention, self.before_mlp = (nn.LayerNorm(WIDTH, bias=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(self.before_attention(x)).view(B, T, 3, HEADS, D // HEADS).permute(2, 0, 3, 1, 4)
        said = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(said.transpose(1, 2).reshape(B, T, D))
        return x + self.down(F.gelu(self.up(self.before_mlp(x))))


class Model(nn.Module):
    def __init__(self, vocabulary: int):
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks, self.norm = nn.Sequential(*(Block() for _ in range(LAYERS))), nn.LayerNorm(WIDTH, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * LAYERS) if residual else 0.02)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        logits = self.norm(self.blocks(x)) @ self.token.weight.T
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def rate(step: int) -> float:
    if step < WARM:
        return HIGH * (step + 1) / WARM
    return LOW + (HIGH - LOW) * (1 + math.cos(math.pi * (step - WARM) / (STEPS - WARM))) / 2


def train(text: str, held: str, steps: int = STEPS, seed: int = 0) -> dict:
    torch.manual_seed(seed)
    known = {c: i for i, c in enumerate(sorted(set(text + held)))}
    data, held_data = (torch.tensor([known[c] for c in t]) for t in (text, held))
    model = Model(len(known))
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=HIGH, betas=(0.9, 0.99), fused=True)

    @torch.no_grad()
    def held_out() -> float:
        """Nats per character; each but the first is predicted once, in windows side by side."""
        nats = 0.0
        whole = (len(held_data) - 1) // CONTEXT * CONTEXT
        tokens, targets = held_data[:whole].view(-1, CONTEXT), held_data[1 : whole + 1].view(-1, CONTEXT)
        for x, y in zip(tokens.split(512), targets.split(512), strict=True):
            nats += model(x, y).item() * y.numel()
        return nats / whole

    seconds, began = [], time.perf_counter()
    for step in range(steps):
        begins = torch.randint(len(data) - CONTEXT, (BATCH,))
        x = torch.stack([data[i : i + CONTEXT] for i in begins])
        y = torch.stack([data[i + 1 : i + 1 + CONTEXT] for i in begins])
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        loss = model(x, y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    parameters = sum(p.numel() for p in model.parameters())
    return {"loss": held_out(), "seconds": seconds[-1], "steps": steps, "parameters": parameters}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("held", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS, help="fewer only show that it runs")
    args = parser.parse_args()
    print(json.dumps(train(args.train.read_text(), args.held.read_text(), args.steps)))


if __name__ == "__main__":
    main()
