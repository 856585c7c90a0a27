"""The rows that need a GPU: model FLOP utilisation of training, generation against the memory's speed, PLL.

python -m benchmarks.gpu SIDE [--tiny] prints a JSON line per figure; benchmarks/gpu.sh runs all sides. Each side is a
process of its own, since JAX and PyTorch do not share a GPU's memory. `--tiny` runs everything at no size, on any device.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import versions
from bothways.chips import PEAK_FLOPS

BANDWIDTH_BYTES = 2**32


def tell(**figure: Any) -> None:
    print(json.dumps(figure), flush=True)


def seconds_each(run: Callable[[], Any], times: int) -> float:
    """Median seconds of a call that waits for its result, after one that compiles."""
    run()
    found = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def tell_training(side: str, model: str, device: str, flops: float, rows: int, length: int, seconds: float) -> None:
    """`flops` per token, counted alike on every side: train/flops.py, causal attention counted half."""
    speed, most = rows * length / seconds, PEAK_FLOPS.get(device)
    mfu = speed * flops / most if most else None
    shape = {"rows": rows, "length": length}
    tell(what=f"{model} training", side=side, device=device, tokens_per_second=speed, mfu=mfu, **shape)


# ---- ours -------------------------------------------------------------------------------------------------------------


def train_ours(name: str, shapes: Iterable[tuple[int, int]], tiny: bool, steps: int = 10) -> None:
    """Steps of `bothways train`, for every (rows, length); one that does not fit into memory is reported as such.

    Without dropout of attention probabilities, which no kernel knows.
    """
    import jax

    from benchmarks import models, training
    from bothways.flops import recipe_flops_per_token
    from bothways.registry import make_module, tiny_inputs

    base = models.TINY[name] if tiny else models.FULL[name]
    for rows, length in shapes:
        # 50,304 rows of the table, as nanoGPT has them: a multiple of 128 divides well among tensor cores.
        cfg = dataclasses.replace(base.model, context_length=length, pad_vocab_to_multiple_of=128, dropout_attention=0.0)
        recipe = dataclasses.replace(base, model=cfg)
        batches = [(training.gpt_batch if recipe.family == "gpt" else training.bert_batch)(recipe, rows, length, 0)]
        module = make_module(recipe.family, cfg)
        init = jax.jit(lambda m=module, f=recipe.family: m.init(jax.random.key(0), **tiny_inputs(f))["params"])
        device = jax.devices()[0].device_kind
        try:
            take, _ = training.ours(recipe, init(), batches)
            seconds = seconds_each(functools.partial(take, steps), 3) / steps
        except jax.errors.JaxRuntimeError as e:
            tell(what=f"{name} training", side="bothways", rows=rows, length=length, failed=str(e).split("\n")[0][:200])
            continue
        flops = recipe_flops_per_token(recipe)
        tell_training("bothways", name, device, flops, rows, length, seconds)


def generate_ours(tiny: bool) -> None:
    """GPT-2 XL with random weights: new tokens per second, and the share of the time that reading the weights takes."""
    import jax
    import jax.numpy as jnp

    from benchmarks import models
    from benchmarks.generation import bytes_per_token, reading
    from bothways.model.cache import Cache
    from bothways.model.stack import unstack_layers
    from bothways.registry import make_module, tiny_inputs
    from bothways.rundir import compute_dtype_shapes
    from bothways.sample.decode import Decoder, Row
    from bothways.sample.sampling_params import SamplingParams

    recipe = models.TINY["gpt2"] if tiny else models.gpt(48, 1600, 25, 50_257, 1024)
    prompt, new = (8, 8) if tiny else (64, 128)
    cfg = recipe.model
    module = make_module("gpt", cfg)

    @jax.jit
    def init() -> Any:
        params = module.init(jax.random.key(0), **tiny_inputs("gpt"))["params"]
        narrow = jax.tree.map(lambda x, s: x.astype(s.dtype), params, compute_dtype_shapes(params, cfg))
        return unstack_layers(narrow, join=True)

    params = init()
    decoder = Decoder(
        lambda p, tokens, cache: module.apply({"params": p}, tokens, cache=cache),
        lambda p, features: module.apply({"params": p}, features, method="logits"),
        lambda p, batch, size, source: Cache.empty(cfg, batch, size),
        cfg.context_length,
        eos=-1,
    )
    size, times = bytes_per_token(params), 20
    much = 2**20 if tiny else BANDWIDTH_BYTES
    bandwidth = much * times / seconds_each(reading(much, times), 3)
    for batch in (1, 2) if tiny else (1, 64):
        prompts = models.random_tokens(recipe, batch, prompt)

        def run(prompts: np.ndarray = prompts) -> None:
            rows = [Row(ids, jax.random.key(0)) for ids in prompts.tolist()]
            decoder.generate(params, rows, SamplingParams.make(greedy=True), new)

        seconds = seconds_each(run, 3)
        share = new * size / bandwidth / seconds
        found = {"tokens_per_second": batch * new / seconds, "bandwidth": bandwidth, "share_of_bandwidth": share}
        tell(what="GPT-2 XL generation", side="bothways", device=jax.devices()[0].device_kind, batch=batch, **found)
    assert all(leaf.dtype in (jnp.float32, cfg.compute_dtype) for leaf in jax.tree.leaves(params))


def score_ours(tiny: bool) -> None:
    """PLL of 64 sentences by BERT-base: all copies in full batches, and a copy at a time through the same function."""
    import jax

    import bothways
    from benchmarks import models, scoring
    from benchmarks.harness import Setting

    with tempfile.TemporaryDirectory() as home:
        run = bothways.load(models.model_of(Setting(Path(home), tiny), "bert-base")[1])
        sentences = scoring.sentences(len(run.tokenizer), *((3, 9) if tiny else (64, 30)))
        batched = seconds_each(lambda: run.score_tokens(sentences, "pll"), 3)
        single = seconds_each(lambda: scoring.one_copy_at_a_time(run, sentences), 1)
    found = {"sentences_per_second": len(sentences) / batched, "times_one_at_a_time": single / batched}
    tell(what="BERT-base PLL", side="bothways", device=jax.devices()[0].device_kind, **found)


# ---- PyTorch ----------------------------------------------------------------------------------------------------------


def train_torch(shapes: Iterable[tuple[int, int]], tiny: bool, steps: int = 10) -> None:
    """A GPT-2 as nanoGPT trains it: bfloat16 autocast, torch.compile, flash attention, fused AdamW."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    from benchmarks import models
    from bothways.flops import training_flops_per_token

    base = (models.TINY if tiny else models.FULL)["gpt2"].model
    where = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    table_rows = -(-base.vocab_size // 128) * 128

    class Block(nn.Module):
        def __init__(self, width: int, heads: int):
            super().__init__()
            self.heads, self.norms = heads, nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            B, T, D = x.shape
            q, k, v = self.qkv(self.norms[0](x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(B, T, D))
            return x + self.down(F.gelu(self.up(self.norms[1](x)), approximate="tanh"))

    class Model(nn.Module):
        def __init__(self, length: int):
            super().__init__()
            self.token, self.position = nn.Embedding(table_rows, base.d_model), nn.Embedding(length, base.d_model)
            self.blocks = nn.ModuleList(Block(base.d_model, base.n_heads) for _ in range(base.n_layers))
            self.norm = nn.LayerNorm(base.d_model)

        def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            x = self.token(tokens) + self.position.weight
            for block in self.blocks:
                x = block(x)
            logits = F.linear(self.norm(x), self.token.weight)
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    for rows, length in shapes:
        torch.manual_seed(0)
        model = Model(length).to(where)
        compiled = model if tiny else torch.compile(model)
        adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        ids = torch.randint(0, base.vocab_size, (rows, length + 1), device=where)

        def run(compiled=compiled, model=model, adamw=adamw, ids=ids) -> float:
            for _ in range(steps):
                with torch.autocast(where, torch.bfloat16):
                    loss = compiled(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                adamw.step()
                adamw.zero_grad(set_to_none=True)
            return loss.item()

        cfg = dataclasses.replace(base, context_length=length)
        device = torch.cuda.get_device_name() if where == "cuda" else "cpu"
        try:
            seconds = seconds_each(run, 3) / steps
        except torch.OutOfMemoryError as e:
            tell(what="gpt2 training", side="torch.compile", rows=rows, length=length, failed=str(e)[:200])
            continue
        flops = training_flops_per_token(cfg, causal=True)
        tell_training("torch.compile", "gpt2", device, flops, rows, length, seconds)
        del model, compiled, adamw, run


GPT_SHAPES, BERT_SHAPES, TINY_SHAPES = [(32, 1024), (64, 1024), (128, 512)], [(256, 128), (64, 512)], [(2, 16)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("side", choices=["train-gpt2", "train-bert", "generate", "score", "train-torch"])
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    gpt, bert = (TINY_SHAPES, TINY_SHAPES) if given.tiny else (GPT_SHAPES, BERT_SHAPES)
    steps = {"steps": 1} if given.tiny else {}
    sides = {
        "train-gpt2": functools.partial(train_ours, "gpt2", gpt, given.tiny, **steps),
        "train-bert": functools.partial(train_ours, "bert-base", bert, given.tiny, **steps),
        "generate": functools.partial(generate_ours, given.tiny),
        "score": functools.partial(score_ours, given.tiny),
        "train-torch": functools.partial(train_torch, gpt, given.tiny, **steps),
    }
    sides[given.side]()
    tell(what="versions", side=given.side, **versions())


if __name__ == "__main__":
    main()
