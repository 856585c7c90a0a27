"""Memory of a training step and of evaluation, as rows get longer: by XLA's own account of the compiled programs.

    python -m benchmarks.memory            # table, and benchmarks/row-memory.png
    python -m benchmarks.memory 512 2048   # these lengths only

One row of a GPT of 2 layers of 128, 4 heads, on this machine's device. Nothing is run. Beside it stands what the scores of one
layer would take in float32 if all were held.
"""

import dataclasses
import sys
from pathlib import Path

import jax

from bothways import sharding
from bothways.chips import Topology
from bothways.config import MeshConfig
from bothways.configs import find
from bothways.data.tokenizer import made_up_vocabulary
from bothways.plan.training import abstract_step, with_vocabulary
from bothways.registry import make_module
from bothways.train.objectives import objective_of
from bothways.train.step import make_eval_step

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
MIB = 2**20


def measured(length: int) -> dict[str, float]:
    """MiB of temporary memory at this row length: of a training step, of evaluation, of one layer's scores."""
    recipe = find("shakespeare_gpt")
    model = dataclasses.replace(recipe.model, context_length=length, n_layers=2, vocab_size=4096)
    train = dataclasses.replace(recipe.train, batch_size=1)
    recipe = with_vocabulary(dataclasses.replace(recipe, model=model, train=train))
    mesh = sharding.make_mesh(MeshConfig(1), Topology.parse("cpu:1").devices())
    step, state, batch, placed = abstract_step(recipe, mesh)
    objective = objective_of(recipe, made_up_vocabulary(model.vocab_size))
    evaluate = make_eval_step(make_module("gpt", model), objective, mesh, placed.params)
    programs = {"train": step.lower(state, batch, 0), "evaluate": evaluate.lower(state.params, batch)}
    found = {name: p.compile().memory_analysis().temp_size_in_bytes / MIB for name, p in programs.items()}
    return found | {"scores": 4 * model.n_heads * length**2 / MIB}


def draw(rows: dict[int, dict[str, float]], to: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    names = {"train": "training step", "evaluate": "evaluation", "scores": "scores of one layer, if all were held"}
    for name, label in names.items():
        axes.loglog(list(rows), [r[name] for r in rows.values()], "--" if name == "scores" else "o-", base=2, label=label)
    axes.set(xlabel="tokens in the row", ylabel="MiB", title="Temporary memory of one row: 2 layers of 128, 4 heads")
    axes.set_xticks(list(rows), [f"{n:,}" for n in rows], fontsize=8)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.legend()
    figure.tight_layout()
    figure.savefig(to, dpi=110)


def main() -> None:
    rows = {}
    for length in [int(n) for n in sys.argv[1:]] or LENGTHS:
        rows[length] = measured(length)
        jax.clear_caches()
        print(length, *(f"{name} {mib:,.0f} MiB" for name, mib in rows[length].items()), flush=True)
    draw(rows, Path(__file__).with_name("row-memory.png"))


if __name__ == "__main__":
    main()
