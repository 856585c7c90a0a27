"""Time to a held-out loss on a text file, in characters: recipe shakespeare_chars against a plain PyTorch loop.

    python -m benchmarks.chars FILE [FILE ...] [--rounds 3]

Both sides learn from the same part of the file and are asked about the same other part, each character once, in windows
of their own context. The reference (benchmarks.chars_reference) runs to its end; the loss that it ends at is the mark, and
what is reported is when the recipe first goes below it. The sides take turns, each in a process of its own; clocks stop while
losses are measured, and run while programs compile. Ours has its memory as `bothways` on the command line has it.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bothways.platform import memory_tunables

RECIPE, CHECKS = "shakespeare_chars", 25


def ours(recipe, checks: int = CHECKS) -> dict:
    """Trains a recipe as `bothways train` does; {"compile", "curve": [(step, seconds, held-out loss)]}.

    Seconds are counted from when the text is ready, with the making of the state and all compiling.
    """
    import jax

    from bothways import sharding
    from bothways.data import corpora, pipeline, tokens
    from bothways.registry import make_module, tiny_inputs
    from bothways.train.loop import Evaluator, resolve
    from bothways.train.objectives import make_objective
    from bothways.train.optimizer import make_optimizer
    from bothways.train.step import init_state, make_train_step, state_shardings

    corpus = corpora.load(recipe.data)
    tokenizer = tokens.obtain_tokenizer(recipe.data, corpus)
    text, held_text = (tokens.prepare(corpus, split, tokenizer, recipe.data.cache) for split in ("train", "validation"))
    recipe, cfg = resolve(recipe, tokenizer), recipe.train
    objective = make_objective(recipe.objective, tokenizer.vocabulary(), recipe.data.separate_documents)
    source = objective.source(text, recipe.model.context_length, False)
    held_out = objective.source(held_text, recipe.model.context_length, True)

    began = time.perf_counter()
    mesh, module = sharding.make_mesh(recipe.mesh), make_module(recipe.family, recipe.model)
    optimizer = make_optimizer(recipe.optimizer, cfg.steps)

    def fresh():
        return init_state(module, tiny_inputs(recipe.family), optimizer, cfg.seed)

    shardings = state_shardings(mesh, jax.eval_shape(fresh))
    state = jax.jit(fresh, out_shardings=shardings)()
    step = make_train_step(module, objective, optimizer, mesh, shardings)
    batches = pipeline.training_batches(*source, batch_size=cfg.batch_size, seed=cfg.seed)
    first = sharding.to_global(mesh, next(batches))
    step = step.lower(state, first, cfg.seed).compile()
    state, _ = jax.block_until_ready(step(state, first, cfg.seed))
    compiled = time.perf_counter() - began

    evaluate = Evaluator(recipe, objective, module, tokenizer, {"": held_out}, mesh, shardings.params)
    curve, away, tokens_seen = [], 0.0, first["tokens"].size
    for done in range(2, cfg.steps + 1):
        batch = sharding.to_global(mesh, next(batches))
        tokens_seen += batch["tokens"].size
        state, _ = step(state, batch, cfg.seed)
        if done * checks // cfg.steps > (done - 1) * checks // cfg.steps:
            jax.block_until_ready(state)
            paused = time.perf_counter()
            curve.append((done, paused - began - away, evaluate(state.params)["nll"]))
            away += time.perf_counter() - paused
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    return {"compile": compiled, "curve": curve, "tokens": tokens_seen, "parameters": parameters}


def recipe_for(path: str, cache: str):
    from bothways.configs import find

    recipe = find(RECIPE)
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, corpus=path, cache=cache))


def in_process(*arguments: str, tunables: str | None = None) -> dict:
    env = os.environ | ({"GLIBC_TUNABLES": tunables} if tunables else {})
    done = subprocess.run([sys.executable, "-m", *arguments], env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(path: Path, rounds: int) -> dict:
    """Medians over the rounds; the mark of a round is what its reference ended at."""
    from bothways.data import corpora

    found = []
    with tempfile.TemporaryDirectory() as home:
        corpus = corpora.load(recipe_for(str(path), home).data)
        parts = {split: Path(home) / f"{split}.txt" for split in ("train", "validation")}
        for split, part in parts.items():
            part.write_text("".join(text for _, text in corpus.documents(split)))
        for _ in range(rounds):
            reference = in_process("benchmarks.chars_reference", *map(str, parts.values()))
            mine = in_process("benchmarks.chars", "--ours", str(path), "--cache", home, tunables=memory_tunables())
            crossing = next((s for _, s, loss in mine["curve"] if loss <= reference["loss"]), float("nan"))
            found.append(
                {
                    "mark": reference["loss"],
                    "reference_seconds": reference["seconds"],
                    "seconds": crossing,
                    "of_it_compiling": mine["compile"],
                    "final_loss": mine["curve"][-1][2],
                    "final_seconds": mine["curve"][-1][1],
                }
            )
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    medians = {name: round(statistics.median(one[name] for one in found), 4) for name in found[0]}
    ratio = statistics.median(one["reference_seconds"] / one["seconds"] for one in found)
    without = statistics.median(one["reference_seconds"] / (one["seconds"] - one["of_it_compiling"]) for one in found)
    return {
        "file": path.name,
        "rounds": rounds,
        **medians,
        "faster": round(ratio, 2),
        "faster_once_compiled": round(without, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ours", action="store_true", help="this side only, once, with its whole curve")
    parser.add_argument("--cache", default="~/.cache/bothways", help="where --ours keeps what it prepares")
    args = parser.parse_args()
    for path in args.files:
        found = ours(recipe_for(str(path), args.cache)) if args.ours else compare(path, args.rounds)
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
