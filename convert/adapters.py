"""Low-rank adapters as PEFT keeps them: adapter_config.json and adapter_model.safetensors, in and out."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from bothways import rundir
from bothways.convert import heads
from bothways.convert.families import family_for
from bothways.convert.family import Family
from bothways.convert.fitting import origin_of
from bothways.convert.layout import Layout, shapes_of
from bothways.convert.run import Converted, save_params, whole_directory
from bothways.errors import InputError
from bothways.model import adapters
from bothways.model.config import LoRAConfig
from bothways.recipes import Recipe
from bothways.rundir import TaskInfo

Log = Callable[[str], None]
CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
CHANGE_THE_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Values of init_lora_weights with which PEFT changes the base, also when it loads an adapter."""
UNSUPPORTED = ("use_dora", "modules_to_save", "layers_to_transform", "layer_replication")
"""Settings of PEFT's that make another function than y = W x + alpha / r B A x on every layer."""


TASK_TYPES = {
    "SequenceClassification": "SEQ_CLS",
    "TokenClassification": "TOKEN_CLS",
    "QuestionAnswering": "QUESTION_ANS",
}
"""What PEFT calls a model with such a head; a choice has no name there."""


def family_of_base(base: Path, task: TaskInfo | None = None, bias: np.ndarray | None = None) -> tuple[Recipe, Family]:
    """The recipe of a run and the published family that computes what it does, under a task's head whose output layer has
    this bias.

    Raises:
      InputError: no run, or no family: PEFT's files name the projections of a published model.
    """
    recipe, tokenizer = rundir.read_recipe(base), rundir.Tokenizer.load(base)
    plain = dataclasses.replace(recipe.model.resolved(), lora=LoRAConfig())
    differences = None
    if task is not None:
        ends_in_pad = tokenizer.pad == tokenizer.eos
        differences = lambda family: heads.differences(family, task, plain, bias, ends_in_pad)  # noqa: E731
    family = family_for(plain, recipe.family, tokenizer.pad, origin_of(base).get("family", ""), differences)
    if family.layout.by_head or family.paired:
        raise InputError(f"adapters of a {family.name}, whose queries and keys lie otherwise there, are not supported")
    return recipe, family


def laid_out(family: Family, recipe: Recipe, task: TaskInfo | None) -> tuple[Layout, Any, set[str]]:
    """How a published model, under a task's head if there is one, lies: its layout, our shapes, the tensors it lacks."""
    model = dataclasses.replace(recipe.model, lora=LoRAConfig())
    if task is None:
        return (
            family.layout,
            shapes_of(rundir.param_shapes(dataclasses.replace(recipe, model=model))),
            family.absent(model),
        )
    suffix = heads.suffix_for(task)
    absent, body = heads.absent(family, suffix, model), heads.body_config(family, suffix, model)
    shapes = shapes_of(heads.flat(rundir.param_shapes(dataclasses.replace(recipe, model=body), task)))
    return heads.layout_of(family, suffix, body), shapes, absent


def matrices(
    family: Family, recipe: Recipe, task: TaskInfo | None = None
) -> Iterator[tuple[str, int, tuple[str, ...], list[tuple[int, int]]]]:
    """(module, layer, our projections, their inputs and outputs) of every matrix in the blocks of a published model."""
    layout, shapes, absent = laid_out(family, recipe, task)
    for name, ours, layer in layout.names(shapes, absent):
        if layer is not None and ours[0].endswith("/kernel"):
            cut = [2 if path.endswith("/out/kernel") else 1 for path in ours]
            sizes = [
                (int(np.prod(shapes[p][1 : 1 + c])), int(np.prod(shapes[p][1 + c :])))
                for p, c in zip(ours, cut, strict=True)
            ]
            yield name.removesuffix(".weight"), layer, tuple(p.removesuffix("/kernel") for p in ours), sizes


