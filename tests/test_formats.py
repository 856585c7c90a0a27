"""Runs of format 1, from before recipes had a version, still open: their fields, and the names of their parameters."""

import copy
import functools
import json

import jax
import pytest

from bothways import rundir
from bothways.formats import FORMAT, RENAMED_FIELDS, RENAMED_VALUES
from bothways.model.axes import path_names
from bothways.recipes import Recipe

MODEL = {
    "vocab_size": 600, "vocab_multiple": 1, "context": 128, "n_layers": 2, "d_model": 32, "n_heads": 2, "n_kv_heads": 2,
    "d_head": 16, "d_value": 16, "d_ff": 128, "positions": "rotary", "rotary_base": 10000.0, "rotary_base_local": 0.0,
    "rotary_scaling": {"kind": "none", "factor": 1.0, "original_context": 0, "low": 1.0, "high": 4.0, "amplitude": 0.0},
    "norm": "rms", "norm_position": "pre", "norm_eps": 1e-05, "activation": "relu2", "bias": False, "qk_norm": False,
    "window": 0, "layer_pattern": ["dense"], "segment_types": 0, "first_norm": True, "embed_norm": False,
    "embed_scale": False, "tie_embeddings": False, "masked_head": True, "next_sentence": False, "pooler": False,
    "dropout_embed": 0.0, "dropout_attention": 0.0, "dropout_residual": 0.0, "init": "normal", "init_std": 0.02,
    "init_residual": "zero", "dtype": "auto", "attention": "auto", "scan_layers": False, "remat": "none",
}  # fmt: skip
RECIPE = {
    "name": "shakespeare_gpt", "family": "gpt", "model": MODEL,
    "data": {"corpus": "shakespeare", "validation": "", "text_field": "text", "source_field": "", "target_field": "",
             "tokenizer": "unigram", "vocab_size": 600, "separate_documents": True, "cache": "~/.cache/bothways"},
    "objective": {"kind": "causal", "causal_share": 0.5, "mask_rate": 0.15, "span_length": 3.0, "mask_share": 0.8,
                  "random_share": 0.1, "whole_words": False, "next_sentence": False, "label_smoothing": 0.0},
    "optimizer": {"name": "muon", "learning_rate": 0.01, "adam_learning_rate": 0.01, "schedule": "linear",
                  "warmup_steps": 2, "decay_steps": 0, "decay_share": 0.2, "final_share": 0.0, "b1": 0.9, "b2": 0.95,
                  "eps": 1e-08, "momentum": 0.95, "weight_decay": 0.01, "clip_norm": 1.0},
    "train": {"steps": 12, "batch_size": 8, "ramp_from": 0, "ramp_rows": 0, "short_length": 0, "short_steps": 0,
              "accumulate": 1, "seed": 0, "init_from": "", "max_bad_steps": 10, "log_every": 20, "eval_every": 1000,
              "eval_rows": 16, "save_every": 6, "keep": 1, "average": 1},
    "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "context": 1, "max_copied": 0.1},
}  # fmt: skip
"""What a small run of version 0.1.0 keeps in recipe.json."""

FAMILIES = {
    "gpt": {},
    "bert": {"family": "bert", "model": MODEL | {"segment_types": 2, "tie_embeddings": True, "next_sentence": True},
             "objective": RECIPE["objective"] | {"kind": "masked", "next_sentence": True}},
    "seq2seq": {"family": "seq2seq", "model": MODEL | {"tie_embeddings": True},
                "objective": RECIPE["objective"] | {"kind": "spans"}},
    "tuned": {},
}  # fmt: skip
FAMILIES["tuned"] = FAMILIES["bert"]


def stack(name: str, cross: bool = False) -> list[str]:
    """Parameters of a stack of blocks and of the norm after it."""
    attention = [
        f"{part}/{x}/kernel" for part in ("attention", *["cross"] * cross) for x in ("key", "out", "query", "value")
    ]
    norms = [f"{part}_norm/scale" for part in ("attention", *["cross"] * cross, "mlp")]
    blocks = [*attention, *norms, "mlp/down/kernel", "mlp/up/kernel"]
    return [f"{name}/final_norm/scale", *(f"{name}/stack/blocks/{block}" for block in blocks)]


BERT = [*stack("encoder"), "encoder/embed/segment/embedding", "encoder/embed/token/embedding", "mlm/bias",
        "mlm/dense/kernel", "mlm/norm/scale", "nsp/classes/kernel", "nsp/pooler/kernel"]  # fmt: skip
PARAMETERS = {
    "gpt": [*stack("decoder"), "decoder/embed/token/embedding", "lm_head/embedding"],
    "bert": BERT,
    "seq2seq": [*stack("encoder"), *stack("decoder", cross=True), "embed/token/embedding"],
    "tuned": [*(f"body/{name}" for name in BERT), "task_head/kernel", "task_head/bias"],
}
"""Under which names checkpoints of version 0.1.0 hold their arrays."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_of_format_1_is_read_and_its_arrays_have_their_names(family, tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE | FAMILIES[family]))
    if family == "tuned":
        task = {"name": "rev", "kind": "classify", "labels": ["neg", "pos"], "length": 128, "metrics": ["accuracy"]}
        (tmp_path / "task.json").write_text(json.dumps(task | {"pool": "mean"}))
    recipe, task = rundir.read_recipe(tmp_path), rundir.read_task(tmp_path)
    recipe.check(1)
    paths, _ = jax.tree_util.tree_flatten_with_path(rundir.param_shapes(recipe, task))
    shapes = {"/".join(path_names(path)): leaf.shape for path, leaf in paths}
    assert sorted(shapes) == sorted(PARAMETERS[family])
    found = {name.rpartition("blocks/")[2]: shape for name, shape in shapes.items()}
    assert (found["attention/query/kernel"], found["attention/out/kernel"]) == ((2, 32, 2, 16), (2, 2, 16, 32))
    assert (found["mlp/up/kernel"], found["mlp/down/kernel"]) == ((2, 32, 128), (2, 128, 32))


def at(section: object, path: str):
    return functools.reduce(
        lambda x, name: getattr(x, name, None) if not isinstance(x, dict) else x[name], path.split("."), section
    )


@pytest.mark.parametrize("old", RENAMED_FIELDS[1])
def test_a_renamed_field_keeps_its_value(old):
    values, new = copy.deepcopy(RECIPE), RENAMED_FIELDS[1][old]
    section, _, name = old.rpartition(".")
    held = at(values, section)
    held[name] = {int: 77, float: 0.7, str: "learned"}[type(held[name])]
    recipe = Recipe.from_json(json.dumps(values))
    assert at(recipe, new) == held[name]
    kept = json.loads(recipe.to_json())
    assert kept["format"] == FORMAT
    assert at(kept, new) == held[name]
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_a_renamed_value_is_read_by_its_new_name():
    values = copy.deepcopy(RECIPE)
    values["model"]["layer_pattern"] = ["dense", "local"]
    assert RENAMED_VALUES[1] == {"model.layer_pattern": {"dense": "global"}}
    assert Recipe.from_json(json.dumps(values)).model.layer_pattern == ("global", "local")
