"""Training steps of low-rank adapters on a frozen model, beside PEFT."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax

from benchmarks.harness import OURS, Row, Setting
from benchmarks.models import torch_model
from benchmarks.training import Batch, compare, ours, pytorch
from bothways.model.adapters import frozen_types, split
from bothways.model.config import LoRAConfig
from bothways.recipes import Recipe
from bothways.registry import make_module, tiny_inputs
from bothways.rundir import load_run

LORA = LoRAConfig(rank=8, alpha=16.0)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PEER = "PEFT on transformers, PyTorch eager, fused AdamW"


def our_side(recipe: Recipe, home: Path, batches: list[Batch], steps: int) -> dict[str, Callable]:
    lora = dataclasses.replace(LORA, frozen=recipe.model.compute_dtype.name)
    adapted = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, lora=lora))
    module = make_module(recipe.family, adapted.model)
    mine = jax.jit(lambda: split(module.init(jax.random.key(0), **tiny_inputs(recipe.family))["params"])[0])()
    base = load_run(home, print).params
    base = jax.tree.map(lambda x, kept: x.astype(kept.dtype), base, frozen_types(base, adapted.model))
    take, loss = ours(adapted, mine, batches, base)
    return {"warm": lambda: take(1), "run": lambda: take(steps), "loss": loss}


def their_side(recipe: Recipe, home: Path, batches: list[Batch], steps: int) -> dict[str, Callable]:
    import peft

    how = peft.LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules=TARGETS)
    model = torch_model(home, "LlamaForCausalLM", recipe.model.compute_dtype.name)
    take, loss = pytorch(peft.get_peft_model(model, how), batches)
    return {"warm": lambda: take(1), "run": lambda: take(steps), "loss": loss}


MAKERS = {OURS: our_side, PEER: their_side}


def lora(setting: Setting) -> Row:
    what = "LoRA training step, rank 8 on all projections of SmolLM2 135M's shape, 4 x 256"
    return compare(setting, "smollm2", 4, 256, 2, what, MAKERS)


def lora_bfloat16(setting: Setting) -> Row:
    """The same with the frozen model in bfloat16 and products of bfloat16, on both sides; adapters stay float32."""
    what = "LoRA training step of the same, model and products in bfloat16"
    return compare(setting, "smollm2-bfloat16", 4, 256, 2, what, MAKERS)
