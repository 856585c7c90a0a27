"""The verbs of the command line: each a thin face over a Python function."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

import verbs_scale
import verbs_train
from common.config import MeshConfig
from common.errors import InputError
from compare.verb import compare
from convert.verbs import export_verb, import_verb
from verbs_shared import ONE, emit, load, say

Positional = tyro.conf.Positional
PROMPTS = 512
"""Prompts that are answered before the first is shown."""


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
    length_penalty: float | None = None,
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
        length_penalty: What a beam search's log-probabilities are divided by grows with length to this power (0.6).
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
        "length_penalty": length_penalty,
        "chunk": chunk,
        "steps": steps,
        "sweeps": sweeps,
        "stream": stream or None,
    }
    options: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    wrong = set(options) & ({"beams", "length_penalty", "stream"} if masked else {"chunk", "steps", "sweeps"})
    if wrong:
        why = "fills chunks of masks and never goes left to right" if masked else "goes left to right and has no masks"
        raise InputError(f"--{min(wrong).replace('_', '-')} is not for a {family} run, which {why}")
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
            emit(result, json, result.text if family == "seq2seq" else f"{head}{result.prompt}{result.text}")
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
        emit(result, json, "\n".join([result.filled, *lines]))


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
        emit({"text": text, "vector": values}, json, " ".join(f"{v:.6f}" for v in values))


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
        emit(result, json, f"{result.logprob:10.3f}  {result.tokens:4d}  {result.text}")


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
    figures = evaluate(model, own, say) if own else []  # a task needs nothing of the text that the run was trained on
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
        emit(figure, json, f"{figure.suite} {figure.metric} {figure.value:.4f} [{low:.4f}, {high:.4f}] (n={figure.n})")


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
        emit(result, json, f"{result.label}\t{result.p}\t{result.text}")


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
    "train": (verbs_train.train_verb, "train a recipe, or go on with a run"),
    "sample": (_sample, "continue text"),
    "fill": (_fill, "fill the masks of a text"),
    "embed": (_embed, "a vector for each line of a file"),
    "score": (_score, "how likely each line of a file is"),
    "finetune": (verbs_train.finetune_verb, "train a head and the whole stack on a labelled task"),
    "predict": (_predict, "labels from a fine-tuned run"),
    "plan": (verbs_scale.plan, "what a recipe would need on chips that are not here"),
    "launch": (verbs_scale.launch, "start a recipe on a slice or a cluster"),
    "compare": (compare, "the controlled experiments of GPT against BERT, and their report"),
    "evaluate": (_evaluate, "held-out loss and bits per byte of a run"),
    "import": (import_verb, "a published checkpoint becomes a run"),
    "export": (export_verb, "a run becomes a checkpoint that transformers opens"),
}
