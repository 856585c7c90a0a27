"""Continuing prompts greedily: ours as `bothways sample --greedy` does it, `transformers`, `ctranslate2`."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

import bothways
from benchmarks.harness import OURS, Row, Setting, Side, alternate
from benchmarks.models import ctranslate_model, model_of, random_tokens, torch_model
from compare.core import continued

LIMIT = "reading all weights once per token"


def bytes_per_token(params: Any) -> int:
    """What a decode step must read: all parameters but the tables of which it takes one row."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return sum(x.nbytes for path, x in leaves if "position" not in jax.tree_util.keystr(path))


def reading(size: int, times: int) -> Side:
    """A side that reads so many bytes that often: a matrix-vector product, which waits for memory and nothing else."""
    matrix = jnp.ones((size // 4 // 1024, 1024), jnp.float32)
    product = jax.jit(lambda m, v: m @ v)

    def run() -> None:
        vector = jnp.ones((1024,), jnp.float32)
        for _ in range(times):
            product(matrix, vector).block_until_ready()

    return run


def compare(setting: Setting, batch: int) -> Row:
    """New tokens per second, prompts included. All sides must say the same tokens."""
    length, new = (8, 8) if setting.tiny else (64, 128)
    recipe, home = model_of(setting, "gpt2")
    model = bothways.load(home)
    prompts = random_tokens(recipe, batch, length)
    said: dict[str, list[list[int]]] = {}

    def ours() -> None:
        said[OURS] = continued(model, prompts.tolist(), new, greedy=True)

    sides = {OURS: ours}
    if setting.peers:
        import torch

        theirs, fast = torch_model(home, "GPT2LMHeadModel").eval(), ctranslate_model(home)
        ids = torch.from_numpy(prompts.astype(np.int64))
        pieces = pieces_of(home)

        def transformers() -> None:
            with torch.inference_mode():
                out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
            said["transformers generate"] = out[:, length:].tolist()

        def ctranslate2() -> None:
            words = [[pieces[i] for i in row] for row in prompts.tolist()]
            how = {"max_length": new, "sampling_topk": 1, "include_prompt_in_result": False, "max_batch_size": 0}
            said["ctranslate2 float32"] = [r.sequences_ids[0] for r in fast.generate_batch(words, **how)]

        sides |= {"transformers generate": transformers, "ctranslate2 float32": ctranslate2}
    if batch == 1:
        sides[LIMIT] = reading(bytes_per_token(model.run.params), new)
    seconds = alternate(sides, setting.rounds)
    assert len(said[OURS][0]) == new, "a row ended early: give the model another seed"
    for side, tokens in said.items():
        assert tokens == said[OURS], f"{side} does not say the same tokens"
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
