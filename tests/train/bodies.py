"""Untrained bodies of both families, and tasks on a small made-up language that a word decides."""

import dataclasses
import functools
import random
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from bothways import rundir
from bothways.config import ObjectiveConfig
from bothways.data import tokenizer as tokenizers
from bothways.data.tasks import Task
from bothways.model.config import TransformerConfig
from bothways.recipes import Recipe
from bothways.registry import make_module
from tests.corpus import made_up_text

LENGTH = 24
WORDS = "the king queen fool ship storm crown".split()
METRICS = {
    "classify": ("accuracy", "macro_f1"),
    "regress": ("pearson", "spearman"),
    "tag": ("entity_f1", "accuracy"),
    "span": ("span_f1", "exact_match"),
    "choice": ("accuracy",),
}


@functools.cache
def words() -> tokenizers.Tokenizer:
    """Every word of the language is one piece."""
    return tokenizers.train([made_up_text(60)], "bpe", 390)


@functools.cache
def untrained(family: str, model: TransformerConfig) -> tuple[nn.Module, dict]:
    """The module, and the parameters that training starts from."""
    module = make_module(family, model)
    return module, jax.jit(module.init)(jax.random.key(7), jnp.zeros((1, 2), jnp.int32))["params"]


def body(family: str, tiny: TransformerConfig, **fields) -> rundir.Run:
    """A run whose weights are those that training starts from."""
    tokenizer = words()
    bert = {"norm_position": "post", "segment_types": 2, "embed_norm": True, "next_sentence": True}
    model = dataclasses.replace(tiny, n_layers=1, context_length=LENGTH, vocab_size=len(tokenizer), **fields)
    model = dataclasses.replace(model, **bert) if family == "bert" else model
    objective = ObjectiveConfig(kind={"gpt": "causal", "bert": "masked"}[family])
    recipe = Recipe(name="tiny", family=family, model=model, objective=objective)
    return rundir.Run(Path(family), recipe, tokenizer, *untrained(family, model), 0)


def write(run: rundir.Run, home: Path) -> None:
    """A run directory, as training leaves it."""
    home.mkdir(parents=True)
    run.tokenizer.save(home / "tokenizer.model")
    (home / "recipe.json").write_text(run.recipe.to_json())
    with rundir.checkpoint_manager(home, keep=1) as manager:
        items = {"params": ocp.args.StandardSave(run.params), "meta": ocp.args.JsonSave({"step": 1})}
        manager.save(1, args=ocp.args.Composite(**items))
        manager.wait_until_finished()


def item(kind: str, rng: random.Random) -> dict:
    """A few words; whether, or where, `dog` is among them is what the task asks."""
    words = [rng.choice(WORDS) for _ in range(rng.randint(3, 5))]
    there, at = rng.random() < 0.5, rng.randrange(len(words))
    with_dog = [*words[:at], "dog", *words[at:]]
    text = " ".join(with_dog if there or kind == "span" else words)
    match kind:
        case "classify":
            return {"text": text, "label": "dog" if there else "none"}
        case "regress":
            return {"text": text, "label": (1.0 if there else -1.0) + rng.uniform(-0.1, 0.1)}
        case "tag":
            return {"words": text.split(), "label": ["B-dog" if word == "dog" else "O" for word in text.split()]}
        case "span":
            return {"text": "dog", "text_b": text, "answers": [(text.index("dog"), "dog")]}
        case "choice":
            choices = [" ".join(with_dog), " ".join(words)]
            return {"text": "dog", "choices": choices if there else choices[::-1], "label": 0 if there else 1}


def dog_task(kind: str, train: int = 64, held: int = 24) -> Task:
    rng = random.Random(0)
    splits = {s: [item(kind, rng) for _ in range(n)] for s, n in (("train", train), ("validation", held), ("test", held))}
    labels = {"classify": ("dog", "none"), "tag": ("B-dog", "O")}.get(kind, ())
    return Task("dogs", kind, splits, labels, METRICS[kind])


def params_of(tuner) -> dict:
    """The body's weights under a random head."""
    width, outputs = tuner.run.recipe.model.d_model, tuner.info.outputs
    kernel = jax.random.normal(jax.random.key(1), (width, outputs))
    return {"body": tuner.run.params, "task_head": {"kernel": kernel, "bias": jnp.zeros(outputs)}}


def batch_of(tuner, split: str, length: int = LENGTH, count: int = 8) -> dict[str, np.ndarray]:
    """The first examples of a split, padded to a length."""
    return tuner.rows[split].batch(np.arange(count), length)


def changed(new, old) -> list[str]:
    """Paths of the parameters that differ."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(new), jax.tree.leaves(old), strict=True)
    return [jax.tree_util.keystr(path) for (path, a), b in pairs if not np.array_equal(a, b)]
