"""`bothways finetune`: trains a head and the whole stack, or adapters for it, on a labelled task."""

import functools
from typing import Annotated

import tyro

from bothways.commands.shared import emit
from bothways.config import FinetuneConfig
from bothways.errors import InputError
from bothways.log import log

Positional = tyro.conf.Positional
USUAL = FinetuneConfig()


def finetune(
    run: Positional[str],
    task: Positional[str],
    workdir: str | None = None,
    how: Annotated[FinetuneConfig, tyro.conf.arg(name="")] = USUAL,
    text_field: str = "text",
    pair_field: str = "text_b",
    label_field: str = "label",
    json: bool = False,
) -> None:
    """Train a head and the whole stack, or adapters for it (--lora.rank), on a labelled task, over a grid of learning
    rates and seeds.

    The same command resumes a grid that was stopped, and ends with the same result.

    Args:
        run: A run directory.
        task: shakespeare_genre, shakespeare_speaker, glue/NAME, squad, squad/v2.0, conll2003, or a CSV, TSV or JSONL file.
        workdir: Directory of the new run (runs/RUN-TASK).
        text_field: The column that holds the text.
        pair_field: The column that holds the second text of a pair.
        label_field: The column that holds the label.
        json: Print the result as one JSON object.
    """
    import jax

    from bothways import sharding
    from bothways.data import tasks
    from bothways.rundir import directory, load_run, newest_step, read_recipe, read_task
    from bothways.train.finetune import finetune as run_finetuning

    if problems := how.mesh.problems(jax.device_count()):
        raise InputError("; ".join(problems))
    recipe, known = read_recipe(directory(run)), read_task(directory(run))
    if known is not None:
        raise InputError(f"{run} is fine-tuned already, for {known.name}; start from the run it came from")
    if recipe.family == "seq2seq":
        raise InputError(f"{run} is an encoder-decoder; a head for labels goes on a gpt or a bert")
    how.check(recipe.objective.kind, recipe.model.context_length, recipe.model.gated)
    labelled = tasks.load(task, text=text_field, pair=pair_field, label=label_field)
    place = functools.partial(sharding.parameter_shardings, sharding.make_mesh(how.mesh))
    # Adapters are for one checkpoint: those that a mean is made of may be gone one day.
    step = newest_step(directory(run)) if how.lora.rank else "newest"
    body = load_run(directory(run), log, place, step=step)  # after what may be wrong: it takes long
    home = workdir or f"runs/{body.home.name}-{labelled.name.replace('/', '-')}"
    result = run_finetuning(body, labelled, home, how)
    beside = "".join(f", {name.replace('_', ' ')} {value:.3f}" for name, value in result.baselines.items())
    low, high = result.interval
    emit(
        result,
        json,
        f"{result.run}: {result.metric} {result.value:.3f} [{low:.3f}, {high:.3f}] on {result.n} items ({result.tested_on})"
        f"{beside}; chosen on {result.selected_on}",
        undefined=("value", "interval"),  # a correlation with predictions that are all alike
    )
