"""Continuing prompts greedily: ours as `bothways sample --greedy` does it, `transformers`, `ctranslate2`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tokenizers

import bothways
from benchmarks.harness import OURS, Row, Setting, alternate
from benchmarks.models import ctranslate_model, model_of, random_tokens, torch_model
from bothways.compare.core import continued

LIMIT = "reading all weights once per token"


def bytes_per_token(params: Any) -> int:
    """What a decode step must read: all parameters but the tables of which it takes one row."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return sum(x.nbytes for path, x in leaves if "position" not in jax.tree_util.keystr(path))


def reading(size: int, times: int) -> Callable[[], None]:
    """A function that reads so many bytes that often: a matrix-vector product, which waits for memory and nothing else."""
    matrix = jnp.ones((size // 4 // 1024, 1024), jnp.float32)
    product = jax.jit(lambda m, v: m @ v)

    def run() -> None:
        vector = jnp.ones((1024,), jnp.float32)
        for _ in range(times):
            product(matrix, vector).block_until_ready()

    return run


def our_side(home: Path, prompts: list[list[int]], new: int) -> dict[str, Callable]:
    model = bothways.load(home)
    return {"run": lambda: continued(model, prompts, new, greedy=True)}


def reading_side(home: Path, times: int) -> dict[str, Callable]:
    return {"run": reading(bytes_per_token(bothways.load(home).run.params), times)}


def transformers_side(home: Path, prompts: list[list[int]], new: int) -> dict[str, Callable]:
    import torch

    model, ids = torch_model(home, "GPT2LMHeadModel").eval(), torch.tensor(prompts)

    def run() -> list[list[int]]:
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
        return out[:, ids.shape[1] :].tolist()

    return {"run": run}


def ctranslate_side(home: Path, prompts: list[list[int]], new: int) -> dict[str, Callable]:
    model, pieces = ctranslate_model(home), pieces_of(home)

    def run() -> list[list[int]]:
        words = [[pieces[i] for i in row] for row in prompts]
        how = {"max_length": new, "sampling_topk": 1, "include_prompt_in_result": False, "max_batch_size": 0}
        return [r.sequences_ids[0] for r in model.generate_batch(words, **how)]

    return {"run": run}


def compare(setting: Setting, batch: int) -> Row:
    """New tokens per second, prompts included. All sides must say the same tokens."""
    length, new = (8, 8) if setting.tiny else (64, 128)
    recipe, home = model_of(setting, "gpt2")
    prompts = random_tokens(recipe, batch, length).tolist()
    sides = {OURS: setting.side(our_side, home, prompts, new, ours=True)}
    if setting.peers:
        sides["transformers generate"] = setting.side(transformers_side, home, prompts, new)
        sides["ctranslate2 float32"] = setting.side(ctranslate_side, home, prompts, new)
    said = {name: side.run() for name, side in sides.items()}
    assert len(said[OURS][0]) == new, "a row ended early: give the model another seed"
    for name, tokens in said.items():
        assert tokens == said[OURS], f"{name} does not say the same tokens"
    if batch == 1:
        sides[LIMIT] = setting.side(reading_side, home, new, ours=True)
    seconds = alternate(sides, setting.rounds)
    for side in sides.values():
        side.close()
    aim = "level with ctranslate2" + ("; at least 0.9 of the reading" if batch == 1 else "")
    return Row(f"GPT-2 124M generation, {batch} x ({length} + {new}) tokens", "tokens/s", batch * new, seconds, aim)


def pieces_of(home: Path) -> list[str]:
    """Tokens as ctranslate2 wants them: by their strings."""
    vocabulary = tokenizers.Tokenizer.from_file(str(home / "tokenizer.json")).get_vocab()
    return sorted(vocabulary, key=vocabulary.get)


def one(setting: Setting) -> Row:
    return compare(setting, 1)


def eight(setting: Setting) -> Row:
    return compare(setting, 8)
