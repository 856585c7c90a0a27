"""What no published family computes leaves as a family of its own: with its configuration and modelling files in PyTorch."""

import dataclasses
import shutil
from pathlib import Path

from bothways.config import ObjectiveConfig
from bothways.convert.family import Config
from bothways.convert.heads import labels_json, suffix_for
from bothways.convert.layout import Layout, Shapes
from bothways.data.config import DataConfig
from bothways.errors import InputError
from bothways.model.config import RotaryScaling, TransformerConfig
from bothways.recipes import Recipe
from bothways.rundir import TaskInfo

NAME = "bothways"
BODIES, LAYERS, TASKS = "modeling_bothways", "modeling_bothways_layers", "modeling_bothways_tasks"
HEADS = ("mlm", "nsp", "lm_head", "task_head")
"""Modules beside the body; the body's own are under `model`, as everywhere in `transformers`."""
DIRECTIONS = ("causal_share", "block_sizes")
"""Fields of the objective that say in which directions, or blocks, a run was trained."""
AUTO = {
    "CausalLM": "AutoModelForCausalLM",
    "MaskedLM": "AutoModelForMaskedLM",
    "ConditionalGeneration": "AutoModelForSeq2SeqLM",
    "SequenceClassification": "AutoModelForSequenceClassification",
    "TokenClassification": "AutoModelForTokenClassification",
    "QuestionAnswering": "AutoModelForQuestionAnswering",
    "MultipleChoice": "AutoModelForMultipleChoice",
    "Model": "AutoModel",
}


def architectures(recipe: Recipe, task: TaskInfo | None) -> list[str]:
    """What a run can be opened as, the first of them what it was trained for."""
    if task is not None:
        return [suffix_for(task)]
    if recipe.family == "bert":
        return ["MaskedLM"] if recipe.model.masked_head else ["Model"]
    if recipe.family == "seq2seq":
        return ["ConditionalGeneration"]
    both = {"hybrid": ["CausalLM", "MaskedLM"], "diffusion": ["MaskedLM", "CausalLM"]}
    return both.get(recipe.objective.kind, ["CausalLM"])


def config_json(recipe: Recipe, task: TaskInfo | None, roles: dict[str, int]) -> Config:
    """config.json of a run.

    Args:
      roles: role -> the token's id.
    """
    kinds = architectures(recipe, task)
    opens = {AUTO[kind]: f"{TASKS if task else BODIES}.Bothways{_class(kind)}" for kind in kinds}
    opens |= {"AutoConfig": f"{BODIES}.BothwaysConfig", "AutoModel": f"{BODIES}.BothwaysModel"}
    found = {
        "model_type": NAME,
        "architectures": [f"Bothways{_class(kinds[0])}"],
        "auto_map": opens,
        "family": recipe.family,
        "objective": recipe.objective.kind,
        "trained_in": {name: getattr(recipe.objective, name) for name in DIRECTIONS},
        "model": dataclasses.asdict(recipe.model.resolved()),
        "data": {name: getattr(recipe.data, name) for name in ("source_field", "target_field")},
        "task": task and dataclasses.asdict(task),
        "dtype": "float32",
    }
    found |= labels_json(task) if task is not None else {}
    return found | {f"{role}_token_id": token for role, token in roles.items()}


def modelling_class(recipe: Recipe, task: TaskInfo | None) -> str:
    """File and class that compute what the run's module does when it is called; of a gpt the causal direction."""
    kinds = architectures(recipe, task)
    return f"{TASKS if task else BODIES}.Bothways{_class('CausalLM' if 'CausalLM' in kinds else kinds[0])}"


def _class(kind: str) -> str:
    return kind if kind == "Model" else f"For{kind}"


def save_modelling_files(home: Path, task: TaskInfo | None) -> None:
    """Write the modelling files beside the weights."""
    for name in (BODIES, LAYERS, *([TASKS] if task else [])):
        shutil.copyfile(Path(__file__).with_name(f"{name}.py"), home / f"{name}.py")


def recipe_of(theirs: Config) -> tuple[Recipe, TaskInfo | None]:
    """Family, model and objective of an exported run, and the task that it was fine-tuned for.

    Raises:
      InputError: config.json is not as an export writes it.
    """
    try:
        fields = {name: value for name, value in theirs["model"].items() if name != "lora"}  # merged before it left
        fields |= {
            "layer_pattern": tuple(fields["layer_pattern"]),
            "rotary_scaling": RotaryScaling(**fields["rotary_scaling"]),
        }
        task = theirs["task"] and TaskInfo(
            **theirs["task"] | {name: tuple(theirs["task"][name]) for name in ("labels", "metrics")}
        )
        said = theirs.get("trained_in", {})  # older exports do not say
        trained_in = {name: tuple(v) if isinstance(v, list) else v for name, v in said.items() if name in DIRECTIONS}
        recipe = Recipe(
            family=theirs["family"],
            model=TransformerConfig(**fields),
            objective=ObjectiveConfig(theirs["objective"], **trained_in),
            data=DataConfig(**theirs["data"]),
        )
    except (KeyError, TypeError, ValueError) as e:
        raise InputError(
            f"config.json of this {NAME} is not as `bothways export` writes it: {type(e).__name__} {e}; "
            "upgrade bothways, or export it again"
        ) from e
    if problems := recipe.model.problems():
        raise InputError("config.json makes a model that cannot be:\n" + "\n".join(f"  - {p}" for p in problems))
    return recipe, task


def layout_of(shapes: Shapes) -> Layout:
    """Every module under its own name: `decoder/stack/blocks/mlp/up` is `model.decoder.layers.{}.mlp.up`."""
    table = {}
    for path in shapes:
        module = path.rpartition("/")[0]
        name = module.removeprefix("body/").replace("/stack/blocks/", "/layers/{}/").replace("/", ".")
        table[name if name.split(".")[0] in HEADS else f"model.{name}"] = module
    return Layout("body", table)


def absent(recipe: Recipe, task: TaskInfo | None, layout: Layout, shapes: Shapes) -> set[str]:
    """Tensors that an export leaves out: the first norm of a model without one, and heads that a task does not read."""
    unread = () if task is None else ("mlm.", "lm_head.", "nsp.classes.")
    names = [name for name, _, _ in layout.names(shapes)]
    first = {n for n in names if ".layers.0.attention_norm." in n and not recipe.model.first_norm}
    return first | {n for n in names if n.startswith(unread)}
