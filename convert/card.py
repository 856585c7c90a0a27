"""README.md of an exported directory: what the model is, how it is opened, its held-out figures, its licence."""

import json
from pathlib import Path

from bothways.recipes import Recipe
from bothways.rundir import TaskInfo

EVALUATED = "eval_"
"""How a run's log calls figures of text that was held out."""


def held_out(run: Path) -> dict[str, float]:
    """The figures of the last evaluation in a run's log; none where it has no log, as an imported run."""
    log = run / "metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")] if log.exists() else []
    found = next((line for line in reversed(lines) if any(name.startswith(EVALUATED) for name in line)), {})
    return {name: value for name, value in found.items() if name == "step" or name.startswith(EVALUATED)}


def model_card(
    recipe: Recipe, task: TaskInfo | None, opened_by: str, own_code: bool, figures: dict[str, float], license_: str
) -> str:
    """The text of the card.

    Args:
      opened_by: the class of `transformers` that opens the directory.
      own_code: the directory brings a modelling file.
      figures: `held_out`.
      license_: an identifier as the hub has it, such as apache-2.0; empty: none is stated.
    """
    model = recipe.model.resolved()
    trust = ", trust_remote_code=True" if own_code else ""
    lines = ["---", "library_name: transformers", *([f"license: {license_}"] if license_ else [])]
    lines += ["tags:", "- bothways", f"- {recipe.family}", "---", ""]
    lines += [f"# A {recipe.family} trained with bothways", ""]
    lines += ["    from transformers import AutoTokenizer, " + opened_by]
    lines += [
        f'    model = {opened_by}.from_pretrained("."{trust})',
        '    tokenizer = AutoTokenizer.from_pretrained(".")',
    ]
    lines += ["", "| | |", "|---|---|", f"| objective | {task.kind if task else recipe.objective.kind} |"]
    fields = ("vocab_size", "context_length", "n_layers", "d_model", "n_heads", "n_kv_heads", "d_ff")
    fields += ("position_embedding", "norm", "norm_position", "activation", "window")
    lines += [f"| {name} | {getattr(model, name)} |" for name in fields]
    lines += [f"| labels | {', '.join(task.labels)} |"] if task and task.labels else []
    if figures:
        lines += ["", f"Held-out text, at step {figures['step']:,}:", "", "| | |", "|---|---|"]
        lines += [f"| {k.removeprefix(EVALUATED)} | {v:.4f} |" for k, v in figures.items() if k.startswith(EVALUATED)]
    if not license_:
        lines += ["", "No licence is stated."]
    return "\n".join([*lines, ""])
