"""The verbs of the command line: each a thin face over a Python function."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

import verbs_scale
from common.config import MeshConfig
from common.errors import InputError
from common.recipe import Recipe
from compare.verb import compare
from configs import find

Positional = tyro.conf.Positional
ONE = MeshConfig(data=1)
PROMPTS = 512
"""Prompts that are answered before the first is shown."""

if TYPE_CHECKING:
    from sample.masked import MaskedModel
    from sample.predict import TaskPredictor
    from sample.text import TextModel


def load(home: str | Path, mesh: MeshConfig = ONE) -> "TextModel | MaskedModel | TaskPredictor":
    """A trained run, ready to be asked: `sample` and `score`; `fill` and `embed` where its family can.

    Args:
      mesh: how to spread its parameters over this host's devices; with all axes 1 they lie on the first device, or,
        where that cannot hold them, on all.
    """
    from common.rundir import directory, load_run
    from sample.hybrid import HybridModel
    from sample.masked import MaskedModel
    from sample.predict import TaskPredictor
    from sample.text import TextModel
    from train.sharding import shardings_for_reading

    run = load_run(directory(home), say, lambda shapes: shardings_for_reading(shapes, mesh))
    if run.task is not None:
        return TaskPredictor(run)
    if run.recipe.objective.kind == "hybrid":
        return HybridModel(run)
    return MaskedModel(run) if run.recipe.family == "bert" else TextModel(run)


def say(message: str) -> None:
    print(message, file=sys.stderr)


def _emit(value: Any, as_json: bool, shown: str) -> None:
    value = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
    print(json.dumps(value, ensure_ascii=False) if as_json else shown, flush=True)


def _train(argv: list[str]) -> None:
    if not argv or argv[0].startswith("-"):
        if argv and argv[0] in ("-h", "--help"):
            print("usage: bothways train RECIPE [--workdir DIR] [--json] [--SECTION.FIELD VALUE ...]\n\nrecipes:")
            from configs import names

            for name, known in sorted(names().items()):
                print(f"  {name:20s} {known.family}, {known.model.n_layers} layers, {known.model.d_model} wide")
            print("\n`bothways train RECIPE --help` lists every field.")
            return
        raise InputError("train wants a recipe first: bothways train RECIPE [--workdir DIR] [--SECTION.FIELD VALUE ...]")
    base = find(argv[0])
    from train.hosts import HostsConfig, start

    @dataclasses.dataclass(frozen=True)
    class Arguments:
        recipe: Annotated[Recipe, tyro.conf.arg(name="")]
        workdir: str = f"runs/{base.name}"
        """The run directory: made, or gone on with."""
        json: bool = False
        """Print the result as one JSON object."""
        hosts: HostsConfig = HostsConfig()

    given = tyro.cli(Arguments, prog=f"bothways train {argv[0]}", args=argv[1:], default=Arguments(base))
    start(given.hosts)
    import jax

    from train.loop import train

    result = train(given.recipe, given.workdir)
    bpb = f", {result.bits_per_byte:.3f} bits per byte" if result.bits_per_byte is not None else ""
    shown = (
        f"{result.run}: {result.steps} steps in {result.seconds:.0f} s, {result.tokens_per_second:,.0f} tokens/s; "
        f"held-out loss {result.loss:.3f}{bpb}"
    )
    if jax.process_count() > 1:  # one process cannot open a run that others still hold together
        if jax.process_index() == 0:
            _emit(result, given.json, shown)
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
        for filled in model.fill(texts, top=3, steps=2):
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
    _emit(result, given.json, shown)


def _sample(
    run: Positional[str],
    prompts: Positional[tuple[str, ...]],
    source: Path | None = None,
    max_tokens: int | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    greedy: bool = False,
    beams: int | None = None,
    length_penalty: float = 0.6,
    num: int = 1,
    seed: int = 0,
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    chunk: int | None = None,
    steps: int | None = None,
    sweeps: int | None = None,
    stream: bool = False,
    mesh: MeshConfig = ONE,
    json: bool = False,
) -> None:
    """Continue text: token by token, or, with a masked model, by chunks of masks at its end. With an encoder-decoder,
    write what follows from a source, such as its translation.

    Args:
        run: A run directory.
        prompts: Texts to continue; "" starts a document. Of an encoder-decoder: sources.
        source: A file with a source per line (encoder-decoders); the results keep its order.
        max_tokens: Most tokens per continuation; 256, or 50 more than the source has.
        temperature: Below 1 sharper, above 1 flatter; 0 is greedy.
        top_k: Draw among the K most likely tokens; 0 is off.
        top_p: Draw among the fewest tokens that hold this probability; 1 is off.
        min_p: Leave out tokens less likely than this share of the most likely; 0 is off.
        greedy: Always the most likely token.
        beams: Width of a beam search instead of sampling (causal models; encoder-decoders search with 4 unless
            another method is asked for).
        length_penalty: What a beam search's log-probabilities are divided by grows with length to this power.
        num: Continuations of each prompt.
        seed: The same seed gives the same text.
        stop: End before this string; may be given several times.
        chunk: Masks filled together at the end of the text (masked models; 16).
        steps: Readings in which a chunk is filled, the surest token first (masked models; 16).
        sweeps: Times each token of a chunk is drawn again afterwards (masked models; 0).
        stream: Show the text while it is made (causal models).
        mesh: Devices to spread the parameters over.
        json: One JSON object per result.
    """
    if source is not None:
        prompts = (*prompts, *_lines(source))
    if not prompts:
        raise InputError('sample wants at least one prompt after the run: bothways sample RUN "ROMEO:"')
    if stream and (len(prompts) * num > 1 or json):
        raise InputError("--stream shows one continuation as plain text: give one prompt, and neither --num nor --json")
    model = load(run, mesh)
    _able(model, "sample", "")
    family = model.recipe.family
    masked = family == "bert"
    if source is not None and family != "seq2seq":
        raise InputError(
            f"--source is for encoder-decoders; a {family} run goes on from a prompt: give it as an argument"
        )
    other_method = greedy or stream or stop or temperature != 1.0 or top_k or top_p != 1.0 or min_p
    if family == "seq2seq" and beams is None and not other_method:
        beams = 4
    chosen = {
        "max_tokens": max_tokens,
        "beams": beams,
        "chunk": chunk,
        "steps": steps,
        "sweeps": sweeps,
        "stream": stream or None,
    }
    options: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    wrong = set(options) & ({"beams", "stream"} if masked else {"chunk", "steps", "sweeps"})
    if wrong:
        why = "fills chunks of masks and never goes left to right" if masked else "goes left to right and has no masks"
        raise InputError(f"--{min(wrong)} is not for a {family} run, which {why}")
    if not masked:
        options["length_penalty"] = length_penalty
    if stream:
        print("" if family == "seq2seq" else prompts[0], end="", flush=True)
        options["stream"] = lambda _, piece: print(piece, end="", flush=True)
    options |= {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "greedy": greedy}
    count = len(prompts) * num
    for begin in range(0, len(prompts), PROMPTS):  # what row i says does not depend on its neighbours
        results = model.sample(prompts[begin : begin + PROMPTS], num=num, seed=seed, stop=stop, **options)
        if stream:
            print()
            return
        for i, result in enumerate(results, begin * num + 1):
            head = f"--- {i} of {count}\n" if count > 1 and source is None else ""
            _emit(result, json, result.text if family == "seq2seq" else f"{head}{result.prompt}{result.text}")
        if len(prompts) > PROMPTS:
            say(f"{min(begin + PROMPTS, len(prompts)):,} of {len(prompts):,} done")


def _fill(
    run: Positional[str], texts: Positional[tuple[str, ...]], top: int = 5, steps: int = 1, json: bool = False
) -> None:
    """Fill every [MASK] of a text.

    Args:
        run: A run directory of a masked model.
        texts: Texts with [MASK] in them.
        top: Candidates told per mask.
        steps: 1 fills all masks at once; T a few at a time, the surest first.
        json: One JSON object per text.
    """
    if not texts:
        raise InputError('fill wants at least one text after the run: bothways fill RUN "To be, or [MASK] to be"')
    why = "was not asked to restore single tokens; where it learnt to restore spans, `sample` tells them"
    model = load(run)
    if model.recipe.family == "gpt":
        why = "reads forward only, so what follows a mask could not help"
    for result in _able(model, "fill", why)(texts, top=top, steps=steps):
        lines = ["  " + "  ".join(f"{c['token']!r} {c['p']:.3f}" for c in mask) for mask in result.masks]
        _emit(result, json, "\n".join([result.filled, *lines]))


def _embed(run: Positional[str], file: Positional[Path | None] = None, pool: str = "mean", json: bool = False) -> None:
    """A vector per line.

    Args:
        run: A run directory.
        file: A text per line; without it, standard input.
        pool: cls, the first token's features (masked models); or mean, over all tokens.
        json: One JSON object per line (the plain form shows numbers separated by spaces).
    """
    texts = _lines(file)
    for text, vector in zip(texts, _able(load(run), "embed", "")(texts, pool=pool), strict=True):
        values = [round(float(v), 6) for v in vector]
        _emit({"text": text, "vector": values}, json, " ".join(f"{v:.6f}" for v in values))


def _able(model: Any, verb: str, why: str) -> Callable[..., Any]:
    """The method of that name, or the reason why this run has none."""
    if getattr(model, "task", None) is not None:
        raise InputError(
            f"{model.run.home} is fine-tuned for {model.task.name}, and can `predict`; ask the run it came from"
        )
    if not hasattr(model, verb):
        raise InputError(f"a {model.recipe.family} run cannot {verb}: it {why}")
    return getattr(model, verb)


def _score(run: Positional[str], file: Positional[Path | None] = None, rule: str = "", json: bool = False) -> None:
    """How likely each line is.

    Args:
        run: A run directory.
        file: A text per line; without it, standard input.
        rule: causal (the default of causal models), the log-probability of a text read forward (of encoder-decoders, of
            the target in `source TAB target`); pll, each token given all others; pll_word (the default of masked
            models), the rest of its word hidden too; bound, a lower bound on the log-probability.
        json: One JSON object per line (the plain form shows log-probability, tokens, text).
    """
    texts = _lines(file)
    for result in _able(load(run), "score", "")(texts, **({"rule": rule} if rule else {})):
        _emit(result, json, f"{result.logprob:10.3f}  {result.tokens:4d}  {result.text}")


def _evaluate(
    run: Positional[str],
    suites: Positional[tuple[str, ...]] = ("validation",),
    shots: int | None = None,
    rule: str = "",
    tasks_from: Path | None = None,
    json: bool = False,
) -> None:
    """Held-out loss and bits per byte, and tasks of lm-evaluation-harness, with 95 % intervals.

    Args:
        run: A run directory.
        suites: validation or test: the run's own held-out text. lm-eval:TASK: a task of lm-evaluation-harness.
        shots: Demonstrations before each question of an lm-eval task; by default as the task says.
        rule: How an lm-eval task scores a continuation: causal; pll_word (the default of masked models) or pll.
        tasks_from: A folder with lm-eval task definitions of your own.
        json: One JSON object per figure.
    """
    from sample.evaluate import evaluate

    model = load(run)
    _able(model, "sample", "")
    tasks = [s.removeprefix("lm-eval:") for s in suites if s.startswith("lm-eval:")]
    own = [s for s in suites if not s.startswith("lm-eval:")]
    if (shots is not None or rule or tasks_from) and not tasks:
        raise InputError("--shots, --rule and --tasks-from are for lm-eval tasks, such as lm-eval:lambada_openai")
    figures = evaluate(model, own, say)
    if tasks:
        try:
            from compare import harness
        except ModuleNotFoundError as e:
            raise InputError(
                f"lm-eval tasks need {e.name}, which is not installed: pip install 'bothways[lmeval]'"
            ) from e
        figures += harness.evaluate(model, tasks, shots, rule, tasks_from)
    for figure in figures:
        low, high = figure.interval
        _emit(figure, json, f"{figure.suite} {figure.metric} {figure.value:.4f} [{low:.4f}, {high:.4f}] (n={figure.n})")


def _finetune(
    run: Positional[str],
    task: Positional[str],
    workdir: str | None = None,
    epochs: int = 3,
    batch_size: int = 32,
    learning_rates: tuple[float, ...] = (),
    seeds: int = 3,
    length: int = 0,
    lm_weight: float = 0.0,
    patience: int = 2,
    scratch: bool = True,
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
        epochs: Passes over the training split.
        batch_size: Items in a batch.
        learning_rates: The grid; by default 2e-5 3e-5 5e-5, and 3e-4 1e-3 for small models.
        seeds: Runs per learning rate.
        length: Tokens per text; 0 is the model's context.
        lm_weight: Share of the language-model loss added (causal runs; GPT-1 has 0.5).
        patience: Stop after so many epochs without a better validation metric.
        scratch: Also train the same network from random weights.
        text_field: The column that holds the text.
        pair_field: The column that holds the second text of a pair.
        label_field: The column that holds the label.
        json: Print the result as one JSON object.
    """
    from common.rundir import directory, load_run
    from data import tasks
    from train.finetune import FinetuneConfig
    from train.finetune import finetune as run_finetuning

    body = load_run(directory(run), say)
    if body.task is not None:
        raise InputError(f"{run} is fine-tuned already, for {body.task.name}; start from the run it came from")
    labelled = tasks.load(task, text=text_field, pair=pair_field, label=label_field)
    home = workdir or f"runs/{body.home.name}-{labelled.name.replace('/', '-')}"
    cfg = FinetuneConfig(
        epochs=epochs,
        batch_size=batch_size,
        learning_rates=learning_rates,
        seeds=seeds,
        length=length,
        lm_weight=lm_weight,
        patience=patience,
        scratch=scratch,
    )
    result = run_finetuning(body, labelled, home, cfg)
    beside = "".join(f", {name.replace('_', ' ')} {value:.3f}" for name, value in result.baselines.items())
    low, high = result.interval
    _emit(
        result,
        json,
        f"{result.run}: {result.metric} {result.value:.3f} [{low:.3f}, {high:.3f}] on {result.n} items{beside}",
    )


