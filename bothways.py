"""bothways: GPT, BERT and their ancestor from one stack of blocks. The front door: Python functions and the command line.

import bothways
bothways.train(bothways.recipe("shakespeare_gpt"), workdir="runs/x")
run = bothways.load("runs/x")
run.sample(["ROMEO:"])
"""

import dataclasses
import errno
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from common.errors import Diverged, InputError, Stopped
from common.recipe import Recipe
from configs import find

if TYPE_CHECKING:
    from sample.masked import MaskedModel
    from sample.text import TextModel
    from train.loop import Result

__all__ = ["InputError", "Recipe", "load", "main", "recipe", "train"]

Positional = tyro.conf.Positional


def recipe(name: str) -> Recipe:
    """A recipe by its name in configs/ or the path of a Python file."""
    return find(name)


def train(recipe: Recipe, workdir: str | Path) -> "Result":
    """Train a recipe into a run directory, or go on with the run that is there."""
    from train.loop import train as run_training

    return run_training(recipe, workdir)


def load(home: str | Path) -> "TextModel | MaskedModel":
    """A trained run, ready to be asked: `sample` and `score`; `fill` and `embed` where its family can."""
    from common.rundir import load_run
    from sample.masked import MaskedModel
    from sample.text import TextModel

    run = load_run(Path(home), _say)
    return MaskedModel(run) if run.recipe.family == "bert" else TextModel(run)


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def _emit(value: Any, as_json: bool, shown: str) -> None:
    value = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
    print(json.dumps(value, ensure_ascii=False) if as_json else shown, flush=True)


# ---- verbs: each a thin face over a Python function ---------------------------------------------------------------


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

    @dataclasses.dataclass(frozen=True)
    class Arguments:
        recipe: Annotated[Recipe, tyro.conf.arg(name="")]
        workdir: Path = Path("runs") / base.name
        """The run directory: made, or gone on with."""
        json: bool = False
        """Print the result as one JSON object."""

    given = tyro.cli(Arguments, prog=f"bothways train {argv[0]}", args=argv[1:], default=Arguments(base))
    result = train(given.recipe, given.workdir)
    bpb = f", {result.bits_per_byte:.3f} bits per byte" if result.bits_per_byte is not None else ""
    shown = (
        f"{result.run}: {result.steps} steps in {result.seconds:.0f} s, {result.tokens_per_second:,.0f} tokens/s; "
        f"held-out loss {result.loss:.3f}{bpb}"
    )
    model = load(given.workdir)
    if recipe.family == "bert":
        texts = ["To be, or [MASK] to be", "the [MASK] of the [MASK]", "I [MASK] you,"]
        for filled in model.fill(texts, top=3, steps=2):
            guesses = [" ".join(f"{t['token']!r} {t['p']:.2f}" for t in mask) for mask in filled.masks]
            _say(f"--- {filled.text}\n    {filled.filled}     {' | '.join(guesses)}")
    else:
        speech = model.sample([""], max_tokens=250, temperature=0.8, top_p=0.95)[0]
        _say(f"--- what it says, unprompted:\n{speech.text.strip()}\n---")
    _emit(result, given.json, shown)


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
    for text, vector in zip(texts, load(run).embed(texts, pool=pool), strict=True):
        values = [round(float(v), 6) for v in vector]
        _emit({"text": text, "vector": values}, json, " ".join(f"{v:.6f}" for v in values))


def _able(model: Any, verb: str, why: str) -> Callable[..., Any]:
    """The method of that name, or the reason why this family has none."""
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
    model = load(run)
    for result in model.score(texts, **({"rule": rule} if rule else {})):
        _emit(result, json, f"{result.logprob:10.3f}  {result.tokens:4d}  {result.text}")


def _evaluate(run: Positional[Path], suites: Positional[tuple[str, ...]] = ("validation",), json: bool = False) -> None:
    """Held-out loss and bits per byte, with 95 % intervals.

    Args:
        run: A run directory.
        suites: validation or test: the run's own held-out text.
        json: One JSON object per figure.
    """
    from sample.evaluate import evaluate

    for figure in evaluate(load(run), suites):
        low, high = figure.interval
        _emit(figure, json, f"{figure.suite} {figure.metric} {figure.value:.4f} [{low:.4f}, {high:.4f}] (n={figure.n})")


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
    "evaluate": (_evaluate, "held-out loss and bits per byte of a run"),
}


def _keep_compiled_programs() -> None:
    """Compiled programs are kept between starts, unless JAX is told otherwise by its own variable."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        import jax

        jax.config.update("jax_compilation_cache_dir", str(Path("~/.cache/bothways/xla").expanduser()))


def _disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if any(text in str(error) for text in ("No space left on device", "File too large", "Disk quota exceeded")):
            return True
        error = error.__cause__ or error.__context__
    return False


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit code: 0 done, 2 bad input, 1 anything else, 143 stopped by SIGTERM and saved."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: bothways VERB ...\n")
        for verb, (_, does) in VERBS.items():
            print(f"  {verb:10s} {does}")
        print("\n`bothways VERB --help` tells more.")
        return 0 if argv else 2
    verb, rest = argv[0], argv[1:]
    try:
        if verb not in VERBS:
            import difflib

            near = difflib.get_close_matches(verb, VERBS, n=1)
            raise InputError(
                f"no verb {verb!r}; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(VERBS)}")
            )
        _keep_compiled_programs()
        run = VERBS[verb][0]
        if verb == "train":
            run(rest)
        else:
            tyro.cli(run, prog=f"bothways {verb}", args=rest)
        return 0
    except InputError as e:
        _say(f"bothways {verb}: {e}")
        return 2
    except KeyboardInterrupt:
        _say(f"bothways {verb}: interrupted")
        return 130
    except SystemExit as e:  # tyro has said what was wrong
        return e.code if isinstance(e.code, int) else 2
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (whoever read us has gone)
        return 0
    except (Stopped, Diverged) as e:
        _say(f"bothways {verb}: {e}")
        return 143 if isinstance(e, Stopped) else 1
    except Exception as e:
        if _disk_full(e):
            _say(
                f"bothways {verb}: the disk is full; free some space and run the same command again: "
                "it goes on from the last checkpoint"
            )
            return 2
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    sys.exit(main())
