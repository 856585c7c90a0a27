"""`bothways predict`: labels from a fine-tuned run, or, with examples in the prompt, from one that is not."""

from pathlib import Path

import tyro

from bothways.commands.shared import emit, read_lines
from bothways.errors import InputError
from bothways.log import log

Positional = tyro.conf.Positional


def predict(
    run: Positional[str],
    file: Positional[Path | None] = None,
    shots: int | None = None,
    task: str = "",
    rule: str = "",
    words: tuple[str, ...] = (),
    seed: int = 0,
    text_field: str = "text",
    pair_field: str = "text_b",
    label_field: str = "label",
    json: bool = False,
) -> None:
    """Predict labels, numbers, tags, spans or choices with a fine-tuned run; or, with --shots, with a run that was not
    tuned, from examples in the prompt.

    Args:
        run: A run directory that `bothways finetune` wrote; with --shots, one that predicts tokens.
        file: An item per line, its parts separated by tabs, or a table with the columns `text` and optionally `text_b`;
            without it, standard input; with --shots, the items that `finetune` reports on, and the task's metric.
        shots: Number of labelled examples before each item, drawn from the training items of --task (arXiv 2005.14165).
        task: For --shots: the labelled file or task, as for `finetune`.
        rule: For --shots: how an answer is scored: causal, pll, pll_word, bound; empty: as the run was trained.
        words: For --shots: LABEL=WORDS, the words for a label in the prompt; by default the label's name.
        seed: For --shots: the seed for drawing examples.
        text_field: For --task: the column that holds the text.
        pair_field: For --task: the column that holds the second text of a pair.
        label_field: For --task: the column that holds the label.
        json: One JSON object per line.
    """
    from bothways.rundir import directory, load_run
    from bothways.sample.batching import growing
    from bothways.sample.predict import TaskPredictor

    if (shots is None) != (not task):
        raise InputError("--shots K and --task TASK go together: K examples of TASK stand before each item")
    if shots is None:
        fields = {"--text-field": text_field != "text", "--pair-field": pair_field != "text_b"}
        fields |= {"--label-field": label_field != "label"}
        unused = {"--rule": rule, "--words": words, "--seed": seed} | fields
        if given := [name for name, value in unused.items() if value]:
            raise InputError(f"{', '.join(given)} is for --shots; a fine-tuned run draws no examples: leave it out")
        lines = read_lines(file, ("text", "text_b"))
        predictor = TaskPredictor(load_run(directory(run), log))
        for line in lines:  # all of them, before any is answered
            predictor.parse(line)
        for part in growing(lines):  # the first labels are shown while the rest waits
            for result in predictor.predict(part):
                emit(result, json, f"{result.label}\t{result.p}\t{result.text}")
        return

    import bothways
    from bothways.data import tasks
    from bothways.sample.shots import FewShotPredictor

    labelled = tasks.load(task, text=text_field, pair=pair_field, label=label_field)
    lines = None if file is None else read_lines(file, ("text", "text_b"))
    model = bothways.load(run)
    if getattr(model, "task", None) is not None:
        raise InputError(f"{run} is fine-tuned for {model.task.name}: leave --shots out, or use the run it came from")
    few = FewShotPredictor(model, labelled, shots, seed, rule, words)
    if lines is not None:
        for result in few.lines(lines):
            emit(result, json, f"{result.label}\t{result.p}\t{result.text}")
        return
    found = few.measure()
    low, high = found.interval
    shown = (
        f"{found.run}: {found.metric} {found.value:.3f} [{low:.3f}, {high:.3f}] on {found.n} items ({found.tested_on})"
    )
    emit(found, json, f"{shown}, {shots} shots, by {found.rule}")