def _predict(run: Positional[str], file: Positional[Path | None] = None, json: bool = False) -> None:
    """Labels, numbers, tags, spans or choices from a fine-tuned run.

    Args:
        run: A run directory that `bothways finetune` wrote.
        file: An item per line, its parts separated by tabs; without it, standard input.
        json: One JSON object per line.
    """
    from common.rundir import directory, load_run
    from sample.predict import TaskPredictor

    lines = _lines(file)
    for result in TaskPredictor(load_run(directory(run), say)).predict(lines):
        _emit(result, json, f"{result.label}\t{result.p}\t{result.text}")


def _lines(file: Path | None) -> list[str]:
    from data.files import read_utf8

    if file is not None and not file.is_file():
        raise InputError(f"no file {file}")
    try:
        text = read_utf8(file) if file is not None else sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as e:
        raise InputError(f"standard input is not UTF-8 (offset {e.start})") from e
    lines = text.split("\n")
    lines = lines[:-1] if lines[-1] == "" else lines
    empty = [i for i, line in enumerate(lines, 1) if not line]
    if not lines or empty:
        raise InputError(f"line {empty[0]} is empty; every line is a text" if lines else "no text: the input is empty")
    return lines


VERBS: dict[str, tuple[Callable[..., None], str]] = {
    "train": (_train, "train a recipe, or go on with a run"),
    "sample": (_sample, "continue text"),
    "fill": (_fill, "fill the masks of a text"),
    "embed": (_embed, "a vector for each line of a file"),
    "score": (_score, "how likely each line of a file is"),
    "finetune": (_finetune, "train a head and the whole stack on a labelled task"),
    "predict": (_predict, "labels from a fine-tuned run"),
    "plan": (verbs_scale.plan, "what a recipe would need on chips that are not here"),
    "launch": (verbs_scale.launch, "start a recipe on a slice or a cluster"),
    "compare": (compare, "the controlled experiments of GPT against BERT, and their report"),
    "evaluate": (_evaluate, "held-out loss and bits per byte of a run"),
}
