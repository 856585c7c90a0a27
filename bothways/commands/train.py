"""`bothways train`: trains a recipe, or resumes a run."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

import bothways
from bothways.commands.shared import emit, one_text
from bothways.configs import find
from bothways.errors import InputError
from bothways.log import log
from bothways.recipes import Recipe


def train(argv: list[str]) -> None:
    if not argv or argv[0].startswith("-"):
        if argv and argv[0] in ("-h", "--help"):
            print(
                "usage: bothways train RECIPE-OR-RUN [--workdir DIR] [--profile STEPS] [--json] [--SECTION.FIELD VALUE ...]\n\nrecipes:"
            )
            from bothways.configs import names

            for name, known in sorted(names().items()):
                print(f"  {name:20s} {known.family}, {known.model.n_layers} layers, {known.model.d_model} wide")
            print("\n`bothways train RECIPE --help` lists every field.")
            return
        raise InputError("train wants a recipe first: bothways train RECIPE [--workdir DIR] [--SECTION.FIELD VALUE ...]")
    from bothways.rundir import directory

    home = directory(argv[0])
    base = one_text(continuation_of(home) if (home / "recipe.json").exists() else find(argv[0]), argv)
    from bothways.train.hosts import HostsConfig, start, stdout_for_results

    @dataclasses.dataclass(frozen=True)
    class Arguments:
        recipe: Annotated[Recipe, tyro.conf.arg(name="")]
        workdir: str = f"runs/{base.name}"
        """The run directory: created, or resumed."""
        json: bool = False
        """Print the result as one JSON object."""
        profile: int = 0
        """Number of steps to trace into RUN/profile, for XProf and Perfetto."""
        hosts: HostsConfig = HostsConfig()

    given = tyro.cli(Arguments, prog=f"bothways train {argv[0]}", args=argv[1:], default=Arguments(base))
    with stdout_for_results():
        start(given.hosts)  # before anything is computed
        from bothways.train.loop import train

        result = train(given.recipe, given.workdir, given.profile)
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
    try:
        result, more = show_model(bothways.load(given.workdir), result)
    except InputError as e:  # of a few held-out texts, say, nothing can be measured: the run is trained all the same
        more = ""
        log(f"the run is trained, and not shown: {e}")
    emit(result, given.json, shown + more)


def show_model(model: Any, result: Any) -> tuple[Any, str]:
    """Logs what a trained run generates or predicts, on standard error. Returns the result, and the text to show after
    it, with figures that training does not measure."""
    more = ""
    if model.recipe.objective.kind == "contrastive":
        more = "; how well it finds is what `bothways search` says"
    elif model.recipe.family == "bert":
        from bothways.sample.evaluate import evaluate

        for figure in evaluate(model, ["validation"], limit=model.recipe.train.eval_rows):
            name = figure.suite.removeprefix("validation").replace("/", " ")
            low, high = figure.interval
            log(f"held-out{name} {figure.metric} {figure.value:.3f} [{low:.3f}, {high:.3f}]")
            if figure.metric == "bits_per_byte" and not name:
                result = dataclasses.replace(result, bits_per_byte=figure.value)
                more = f"; bits per byte by the diffusion bound {figure.value:.3f}"
        texts = ["To be, or [MASK] to be", "the [MASK] of the [MASK]", "I [MASK] you,"]
        fitting = [text for text in texts if len(model.tokenizer.encode(text)) + 2 <= model.context_length]
        for filled in model.fill(fitting, top=3, steps=2):
            guesses = [" ".join(f"{t['token']!r} {t['p']:.2f}" for t in mask) for mask in filled.masks]
            log(f"--- {filled.text}\n    {filled.filled}     {' | '.join(guesses)}")
    elif model.recipe.family == "seq2seq":
        from bothways.sample.evaluate import evaluate, held_out_pairs

        for figure in evaluate(model, ["validation"], log, model.recipe.train.eval_rows):
            name, (low, high) = figure.suite.removeprefix("validation").replace("/", " "), figure.interval
            log(f"held-out{name} {figure.metric} {figure.value:.2f} [{low:.2f}, {high:.2f}]")
        for source, target in held_out_pairs(model, "validation", limit=3):
            made = model.sample([source], beams=4)[0].text
            log(f"--- {source}\n    output: {made}" + (f"\n    wanted: {target}" if target else ""))
    else:
        speech = model.sample([""], max_tokens=250, temperature=0.8, top_p=0.95)[0]
        log(f"--- a sample without a prompt:\n{speech.text.strip()}\n---")
    return result, more


def continuation_of(home: Path) -> Recipe:
    """The recipe that trains a run further, imported or trained here: the run's own, with its tokenizer and weights."""
    from bothways.data.config import VOCABULARIES
    from bothways.data.tokenizer import vocabulary_file
    from bothways.rundir import read_recipe

    run = read_recipe(home)
    vocabulary = vocabulary_file(home)
    if vocabulary is None:
        raise InputError(f"{home} has none of {', '.join(VOCABULARIES)}; put back a copy of it")
    return dataclasses.replace(
        run,
        name=f"{home.name}-on",
        model=dataclasses.replace(run.model, masked_head=True),  # a bare body gets one, to train with
        data=dataclasses.replace(run.data, tokenizer=str(vocabulary)),
        train=dataclasses.replace(run.train, init_from=str(home)),
    )
