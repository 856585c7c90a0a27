"""The verbs that make runs by training: `train` and `finetune`."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from common.config import FinetuneConfig
from common.errors import InputError
from common.recipe import Recipe
from configs import find
from verbs_shared import emit, load, say

Positional = tyro.conf.Positional
USUAL = FinetuneConfig()


def train_verb(argv: list[str]) -> None:
    if not argv or argv[0].startswith("-"):
        if argv and argv[0] in ("-h", "--help"):
            print("usage: bothways train RECIPE-OR-RUN [--workdir DIR] [--json] [--SECTION.FIELD VALUE ...]\n\nrecipes:")
            from configs import names

            for name, known in sorted(names().items()):
                print(f"  {name:20s} {known.family}, {known.model.n_layers} layers, {known.model.d_model} wide")
            print("\n`bothways train RECIPE --help` lists every field.")
            return
        raise InputError("train wants a recipe first: bothways train RECIPE [--workdir DIR] [--SECTION.FIELD VALUE ...]")
    from common.rundir import directory

    home = directory(argv[0])
    base = on_from(home) if (home / "recipe.json").exists() else find(argv[0])
    from train.hosts import HostsConfig, start, stdout_for_results

    @dataclasses.dataclass(frozen=True)
    class Arguments:
        recipe: Annotated[Recipe, tyro.conf.arg(name="")]
        workdir: str = f"runs/{base.name}"
        """The run directory: made, or gone on with."""
        json: bool = False
        """Print the result as one JSON object."""
        hosts: HostsConfig = HostsConfig()

    given = tyro.cli(Arguments, prog=f"bothways train {argv[0]}", args=argv[1:], default=Arguments(base))
    with stdout_for_results():
        start(given.hosts)  # before anything is computed
        from train.loop import train

        result = train(given.recipe, given.workdir)
    import jax

    bpb = f", {result.bits_per_byte:.3f} bits per byte" if result.bits_per_byte is not None else ""
    shown = (
        f"{result.run}: {result.steps} steps in {result.seconds:.0f} s, {result.tokens_per_second:,.0f} tokens/s; "
        f"held-out loss {result.loss:.3f}{bpb}"
    )
    if jax.process_count() > 1:  # one process cannot open a run that others still hold together
        if jax.process_index() == 0:
            emit(result, given.json, shown)
        return
    model = load(given.workdir)
    if model.recipe.family == "bert":
        from sample.evaluate import evaluate

        for figure in evaluate(model, ["validation"]):
            say(f"held-out {figure.metric} {figure.value:.3f} [{figure.interval[0]:.3f}, {figure.interval[1]:.3f}]")
            if figure.metric == "bits_per_byte":
                result = dataclasses.replace(result, bits_per_byte=figure.value)
                shown += f"; bits per byte by the diffusion bound {figure.value:.3f}"
        texts = ["To be, or [MASK] to be", "the [MASK] of the [MASK]", "I [MASK] you,"]
        fitting = [text for text in texts if len(model.tokenizer.encode(text)) + 2 <= model.context]
        for filled in model.fill(fitting, top=3, steps=2):
            guesses = [" ".join(f"{t['token']!r} {t['p']:.2f}" for t in mask) for mask in filled.masks]
            say(f"--- {filled.text}\n    {filled.filled}     {' | '.join(guesses)}")
    elif model.recipe.family == "seq2seq":
        from sample.evaluate import evaluate, held_out_pairs

        for figure in evaluate(model, ["validation"], say):
            say(f"held-out {figure.metric} {figure.value:.2f} [{figure.interval[0]:.2f}, {figure.interval[1]:.2f}]")
        for source, target in held_out_pairs(model, "validation")[:3]:
            made = model.sample([source], beams=4)[0].text
            say(f"--- {source}\n    said:   {made}" + (f"\n    wanted: {target}" if target else ""))
    else:
        speech = model.sample([""], max_tokens=250, temperature=0.8, top_p=0.95)[0]
        say(f"--- what it says, unprompted:\n{speech.text.strip()}\n---")
    emit(result, given.json, shown)


def on_from(home: Path) -> Recipe:
    """The recipe that trains on from a run, imported or trained here: its own, with its tokenizer and weights."""
    from common.rundir import read_recipe

    run = read_recipe(home)
    vocabulary = next(home / name for name in ("tokenizer.json", "tokenizer.model") if (home / name).exists())
    return dataclasses.replace(
        run,
        name=f"{home.name}-on",
        model=dataclasses.replace(run.model, masked_head=True),  # a bare body gets one, to train with
        data=dataclasses.replace(run.data, tokenizer=str(vocabulary)),
        train=dataclasses.replace(run.train, init_from=str(home)),
    )


def finetune_verb(
    run: Positional[str],
    task: Positional[str],
    workdir: str | None = None,
    how: Annotated[FinetuneConfig, tyro.conf.arg(name="")] = USUAL,
    text_field: str = "text",
    pair_field: str = "text_b",
    label_field: str = "label",
    json: bool = False,
) -> None:
    """A head and the whole stack on a labelled task, over a grid of learning rates and seeds.

    Args:
        run: A run directory.
        task: shakespeare_genre, shakespeare_speaker, glue/NAME, squad, squad/v2.0, conll2003, or a CSV, TSV or JSONL file.
        workdir: The new run (runs/RUN-TASK).
        text_field: The column that holds the text.
        pair_field: The column that holds the second text of a pair.
        label_field: The column that holds the label.
        json: Print the result as one JSON object.
    """
    from common.rundir import directory, load_run
    from data import tasks
    from train.finetune import finetune as run_finetuning

    body = load_run(directory(run), say)
    if body.task is not None:
        raise InputError(f"{run} is fine-tuned already, for {body.task.name}; start from the run it came from")
    if body.recipe.family == "seq2seq":
        raise InputError(f"{run} is an encoder-decoder; a head for labels goes on a gpt or a bert")
    labelled = tasks.load(task, text=text_field, pair=pair_field, label=label_field)
    home = workdir or f"runs/{body.home.name}-{labelled.name.replace('/', '-')}"
    result = run_finetuning(body, labelled, home, how)
    beside = "".join(f", {name.replace('_', ' ')} {value:.3f}" for name, value in result.baselines.items())
    low, high = result.interval
    emit(
        result,
        json,
        f"{result.run}: {result.metric} {result.value:.3f} [{low:.3f}, {high:.3f}] on {result.n} items{beside}",
    )
