"""Training steps: forward, backward, clipping, AdamW, on batches that change; ours is the step that `bothways train` takes."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import OURS, Maker, Row, Setting, alternate
from benchmarks.models import ADAMW, model_of, random_tokens, torch_model
from bothways import sharding
from bothways.data.tokenizer import Vocabulary
from bothways.model.adapters import join
from bothways.recipes import Recipe
from bothways.registry import make_module
from bothways.rundir import load_run
from bothways.train.objectives import make_objective
from bothways.train.optimizer import make_optimizer
from bothways.train.step import TrainState, make_eval_step, make_train_step, state_shardings

Batch = dict[str, np.ndarray]
EAGER = "transformers, PyTorch eager, fused AdamW"
AUTOCAST = "transformers, PyTorch eager, autocast to bfloat16, fused AdamW"
COMPILED = "transformers, torch.compile, autocast to bfloat16, fused AdamW"
MASK_ID = 4


def gpt_batch(recipe: Recipe, rows: int, length: int, seed: int) -> Batch:
    """What data/examples.py makes of rows of one document."""
    ids = random_tokens(recipe, rows, length + 1, seed)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    ones = np.ones((rows, length), np.int32)
    given = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "segments": ones, "positions": positions}
    return given | {"weights": ones.astype(np.float32)}


def bert_batch(recipe: Recipe, rows: int, length: int, seed: int) -> Batch:
    """The same for masked rows: 15 % of the positions are masked and predicted."""
    ids, rng = random_tokens(recipe, rows, length, seed), np.random.default_rng(seed)
    asked = max(1, round(recipe.objective.mask_rate * length))
    masked = np.sort(np.stack([rng.choice(length, asked, replace=False) for _ in range(rows)])).astype(np.int32)
    tokens = ids.copy()
    np.put_along_axis(tokens, masked, MASK_ID, axis=1)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    given = {"tokens": tokens, "mask_positions": masked, "targets": np.take_along_axis(ids, masked, axis=1)}
    given |= {"segments": np.ones((rows, length), np.int32), "positions": positions}
    return given | {"weights": np.ones((rows, asked), np.float32)}


Steps = Callable[[int], float]
"""Takes so many steps and returns the last one's loss."""


def ours(recipe: Recipe, params: Any, batches: list[Batch], frozen: Any = None) -> tuple[Steps, Callable[[Batch], float]]:
    """(training steps, the loss of a batch without dropout); of adapters, `frozen` is what they are for."""
    mesh = sharding.make_mesh(recipe.mesh, jax.devices()[:1])
    ids = np.arange(recipe.model.vocab_size)
    vocabulary = Vocabulary(0, 2, 3, MASK_ID, ids < 5, ids[5:], ids > 4, ids > 4)
    objective = make_objective(recipe.objective, vocabulary, recipe.data.separate_documents)
    optimizer = make_optimizer(recipe.optimizer, 1_000)
    zero = jnp.zeros((), jnp.int32)
    module = make_module(recipe.family, recipe.model)
    state = TrainState(zero, params, optimizer.init(params), zero, zero, frozen)
    shardings = state_shardings(mesh, jax.eval_shape(lambda: state))
    state = jax.tree.map(jnp.copy, jax.device_put(state, shardings))  # the step consumes it
    step = make_train_step(module, objective, optimizer, mesh, shardings)
    evaluate = make_eval_step(module, objective, mesh, shardings.weights)

    def run(steps: int) -> float:
        nonlocal state
        for i in range(steps):
            state, metrics = step(state, sharding.to_global(mesh, batches[i % len(batches)]), 0)
        return float(jax.block_until_ready((state, metrics))[1]["loss"])

    def loss(batch: Batch) -> float:
        nats, _, weight = next(iter(evaluate(join(params, frozen), sharding.to_global(mesh, batch)).values()))
        return float(nats / weight)

    return run, loss


def pytorch(
    model: Any, batches: list[Batch], bfloat16: bool = False, compiled: bool = False
) -> tuple[Steps, Callable[[Batch], float]]:
    """The same of a module of `transformers`; a masked loss is marked by labels of -100, as its users do."""
    import torch

    forward = torch.compile(model) if compiled else model

    trained = [p for p in model.parameters() if p.requires_grad]
    plain = [p for p in trained if p.ndim < 2]
    groups = [{"params": [p for p in trained if p.ndim >= 2]}, {"params": plain, "weight_decay": 0.0}]
    how = {"lr": ADAMW.learning_rate, "betas": (ADAMW.b1, ADAMW.b2), "eps": ADAMW.eps}
    adamw = torch.optim.AdamW(groups, weight_decay=ADAMW.weight_decay, fused=True, **how)

    def loss_of(batch: Batch) -> Any:
        labels = batch["targets"]
        if "mask_positions" in batch:
            labels = np.full_like(batch["tokens"], -100)
            np.put_along_axis(labels, batch["mask_positions"], batch["targets"], axis=1)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits = forward(torch.from_numpy(batch["tokens"]).long()).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), torch.from_numpy(labels).long().flatten())

    def run(steps: int) -> float:
        model.train()
        for i in range(steps):
            adamw.zero_grad()
            value = loss_of(batches[i % len(batches)])
            value.backward()
            torch.nn.utils.clip_grad_norm_(trained, ADAMW.clip_norm)
            adamw.step()
        return value.item()

    def loss(batch: Batch) -> float:
        model.eval()
        with torch.no_grad():
            return loss_of(batch).item()

    return run, loss


