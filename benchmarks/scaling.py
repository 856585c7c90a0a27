"""How cost grows: speed with context, width, layers and batch; memory against theory; start-up with the size of the text.

    python -m benchmarks.scaling speed      # 5 minutes on 2 CPU cores
    python -m benchmarks.scaling memory     # 1 minute
    python -m benchmarks.scaling start      # 1 minute

Each writes its figures into scaling.json and its picture, scaling-NAME.png, beside this file.
"""

import argparse
import dataclasses
import json
import math
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import jax
import matplotlib
import numpy as np
from matplotlib import ticker

from bothways import sharding
from bothways.config import OptimizerConfig, TrainConfig
from bothways.data.config import DataConfig
from bothways.data.pipeline import training_batches
from bothways.data.tokenizer import made_up_vocabulary
from bothways.flops import recipe_flops_per_token
from bothways.model.config import TransformerConfig
from bothways.plan.training import abstract_step, made_up_tokens
from bothways.recipes import Recipe
from bothways.train.objectives import make_objective

HERE = Path(__file__).parent
BASE = TransformerConfig(
    vocab_size=1024,
    context_length=256,
    n_layers=4,
    d_model=256,
    n_heads=4,
    position_embedding="rotary",
    norm="rms",
    bias=False,
)
TOKENS = 8192
"""In a step, unless it is the batch that grows."""
MIB = 2**20
BLUE, ORANGE, GREY = "#2166ac", "#d6604d", "#888888"


def recipe_of(rows: int, **fields) -> Recipe:
    model = dataclasses.replace(BASE, **fields)
    return Recipe(model=model, train=TrainConfig(batch_size=rows), optimizer=OptimizerConfig(learning_rate=1e-4))


def compiled_step(recipe: Recipe):
    """The compiled train step, and shapes of its state."""
    mesh = sharding.make_mesh(recipe.mesh)
    step, state, batch, _ = abstract_step(recipe, mesh)
    return step.lower(state, batch, 0).compile(), state


# ---- speed -----------------------------------------------------------------------------------------------------------

