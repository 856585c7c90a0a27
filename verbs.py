"""The verbs of the command line: each a thin face over a Python function."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from common.errors import InputError
from common.recipe import Recipe
from configs import find
from convert.verbs import export_verb, import_verb

Positional = tyro.conf.Positional


if TYPE_CHECKING:
    from sample.embed import Embedder
    from sample.masked import MaskedModel
    from sample.predict import TaskPredictor
    from sample.text import TextModel


def load(home: str | Path) -> "TextModel | MaskedModel | Embedder | TaskPredictor":
    """A trained run, ready to be asked: `sample` and `score`; `fill` and `embed` where its family can."""
    from common.rundir import load_run
    from sample.embed import Embedder
    from sample.masked import MaskedModel
    from sample.predict import TaskPredictor
    from sample.text import TextModel

    run = load_run(Path(home), say)
    if run.task is not None:
        return TaskPredictor(run)
    if run.recipe.family == "bert":
        return MaskedModel(run) if run.recipe.model.masked_head else Embedder(run)
    return TextModel(run)


def say(message: str) -> None:
    print(message, file=sys.stderr)


def _emit(value: Any, as_json: bool, shown: str) -> None:
    value = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
    print(json.dumps(value, ensure_ascii=False) if as_json else shown, flush=True)


def _train(argv: list[str]) -> None:
    if not argv or argv[0].startswith("-"):
        if argv and argv[0] in ("-h", "--help"):
            print("usage: bothways train RECIPE-OR-RUN [--workdir DIR] [--json] [--SECTION.FIELD VALUE ...]\n\nrecipes:")
            from configs import names

            for name, known in sorted(names().items()):
                print(f"  {name:20s} {known.family}, {known.model.n_layers} layers, {known.model.d_model} wide")
            print("\n`bothways train RECIPE --help` lists every field.")
            return
        raise InputError("train wants a recipe first: bothways train RECIPE [--workdir DIR] [--SECTION.FIELD VALUE ...]")
    base = _on_from(Path(argv[0])) if (Path(argv[0]) / "recipe.json").is_file() else find(argv[0])

    @dataclasses.dataclass(frozen=True)
    class Arguments:
        recipe: Annotated[Recipe, tyro.conf.arg(name="")]
        workdir: Path = Path("runs") / base.name
        """The run directory: made, or gone on with."""
        json: bool = False
        """Print the result as one JSON object."""

    given = tyro.cli(Arguments, prog=f"bothways train {argv[0]}", args=argv[1:], default=Arguments(base))
    from train.loop import train

    result = train(given.recipe, given.workdir)
    bpb = f", {result.bits_per_byte:.3f} bits per byte" if result.bits_per_byte is not None else ""
    shown = (
        f"{result.run}: {result.steps} steps in {result.seconds:.0f} s, {result.tokens_per_second:,.0f} tokens/s; "
        f"held-out loss {result.loss:.3f}{bpb}"
    )
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
    else:
        speech = model.sample([""], max_tokens=250, temperature=0.8, top_p=0.95)[0]
        say(f"--- what it says, unprompted:\n{speech.text.strip()}\n---")
    _emit(result, given.json, shown)


def _on_from(home: Path) -> Recipe:
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


def _sample(
    run: Positional[Path],
    prompts: Positional[tuple[str, ...]],
    max_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    greedy: bool = False,
    beams: int | None = None,
    num: int = 1,
    seed: int = 0,
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    chunk: int | None = None,
    steps: int | None = None,
    sweeps: int | None = None,
    stream: bool = False,
    json: bool = False,
) -> None:
    """Continue text: token by token, or, with a masked model, by chunks of masks at its end.

    Args:
        run: A run directory.
        prompts: Texts to continue; "" starts a document.
        max_tokens: Most tokens per continuation.
        temperature: Below 1 sharper, above 1 flatter; 0 is greedy.
        top_k: Draw among the K most likely tokens; 0 is off.
        top_p: Draw among the fewest tokens that hold this probability; 1 is off.
        min_p: Leave out tokens less likely than this share of the most likely; 0 is off.
        greedy: Always the most likely token.
        beams: Width of a beam search instead of sampling (causal models).
        num: Continuations of each prompt.
        seed: The same seed gives the same text.
        stop: End before this string; may be given several times.
        chunk: Masks filled together at the end of the text (masked models; 16).
        steps: Readings in which a chunk is filled, the surest token first (masked models; 16).
        sweeps: Times each token of a chunk is drawn again afterwards (masked models; 0).
        stream: Show the text while it is made (causal models).
        json: One JSON object per result.
    """
    if not prompts:
        raise InputError('sample wants at least one prompt after the run: bothways sample RUN "ROMEO:"')
    if stream and (len(prompts) * num > 1 or json):
        raise InputError("--stream shows one continuation as plain text: give one prompt, and neither --num nor --json")
    model = load(run)
    _able(model, "sample", "")
    masked = model.recipe.family == "bert"
    chosen = {"beams": beams, "chunk": chunk, "steps": steps, "sweeps": sweeps, "stream": stream or None}
    options: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    wrong = set(options) & ({"beams", "stream"} if masked else {"chunk", "steps", "sweeps"})
    if wrong:
        why = "fills chunks of masks and never goes left to right" if masked else "goes left to right and has no masks"
        raise InputError(f"--{min(wrong)} is not for a {model.recipe.family} run, which {why}")
    if stream:
        print(prompts[0], end="", flush=True)
        options["stream"] = lambda _, piece: print(piece, end="", flush=True)
    results = model.sample(
        prompts,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        greedy=greedy,
        num=num,
        seed=seed,
        stop=stop,
        **options,
    )
    if stream:
        print()
        return
    for i, result in enumerate(results):
        head = f"--- {i + 1} of {len(results)}\n" if len(results) > 1 else ""
        _emit(result, json, f"{head}{result.prompt}{result.text}")


def _fill(
    run: Positional[Path], texts: Positional[tuple[str, ...]], top: int = 5, steps: int = 1, json: bool = False
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
    for result in _able(load(run), "fill", "reads forward only, so what follows a mask could not help")(
        texts, top=top, steps=steps
    ):
        lines = ["  " + "  ".join(f"{c['token']!r} {c['p']:.3f}" for c in mask) for mask in result.masks]
        _emit(result, json, "\n".join([result.filled, *lines]))


def _embed(run: Positional[Path], file: Positional[Path | None] = None, pool: str = "mean", json: bool = False) -> None:
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
    if not hasattr(model, verb) and not model.recipe.model.masked_head:
        raise InputError(
            f"{model.run.home} is a body without a masked-token head: it can embed and be fine-tuned, but not {verb}; "
            "`bothways train` gives it a head and trains both"
        )
    if not hasattr(model, verb):
        raise InputError(f"a {model.recipe.family} run cannot {verb}: it {why}")
    return getattr(model, verb)


def _score(run: Positional[Path], file: Positional[Path | None] = None, rule: str = "", json: bool = False) -> None:
    """How likely each line is.

    Args:
        run: A run directory.
        file: A text per line; without it, standard input.
        rule: causal (the default of causal models), the log-probability of a text read forward; pll, each token given
            all others; pll_word (the default of masked models), the rest of its word hidden too; bound, a lower bound
            on the log-probability.
        json: One JSON object per line (the plain form shows log-probability, tokens, text).
    """
    texts = _lines(file)
    for result in _able(load(run), "score", "")(texts, **({"rule": rule} if rule else {})):
        _emit(result, json, f"{result.logprob:10.3f}  {result.tokens:4d}  {result.text}")


def _evaluate(run: Positional[Path], suites: Positional[tuple[str, ...]] = ("validation",), json: bool = False) -> None:
    """Held-out loss and bits per byte, with 95 % intervals.

    Args:
        run: A run directory.
        suites: validation or test: the run's own held-out text.
        json: One JSON object per figure.
    """
    from sample.evaluate import evaluate

    model = load(run)
    _able(model, "sample", "")
    for figure in evaluate(model, suites):
        low, high = figure.interval
        _emit(figure, json, f"{figure.suite} {figure.metric} {figure.value:.4f} [{low:.4f}, {high:.4f}] (n={figure.n})")


def _finetune(
    run: Positional[Path],
    task: Positional[str],
    workdir: Path | None = None,
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
    from common.rundir import load_run
    from data import tasks
    from train.finetune import FinetuneConfig
    from train.finetune import finetune as run_finetuning

    body = load_run(run, say)
    if body.task is not None:
        raise InputError(f"{run} is fine-tuned already, for {body.task.name}; start from the run it came from")
    labelled = tasks.load(task, text=text_field, pair=pair_field, label=label_field)
    home = workdir or Path("runs") / f"{run.name}-{labelled.name.replace('/', '-')}"
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


def _predict(run: Positional[Path], file: Positional[Path | None] = None, json: bool = False) -> None:
    """Labels, numbers, tags, spans or choices from a fine-tuned run.

    Args:
        run: A run directory that `bothways finetune` wrote.
        file: An item per line, its parts separated by tabs; without it, standard input.
        json: One JSON object per line.
    """
    from common.rundir import load_run
    from sample.predict import TaskPredictor

    lines = _lines(file)
    for result in TaskPredictor(load_run(run, say)).predict(lines):
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
    "evaluate": (_evaluate, "held-out loss and bits per byte of a run"),
    "import": (import_verb, "a published checkpoint becomes a run"),
    "export": (export_verb, "a run becomes a checkpoint that transformers opens"),
}