def our_side(recipe: Recipe, home: Path, batches: list[Batch], steps: int) -> dict[str, Callable]:
    take, loss = ours(recipe, load_run(home, print).params, batches)
    return {"warm": lambda: take(1), "run": lambda: take(steps), "loss": loss}


def their_side(
    recipe: Recipe, home: Path, batches: list[Batch], steps: int, bfloat16: bool = False, compiled: bool = False
) -> dict[str, Callable]:
    kind = "GPT2LMHeadModel" if recipe.family == "gpt" else "BertForMaskedLM"
    take, loss = pytorch(torch_model(home, kind), batches, bfloat16, compiled)
    return {"warm": lambda: take(1), "run": lambda: take(steps), "loss": loss}


PLAIN = {OURS: our_side, EAGER: their_side}
IN_BFLOAT16 = {
    OURS: our_side,
    AUTOCAST: functools.partial(their_side, bfloat16=True),
    COMPILED: functools.partial(their_side, bfloat16=True, compiled=True),
}


def compare(
    setting: Setting, name: str, rows: int, length: int, steps: int, what: str, makers: dict[str, Maker] = PLAIN
) -> Row:
    """Tokens per second of `steps` steps in a row, after one that is not counted: in it a side asks anew for memory that
    the system took back while another had its turn. All begin with the same weights, and must agree on the first loss."""
    recipe, home = model_of(setting, name)
    if recipe.model.dtype == "auto":  # which is bfloat16 on some CPUs
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, dtype="float32"))
    rows, length = (2, 16) if setting.tiny else (rows, length)
    make = gpt_batch if recipe.family == "gpt" else bert_batch
    batches = [make(recipe, rows, length, seed) for seed in range(4)]
    made = makers if setting.peers else {OURS: makers[OURS]}
    sides = {side: setting.side(maker, recipe, home, batches, steps, ours=side == OURS) for side, maker in made.items()}
    losses = [side.loss(batches[0]) for side in sides.values()]
    assert max(losses) - min(losses) < (1e-3 if recipe.model.dtype == "float32" else 2e-2), (
        f"the sides do not compute the same loss: {dict(zip(sides, losses, strict=True))}"
    )
    seconds = alternate(sides, setting.rounds)
    for side in sides.values():
        side.close()
    return Row(what, "tokens/s", rows * length * steps, seconds, "1.2 x PyTorch")


def gpt_small(setting: Setting) -> Row:
    what = "GPT training step, 6 layers, 384 wide, vocabulary 8192, 8 x 256"
    return compare(setting, "gpt-small", 8, 256, 6, what)


def gpt_small_bfloat16(setting: Setting) -> Row:
    what = "GPT training step, 6 layers, 384 wide, vocabulary 8192, 8 x 256, products in bfloat16"
    return compare(setting, "gpt-small-bfloat16", 8, 256, 6, what, IN_BFLOAT16)


def gpt_2048(setting: Setting) -> Row:
    """`transformers` takes PyTorch's scaled_dot_product_attention."""
    return compare(setting, "gpt-small-2048", 1, 2048, 2, "GPT training step, 6 layers, 384 wide, a row of 2,048")


def gpt_8192(setting: Setting) -> Row:
    return compare(setting, "gpt-small-8192", 1, 8192, 1, "GPT training step, 6 layers, 384 wide, a row of 8,192")


def gpt2(setting: Setting) -> Row:
    return compare(setting, "gpt2", 4, 256, 3, "GPT-2 124M training step, 4 x 256")


def gpt2_bfloat16(setting: Setting) -> Row:
    return compare(
        setting, "gpt2-bfloat16", 4, 256, 3, "GPT-2 124M training step, 4 x 256, products in bfloat16", IN_BFLOAT16
    )


def bert_base(setting: Setting) -> Row:
    return compare(setting, "bert-base", 16, 128, 2, "BERT-base training step, 16 x 128, dropout 0.1")


def bert_base_bfloat16(setting: Setting) -> Row:
    what = "BERT-base training step, 16 x 128, dropout 0.1, products in bfloat16"
    return compare(setting, "bert-base-bfloat16", 16, 128, 2, what, IN_BFLOAT16)
