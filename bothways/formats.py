"""Versions of what a run directory keeps, and how recipes of older versions are read.

recipe.json and task.json hold "format", a whole number. A version gets an entry here when a field is renamed, a value is
renamed, or a new field's default would change what an old run does.
"""

from pathlib import Path
from typing import Any

from bothways.errors import InputError

FORMAT = 2

RENAMED_FIELDS: dict[int, dict[str, str]] = {
    1: {
        "model.context": "model.context_length",
        "model.positions": "model.position_embedding",
        "model.vocab_multiple": "model.pad_vocab_to_multiple_of",
        "model.rotary_scaling.amplitude": "model.rotary_scaling.attention_factor",
        "objective.mask_share": "objective.mask_token_prob",
        "objective.random_share": "objective.random_token_prob",
        "optimizer.decay_share": "optimizer.decay_fraction",
        "optimizer.final_share": "optimizer.final_lr_ratio",
        "train.ramp_from": "train.batch_size_start",
        "train.ramp_rows": "train.batch_size_ramp_rows",
        "train.accumulate": "train.grad_accum_steps",
        "train.keep": "train.max_to_keep",
        "train.average": "train.average_last_checkpoints",
        "train.max_bad_steps": "train.max_nonfinite_steps",
        "mesh.max_copied": "mesh.max_replicated_fraction",
    }
}
"""Fields of version N by the names that version N + 1 gave them."""

RENAMED_VALUES: dict[int, dict[str, dict[str, str]]] = {1: {"model.layer_pattern": {"dense": "global"}}}
"""Values of version N, by field (its new name), that version N + 1 renamed."""

RENAMED_STATE = {"consecutive_nonfinite": "bad_in_row"}
"""What a checkpoint keeps of the training state, by today's name: the name in checkpoints of version 1."""


def old_names_of_state(home: Path, step: int) -> dict[str, str]:
    """Of a checkpoint: today's names of what it keeps under an older one -> that name."""
    listed = home / "checkpoints" / str(step) / "train" / "_METADATA"
    kept = listed.read_text() if listed.exists() else ""
    return {new: old for new, old in RENAMED_STATE.items() if f"'{old}'" in kept or f'"{old}"' in kept}


def version_of(values: dict[str, Any], where: str) -> int:
    """The format version of a JSON object; files from before there were versions are 1.

    Raises:
      InputError: the version is no whole number, or newer than this program.
    """
    version = values.get("format", 1)
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise InputError(f"{where} has format {version!r}; it must be a whole number, {FORMAT} today")
    if version > FORMAT:
        raise InputError(
            f"{where} has format {version}, and this version of bothways reads up to {FORMAT}; install a newer one"
        )
    return version


def upgrade_recipe(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's JSON object in today's names, without its version. Raises InputError as version_of does."""
    version = version_of(values, "recipe.json")
    values = {name: value for name, value in values.items() if name != "format"}
    for step in range(version, FORMAT):
        for old, new in RENAMED_FIELDS.get(step, {}).items():
            *path, name = old.split(".")
            section = _section(values, path)
            if section is not None and name in section:
                section[new.rpartition(".")[2]] = section.pop(name)
        for field, names in RENAMED_VALUES.get(step, {}).items():
            *path, name = field.split(".")
            section = _section(values, path)
            if section is not None and isinstance(section.get(name), list):
                section[name] = [names.get(value, value) if isinstance(value, str) else value for value in section[name]]
    return values


def _section(values: dict[str, Any], path: list[str]) -> dict[str, Any] | None:
    """The object at a path, None where something else stands there."""
    section: Any = values
    for name in path:
        section = section.get(name) if isinstance(section, dict) else None
    return section if isinstance(section, dict) else None
