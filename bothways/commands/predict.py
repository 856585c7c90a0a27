"""`bothways predict`: labels from a fine-tuned run."""

from pathlib import Path

import tyro

from bothways.commands.shared import emit, read_lines
from bothways.log import log

Positional = tyro.conf.Positional


def predict(run: Positional[str], file: Positional[Path | None] = None, json: bool = False) -> None:
    """Labels, numbers, tags, spans or choices from a fine-tuned run.

    Args:
        run: A run directory that `bothways finetune` wrote.
        file: An item per line, its parts separated by tabs, or a table with the columns `text` and maybe `text_b`;
            without it, standard input.
        json: One JSON object per line.
    """
    from bothways.rundir import directory, load_run
    from bothways.sample.batching import growing
    from bothways.sample.predict import TaskPredictor

    lines = read_lines(file, ("text", "text_b"))
    predictor = TaskPredictor(load_run(directory(run), log))
    for part in growing(lines):  # the first labels are shown while the rest waits
        for result in predictor.predict(part):
            emit(result, json, f"{result.label}\t{result.p}\t{result.text}")