def to_peft(
    family: Family, recipe: Recipe, params: dict, task: TaskInfo | None = None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """PEFT's tensors, and its adapter_config.json, of our adapters, and of a task's head, which PEFT keeps whole beside them
    (modules_to_save).

    Projections that the published model has as one matrix become one adapter of their ranks' sum: its A is theirs one
    under the other, its B theirs along the diagonal.
    """
    flat, lora = flatten_dict(params if task is None else heads.flat(params), sep="/"), recipe.model.lora
    tensors, targets, several = {}, set(), {}
    for module, layer, ours, sizes in matrices(family, recipe, task):
        there = [f"{path}/{adapters.NAME}/a" in flat for path in ours]
        if not any(there):
            continue
        count = sum(there)
        a, b = np.zeros((count * lora.rank, sizes[0][0]), np.float32), []
        for i, (path, (inputs, outputs)) in enumerate((p, s) for p, s, t in zip(ours, sizes, there, strict=True) if t):
            rows = slice(i * lora.rank, (i + 1) * lora.rank)
            a[rows] = np.asarray(flat[f"{path}/{adapters.NAME}/a"][layer]).reshape(inputs, lora.rank).T
            b.append((path, rows, np.asarray(flat[f"{path}/{adapters.NAME}/b"][layer]).reshape(lora.rank, outputs).T))
        whole, begin = np.zeros((sum(outputs for _, outputs in sizes), count * lora.rank), np.float32), 0
        for path, (_, outputs) in zip(ours, sizes, strict=True):
            for other, rows, block in b:
                if other == path:
                    whole[begin : begin + outputs, rows] = block
            begin += outputs
        target = module.rpartition(".")[2]
        targets.add(target)
        if count > 1:
            several[target] = count
        tensors[f"{PREFIX}{module}.lora_A.weight"], tensors[f"{PREFIX}{module}.lora_B.weight"] = a, whole
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if recipe.family == "gpt" else None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(targets),
        "bias": "none",
        "fan_in_fan_out": not family.layout.transposed,
        "rank_pattern": {target: count * lora.rank for target, count in several.items()},
        "alpha_pattern": {target: count * lora.alpha for target, count in several.items()},
        "inference_mode": True,
        "base_model_name_or_path": "",
    }
    if task is not None:
        layout, shapes, absent = laid_out(family, recipe, task)
        head = {path: x for path, x in flat.items() if path.startswith("task_head/")}
        names = [name for name, ours, _ in layout.names(shapes, absent) if ours[0] in head]
        whole = layout.stored(unflatten_dict(head, sep="/"), absent)
        tensors |= {f"{PREFIX}{name}": np.asarray(whole[name], np.float32) for name in names}
        config["modules_to_save"] = sorted({name.partition(".")[0] for name in names})
        config["task_type"] = TASK_TYPES.get(heads.suffix_for(task))
    return tensors, config


