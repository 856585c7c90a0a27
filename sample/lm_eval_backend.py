"""lm-evaluation-harness over our runs, causal, masked and hybrid: `lm-eval run --model bothways --model_args run=runs/x`.

Registered by the entry point in pyproject.toml; for releases of lm-eval that do not look for entry points, importing this
module registers it too. Needs the extra `lmeval`.
"""

import collections
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from bothways.errors import InputError
from bothways.log import log
from bothways.rundir import directory, load_run
from bothways.sample.continuations import Continuations
from bothways.sample.diffusion import DiffusionModel
from bothways.sample.evaluate import Metric
from bothways.sample.masked import MaskedModel
from bothways.sample.open import open_model
from bothways.sample.text import Sample


@register_model("bothways")
class BothwaysLM(TemplateLM):
    """A run as a model of lm-eval.

    Args:
      run: a run directory, or a loaded model.
      rule: how a continuation is scored. causal: read forward. pll_word (the default of masked runs) and pll: each of its
        tokens hidden in turn, all of the context and of the rest of the continuation in sight. A pseudo-log-likelihood is
        no probability: it ranks choices, and perplexities of it mean little; rolling likelihoods use rule bound instead.
        bound (the default of runs trained by diffusion): a lower bound on the continuation's log-likelihood, with the
        context never hidden; whether the continuation is the most likely one is not known, and is answered by no.
      add_bos: put [CLS] before every context, as our runs were trained. False for weights that knew no such token.

    Raises:
      InputError: no run, or a rule that it cannot be scored by.
    """

    def __init__(self, run: Any, rule: str = "", add_bos: bool | str = True, **_: Any):
        super().__init__()
        self.model = open_model(load_run(directory(run), log)) if isinstance(run, str | Path) else run
        self.tokens = self.model.tokenizer
        self.add_bos = str(add_bos) != "False"
        self.continuations = Continuations(self.model, rule, self.add_bos)
        self.rule, self.scorer = self.continuations.rule, self.continuations.scorer

    @property
    def eot_token_id(self) -> int:
        return self.tokens.eos

    @property
    def prefix_token_id(self) -> int:
        return self.tokens.bos

    @property
    def max_length(self) -> int:
        return self.model.recipe.model.context_length

    @property
    def tokenizer_name(self) -> str:
        return self.tokens.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self.tokens.encode(string)

    def _loglikelihood_tokens(self, requests: list, disable_tqdm: bool = False, **_: Any) -> list[tuple[float, bool]]:
        return self.continuations.score([(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts: of a model read forward in windows that overlap by half; of others, rule bound."""
        rule = "causal" if self.rule == "causal" else "bound"
        model = self.model if rule == "causal" else self.scorer
        return [score.logprob or 0.0 for score in model.score([request.args[0] for request in requests], rule)]

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """What each context is continued by, until a stop string; greedily unless the task says `do_sample`.

        A context is read as log-likelihoods read it: behind [CLS] where those have it, without its beginning where it is
        too long. What is continued in the same way goes through the model together.
        """
        found, groups = [""] * len(requests), dict[tuple, list[int]]()
        drawn = collections.Counter[str]()
        for i, request in enumerate(requests):
            context, how = request.args
            options = generation_options(how, self.max_length)
            if not options["greedy"]:  # a context that comes again gets a draw of its own
                options["seed"], drawn[context] = drawn[context], drawn[context] + 1
            groups.setdefault(tuple(options.items()), []).append(i)
        for settings, members in groups.items():
            samples = self._written([requests[i].args[0] for i in members], dict(settings))
            for i, sample in zip(members, samples, strict=True):
                found[i] = sample.text
        return found

    def _written(self, contexts: list[str], options: dict[str, Any]) -> list[Sample]:
        writer = self.model if self.rule == "causal" else self.scorer
        start = [self.tokens.bos] * self.add_bos
        longest = writer.room() if isinstance(writer, DiffusionModel) else self.max_length
        room = max(longest - options["max_tokens"], longest // 2) - len(start)
        if isinstance(writer, MaskedModel | DiffusionModel):  # they put [CLS] there themselves
            return writer.sample(
                [self._end_of(context, room - self.continuations.closing) for context in contexts], **options
            )
        rows = [[*start, *self.tokens.encode(context)[-room:]] or [self.tokens.bos] for context in contexts]
        return writer.sample(contexts, encoded=rows, **options)

    def _end_of(self, text: str, room: int) -> str:
        """The last `room` tokens of a text, as it is written."""
        spans = self.tokens.encode_with_offsets(text)
        return text[spans[-room][1] :] if len(spans) > room else text


def generation_options(how: dict[str, Any], most: int) -> dict[str, Any]:
    """A task's generation settings in our sampler's words; at most `most` tokens."""
    stop = how.get("until") or ()
    temperature = float(how.get("temperature", 1.0))
    greedy = not how.get("do_sample") or temperature == 0
    drawing = {} if greedy else {name: how[name] for name in ("top_k", "top_p", "min_p") if how.get(name) is not None}
    return {
        "max_tokens": max(1, min(int(how.get("max_gen_toks", 64)), most)),
        "stop": (stop,) if isinstance(stop, str) else tuple(s for s in stop if s),
        "greedy": greedy,
        "temperature": 1.0 if greedy else temperature,
    } | drawing


def check(tasks: Sequence[str], tasks_from: Path | None = None, shots: int | None = None) -> Any:
    """The harness' task manager.

    Raises:
      InputError: no such task, or fewer than no demonstrations.
    """
    from lm_eval.tasks import TaskManager

    if shots is not None and shots < 0:
        raise InputError(f"shots is {shots}; it must be 0 or more demonstrations")
    if tasks_from is not None and not tasks_from.is_dir():
        raise InputError(f"--tasks-from {tasks_from} is no directory; give one with the YAML files of tasks")
    manager = TaskManager(include_path=str(tasks_from) if tasks_from else None)
    if unknown := [t for t in tasks if t not in manager.all_tasks]:
        raise InputError(
            f"lm-eval has no task {unknown[0]!r}; `lm-eval ls tasks` lists them, --tasks-from DIR adds your own"
        )
    return manager


def evaluate(
    model: Any,
    tasks: Sequence[str],
    shots: int | None,
    rule: str = "",
    tasks_from: Path | None = None,
    limit: int | None = None,
) -> list[Metric]:
    """Tasks of lm-evaluation-harness: a figure per metric, with its 95 % interval from the harness' standard error.

    Args:
      shots: demonstrations drawn from the training split before each question, as in GPT-3 (arXiv 2005.14165, 2.4).
      tasks_from: a folder with task definitions of your own.
      limit: items per task; None for all.

    Raises:
      InputError: no such task, or data that cannot be had here.
    """
    import lm_eval

    manager = check(tasks, tasks_from, shots)
    backend = BothwaysLM(model, rule)
    try:
        found = lm_eval.simple_evaluate(
            backend, tasks=list(tasks), num_fewshot=shots, task_manager=manager, limit=limit, log_samples=False
        )
    except (ConnectionError, FileNotFoundError) as e:
        raise InputError(f"the data of {', '.join(tasks)} cannot be had here: {' '.join(str(e).split())[:200]}") from e
    figures = []
    for task, values in found["results"].items():
        n = found.get("n-samples", {}).get(task, {}).get("effective", 0)
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or not kind:
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            half = 1.96 * error if isinstance(error, int | float) else 0.0
            name = metric if kind == "none" else f"{metric} ({kind})"
            figures.append(Metric(f"lm-eval:{task}", name, float(value), (value - half, value + half), int(n), "items"))
    return figures