SPEED = {
    "context": [{"rows": TOKENS // T, "context_length": T} for T in (128, 256, 512, 1024, 2048, 4096, 8192)],
    "d_model": [{"rows": 8, "d_model": D} for D in (64, 128, 256, 512, 1024)],
    "n_layers": [{"rows": 8, "n_layers": L} for L in (1, 2, 4, 8, 16)],
    "rows": [{"rows": B} for B in (1, 2, 4, 8, 16, 32, 64)],
}
TITLES = {"context": "context", "d_model": "width", "n_layers": "layers", "rows": "rows in a batch"}


def tokens_per_second(recipe: Recipe, seconds: float) -> float:
    """Median over the steps that fit into so many seconds, at least three, after one that is not counted."""
    step, shapes = compiled_step(recipe)
    state = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    vocabulary = made_up_vocabulary(recipe.model.vocab_size)
    length, rows = recipe.model.context_length, recipe.train.batch_size
    text = made_up_tokens(2 * length, recipe.model.vocab_size)
    source, example = make_objective(recipe.objective, vocabulary).source(text, length, False)
    batch = next(training_batches(source, example, batch_size=rows, seed=0))
    taken: list[float] = []
    while len(taken) < 4 or sum(taken[1:]) < seconds:
        began = time.perf_counter()
        state, metrics = step(state, batch, 0)
        jax.block_until_ready((state, metrics))
        taken.append(time.perf_counter() - began)
    return rows * length / statistics.median(taken[1:])


def speed(seconds: float) -> dict:
    found: dict[str, list[dict]] = {}
    for name, points in SPEED.items():
        found[name] = []
        for point in points:
            recipe = recipe_of(**point)
            got = tokens_per_second(recipe, seconds)
            flops = recipe_flops_per_token(recipe)
            found[name].append({name: point[name], "tokens_per_second": round(got), "gflops_per_token": flops / 1e9})
            print(name, found[name][-1], flush=True)
    return found


def draw_speed(found: dict, plt) -> None:
    figure, panels = plt.subplots(1, 4, figsize=(14, 3.6), constrained_layout=True)
    for panel, (name, points) in zip(panels, found.items(), strict=True):
        x, y = ([p[k] for p in points] for k in (name, "tokens_per_second"))
        flops = np.array([p["gflops_per_token"] for p in points])
        best = max(a * b for a, b in zip(y, flops, strict=True))
        panel.loglog(x, best / flops, "--", color=GREY, label=f"at {best:.0f} GFLOP/s")
        panel.loglog(x, y, "o-", color=BLUE, label="measured")
        panel.set_xticks(x, [str(v) for v in x])
        panel.minorticks_off()
        panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:,.0f}")
        panel.set_xlabel(TITLES[name])
        panel.set_ylim(min(y) / 2, max(max(y), max(best / flops)) * 1.6)
        panel.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("training tokens per second")
    figure.suptitle(
        "4 layers, width 256, context 256, 8,192 tokens a step with context, else 8 rows; float32", fontsize=10
    )


# ---- memory ----------------------------------------------------------------------------------------------------------

MEMORY = [
    *[(f"{B} rows", {"rows": B}) for B in (4, 8, 16, 32)],
    *[(f"context {T}", {"rows": 2048 // T, "context_length": T}) for T in (512, 1024, 2048)],
    *[(f"{L} layers", {"rows": 8, "n_layers": L}) for L in (2, 8)],
    ("width 512", {"rows": 8, "d_model": 512}),
    ("width 1024", {"rows": 8, "d_model": 1024}),
    ("recompute dots", {"rows": 32, "remat": "dots"}),
    ("recompute all", {"rows": 32, "remat": "full"}),
    ("all, scanned", {"rows": 32, "remat": "full", "scan_layers": True}),
]


def theory(recipe: Recipe, parameters: int) -> dict[str, float]:
    """Bytes that a step must hold at once in float32, by what they are for.

    For the backward pass a pre-norm block keeps, per token: the input of both norms and what they make of it (4 D), q, k
    and v and what attention says (4 D), the MLP before and after its activation (2 F), and H scores for each of T keys,
    five eighths of which are left by causality in four blocks of queries (model/attention.py).
    Of a block that is recomputed only its input stays, with remat=dots what its kernels make too; and all of the one that
    is being recomputed. The logits stand
    once as they are and once as their gradient.
    """
    cfg = recipe.model.resolved()
    tokens = recipe.train.batch_size * cfg.context_length
    whole = 8 * cfg.d_model + 2 * cfg.d_ff + cfg.n_heads * cfg.context_length * 5 / 8
    products = 5 * cfg.d_model + cfg.d_ff  # what the kernels make: q, k, v, out, up, down
    kept = {"none": whole, "dots": cfg.d_model + products, "full": cfg.d_model}[cfg.remat]
    blocks = cfg.n_layers * kept + (whole if cfg.remat != "none" else 0)
    return {
        "parameters": 4.0 * parameters,
        "optimizer state": 8.0 * parameters,
        "gradients": 4.0 * parameters,
        "activations": 4.0 * tokens * (blocks + 2 * cfg.vocab_size),
    }


def memory(_: float) -> list[dict]:
    found = []
    for label, point in MEMORY:
        recipe = recipe_of(**point)
        step, state = compiled_step(recipe)
        parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params))
        stats = step.memory_analysis()
        measured = {"arguments": stats.argument_size_in_bytes, "temporary": stats.temp_size_in_bytes}
        parts = theory(recipe, parameters)
        total, wanted = sum(measured.values()), sum(parts.values())
        found.append({"label": label, "theory": parts, "measured": measured, "ratio": round(total / wanted, 3)})
        print(label, f"{total / MIB:.0f} MiB measured, {wanted / MIB:.0f} in theory", flush=True)
    return found


def draw_memory(found: list[dict], plt) -> None:
    _, panel = plt.subplots(figsize=(12, 4.4), constrained_layout=True)
    at, bottom = np.arange(len(found)), np.zeros(len(found))
    shades = ("#08306b", "#2171b5", "#6baed6", "#c6dbef")
    for shade, name in zip(shades, found[0]["theory"], strict=True):
        height = np.array([one["theory"][name] for one in found]) / MIB
        panel.bar(at, height, 0.7, bottom, color=shade, label=f"theory: {name}")
        bottom += height
    measured = [sum(one["measured"].values()) / MIB for one in found]
    panel.plot(at, measured, "D", color=ORANGE, label="the compiled step")
    for x, y, one in zip(at, measured, found, strict=True):
        panel.annotate(
            f"{one['ratio']:.2f}", (x, max(y, bottom[x])), (0, 6), textcoords="offset points", ha="center", fontsize=8
        )
    panel.set_xticks(at, [one["label"] for one in found], rotation=30, ha="right")
    panel.set_ylabel("MiB")
    panel.margins(y=0.1)
    panel.legend(frameon=False, fontsize=9)
    title = "Memory of a training step (4 layers, width 256, context 256, AdamW); the numbers: measured / theory"
    panel.set_title(title, fontsize=10)


# ---- start -----------------------------------------------------------------------------------------------------------

SIZES = (1, 4, 16, 64)
"""Megabytes of text."""


def write_text(path: Path, megabytes: int) -> None:
    rng = np.random.default_rng(0)
    words = np.array(["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), n)) for n in rng.integers(2, 9, 2000)])
    with path.open("w") as out:
        while out.tell() < megabytes * 1e6:
            out.write(" ".join(rng.choice(words, 10)) + ".\n")


def start(_: float) -> list[dict]:
    """Seconds of two steps: of the first run on a text, and of the second; and of one that resumes for the second step."""
    from bothways.train.loop import train

    found = []
    for megabytes in SIZES:
        with tempfile.TemporaryDirectory() as made:
            home = Path(made)
            write_text(home / "text.txt", megabytes)
            time.sleep(3)  # a file that was just written is read again
            recipe = recipe_of(8, vocab_size=0, n_layers=2, d_model=64, context_length=64)
            data = DataConfig(corpus=str(home / "text.txt"), tokenizer="char", cache=str(home / "cache"))
            cfg = dataclasses.replace(recipe.train, steps=2, save_every=1, eval_rows=8)
            seconds = {}
            for name in ("first", "second", "resumed"):
                workdir = home / ("second" if name == "resumed" else name)
                if name == "resumed":
                    shutil.rmtree(workdir / "checkpoints" / "2")
                began = time.perf_counter()
                train(dataclasses.replace(recipe, data=data, train=cfg), workdir)
                seconds[name] = round(time.perf_counter() - began, 2)
            found.append({"megabytes": megabytes, **seconds})
            print(found[-1], flush=True)
    return found


def draw_start(found: list[dict], plt) -> None:
    _, panel = plt.subplots(figsize=(6, 4), constrained_layout=True)
    x = [one["megabytes"] for one in found]
    for name, color, label in (
        ("first", GREY, "first run: tokenizer and tokens are made"),
        ("second", BLUE, "another run on the same text"),
        ("resumed", ORANGE, "a run that resumes after the first step"),
    ):
        panel.plot(x, [one[name] for one in found], "o-", color=color, label=label)
    panel.set_xscale("log")
    panel.set_xticks(x, [str(v) for v in x])
    panel.minorticks_off()
    panel.set_ylim(0)
    panel.set_xlabel("megabytes of text")
    panel.set_ylabel("seconds of a run of two steps")
    panel.legend(frameon=False, fontsize=9)


PARTS = {"speed": (speed, draw_speed), "memory": (memory, draw_memory), "start": (start, draw_start)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}; none: all")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each speed")
    parser.add_argument("--draw", action="store_true", help="only draw what scaling.json holds")
    args = parser.parse_args()
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kept = HERE / "scaling.json"
    for name in args.parts:
        measure, draw = PARTS[name]
        known = json.loads(kept.read_text()) if kept.exists() else {}
        if not args.draw:
            known[name] = measure(args.seconds)
            kept.write_text(json.dumps(known, indent=1) + "\n")
        draw(known[name], plt)
        plt.savefig(HERE / f"scaling-{name}.png", dpi=110)
        plt.close()


if __name__ == "__main__":
    main()