def export_adapters(home: Path, destination: Path, log: Log) -> Converted:
    """Write the adapters of a run as PEFT's files, unmerged; of a fine-tuned one its head too.

    Raises:
      InputError: a run without adapters, or whose base, under such a head, is no published family; or there is something at
        the destination.
    """
    (recipe, params), task = rundir.load_adapters(home, log), rundir.read_task(home)
    bias = None if task is None else np.asarray(params["task_head"]["bias"])
    base, family = family_of_base(rundir.base_of(home)[0], task, bias)
    tensors, config = to_peft(family, dataclasses.replace(base, model=recipe.model.resolved()), params, task)
    with whole_directory(destination) as partial:
        save_file(tensors, partial / WEIGHTS, {"format": "pt"})
        (partial / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return Converted(str(destination), family.name, sum(t.size for t in tensors.values()), None)


def import_adapters(source: Path, home: Path, base: Path, log: Log) -> Converted:
    """PEFT's files become a run of adapters for a base.

    Raises:
      InputError: files that are no LoRA of PEFT's, or of another function than ours; adapters of other widths, or for
        projections that the base does not have; or there is something at `home`. Nothing is written then.
    """
    config = read_config(source)
    recipe, family = family_of_base(base)
    if not (source / WEIGHTS).is_file():
        raise InputError(f"{source} has no {WEIGHTS}")
    found = load_file(source / WEIGHTS)
    named: dict[str, list[tuple[int, np.ndarray, np.ndarray]]] = {}
    left, ranks, scales = set(found), [], []
    for module, layer, ours, sizes in matrices(family, recipe):
        names = [f"{PREFIX}{module}.lora_{x}.weight" for x in "AB"]
        if names[0] not in found:
            continue
        left -= set(names)
        if names[1] not in found:
            raise InputError(f"{source / WEIGHTS} has {names[0]} and not {names[1]}")
        a, b = (found[name].astype(np.float32) for name in names)
        wanted = [(a.shape[0], sizes[0][0]), (sum(o for _, o in sizes), a.shape[0])]
        if [a.shape, b.shape] != wanted:
            raise InputError(
                f"{module}: the adapter is {list(a.shape)} and {list(b.shape)}, and {base} wants {list(wanted[0])} and "
                f"{list(wanted[1])}: it is of another width than this base"
            )
        ranks.append(a.shape[0])
        scales.append(scale_of(config, module, a.shape[0]))
        b, begin = b * (scales[-1] / scales[0]), 0  # one scale for all; of a plain LoRA, its own
        for path, (_, outputs) in zip(ours, sizes, strict=True):
            named.setdefault(path, []).append((layer, a.T, b[begin : begin + outputs].T))
            begin += outputs
    if left or not named:
        raise InputError(
            f"{source / WEIGHTS} has adapters for {', '.join(sorted(left)[:3]) or 'nothing'}: no projections in the blocks "
            f"of {base}, a {family.name}"
        )
    rank, targets = max(ranks), tuple(sorted({path.rpartition("/")[2] for path in named}))
    lora = LoRAConfig(rank=rank, alpha=scales[0] * rank, dropout=float(config.get("lora_dropout", 0.0)), targets=targets)
    model = dataclasses.replace(recipe.model, lora=lora)
    adapted = dataclasses.replace(
        recipe, name=home.name, model=model, train=dataclasses.replace(recipe.train, init_from=str(base))
    )
    flat = {
        path: np.zeros(shape.shape, np.float32)
        for path, shape in flatten_dict(adapters.split(rundir.param_shapes(adapted))[0], sep="/").items()
    }
    for path, layers in named.items():
        for layer, a, b in layers:
            mine = flat[f"{path}/{adapters.NAME}/a"], flat[f"{path}/{adapters.NAME}/b"]
            mine[0][layer].reshape(-1, rank)[:, : a.shape[1]] = a
            mine[1][layer].reshape(rank, -1)[: b.shape[0]] = b
    with whole_directory(home) as partial:
        rundir.Tokenizer.load(base).save_in(partial)
        rundir.write_base(partial, base)
        save_params(partial, unflatten_dict({tuple(path.split("/")): x for path, x in flat.items()}))
        (partial / "recipe.json").write_text(adapted.to_json())
    log(f"adapters of rank {rank} on {', '.join(targets)} for {base}")
    return Converted(str(home), family.name, sum(x.size for x in flat.values()), None)


def read_config(source: Path) -> dict[str, Any]:
    """adapter_config.json. Raises InputError where it is none, or of an adapter that is no plain LoRA."""
    try:
        config = json.loads((source / CONFIG).read_text())
    except (OSError, json.JSONDecodeError) as e:
        raise InputError(f"{source / CONFIG} cannot be read: {e}") from e
    if config.get("peft_type") != "LORA":
        raise InputError(f"{source / CONFIG}: peft_type is {config.get('peft_type')!r}; only LORA is supported")
    given = [name for name in UNSUPPORTED if config.get(name)]
    if config.get("bias", "none") != "none":
        given.append("bias")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGE_THE_BASE):
        given.append(f"init_lora_weights={start}")
    if given:
        raise InputError(f"{source / CONFIG}: {', '.join(given)} make another function than plain LoRA computes")
    return config


def scale_of(config: dict[str, Any], module: str, rank: int) -> float:
    """What PEFT multiplies the adapter of a module by: alpha / r, or alpha / sqrt(r) (arXiv 2312.03732)."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next((a for key, a in patterns.items() if module == key or module.endswith(f".{key}")), config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
