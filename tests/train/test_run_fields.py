"""Every field of train, data and mesh changes what a run does: its batches, its program, its checkpoints or its metrics."""

import dataclasses
import itertools
import json
import math
import types

import jax
import numpy as np
import pytest

from bothways import rundir, sharding
from bothways.config import MeshConfig, ObjectiveConfig, TrainConfig
from bothways.data import corpora, preparing
from bothways.data import tokenizer as tokenizers
from bothways.data.config import DataConfig
from bothways.errors import Diverged, InputError
from bothways.sharding import make_mesh  # itself, and not that of `one_device`
from bothways.train import hosts, loop
from bothways.train import step as steps
from bothways.train.steps import Job, run_steps
from tests.corpus import made_up_text
from tests.train.jobs import counting

# ---- the loop: steps, evaluations, checkpoints ------------------------------------------------------------------------

LOOP = {
    "steps": (7, {}),
    "log_every": (2, {}),
    "eval_every": (2, {}),
    "save_every": (2, {}),
    "save_every_minutes": (1, {}),
    "patience": (1, {"eval_every": 1}),
    "max_to_keep": (1, {"save_every": 1}),
    "max_nonfinite_steps": (2, {}),
    "tracker": ("none", {}),
}
"""Another value of the field, beside these others."""


def loop_effect(home, monkeypatch, **fields) -> tuple:
    """Of a run whose held-out loss rises, and whose steps 3 and 4 have no finite loss: how it ends, and what it leaves."""
    clock = itertools.count(step=15)
    monkeypatch.setattr(hosts, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    cfg = TrainConfig(**{"steps": 6, "eval_every": 3, "save_every": 100, "log_every": 1} | fields)
    try:
        end = run_steps(counting(home, cfg, held=float, bad=lambda step: step in (3, 4)))
    except Diverged as e:
        end = str(e)
    rows = [json.loads(line) for line in (home / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]
    return end, metrics, sorted(p.name for p in (home / "checkpoints").iterdir()), (home / "events").exists()


@pytest.mark.parametrize("field", LOOP)
def test_a_field_of_train_changes_what_the_loop_does(field, tmp_path, monkeypatch):
    value, others = LOOP[field]
    before = loop_effect(tmp_path / "before", monkeypatch, **others)
    assert before != loop_effect(tmp_path / "after", monkeypatch, **others | {field: value})


def test_as_many_checkpoints_as_wanted_are_averaged(tmp_path, tiny_recipe, monkeypatch):
    """Parameters are the number of steps, and 4 and 6 are kept."""
    run_steps(counting(tmp_path, TrainConfig(steps=6, save_every=2, max_to_keep=2, tracker="none")))
    tokenizers.train([made_up_text(60)], "bpe", 330).save_in(tmp_path)
    monkeypatch.setattr(rundir, "param_shapes", lambda *_: {"x": jax.ShapeDtypeStruct((3,), np.float32)})
    for count, mean in ((1, 6), (2, 5)):
        cfg = dataclasses.replace(tiny_recipe.train, average_last_checkpoints=count)
        (tmp_path / "recipe.json").write_text(dataclasses.replace(tiny_recipe, train=cfg).to_json())
        np.testing.assert_allclose(rundir.load_run(tmp_path, print).params["x"], mean, rtol=1e-6)


# ---- what a recipe hands to the loop ----------------------------------------------------------------------------------

TRAIN = {
    "batch_size": (16, {}),
    "batch_size_start": (4, {"batch_size_start": 2, "batch_size_ramp_rows": 16}),
    "batch_size_ramp_rows": (160, {"batch_size_start": 2, "batch_size_ramp_rows": 16}),
    "short_length": (6, {"short_length": 8, "short_steps": 1}),
    "short_steps": (9, {"short_length": 8, "short_steps": 1}),
    "grad_accum_steps": (2, {}),
    "seed": (5, {}),
    "init_from": ("start", {}),
    "eval_rows": (5, {}),
}
PAIRS = {"corpus": "pairs.jsonl", "tokenizer": "char"}
SETS = {"corpus": "sets.jsonl", "tokenizer": "char", "text_fields": ("a", "b")}
SCORED = SETS | {"score_field": "s"}
CHAT = {"corpus": "talks.jsonl", "tokenizer": "char", "messages_field": "messages"}
DATA = {
    "corpus": ("other.txt", {}),
    "mixture": (("tale.txt=3", "other.txt=1"), {"corpus": "", "mixture": ("tale.txt=1", "other.txt=1")}),
    "validation": ("other.txt", {}),
    "text_field": ("b", PAIRS | {"text_field": "a"}),
    "source_field": ("b", PAIRS | {"source_field": "a", "target_field": "b"}),
    "target_field": ("a", PAIRS | {"source_field": "a", "target_field": "b"}),
    "messages_field": ("others", CHAT),
    "chat_template": ("short.jinja", CHAT),
    "text_fields": (("a", "b", "c"), SETS),
    "score_field": ("r", SCORED),
    "query_prompt": ("a: ", SETS),
    "document_prompt": ("a: ", SETS),
    "tokenizer": ("bpe", {}),
    "vocab_size": (310, {}),
    "separate_documents": (False, PAIRS | {"text_field": "a"}),
    "cache": ("another", {}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_recipe):
    """The files that the tables name."""
    home = tmp_path_factory.mktemp("fields")
    (home / "tale.txt").write_text(made_up_text())
    (home / "other.txt").write_text(made_up_text(seed=1))
    lines = [" ".join(line.split()[1:3]) for line in made_up_text().splitlines() if line.startswith("the")]
    pairs = zip(lines, lines[1:], strict=False)
    (home / "pairs.jsonl").write_text("".join(json.dumps({"a": a, "b": b}) + "\n" for a, b in pairs))
    talks = [
        {
            name: [{"role": "user", "content": f"{name[0]}{i % 7}"}, {"role": "assistant", "content": f"{i % 5}"}]
            for name in ("messages", "others")
        }
        for i in range(90)
    ]
    (home / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    sets = [{"a": f"a{i}", "b": f"b{i}", "c": f"c{i}", "s": i / 90, "r": i / 80} for i in range(90)]
    (home / "sets.jsonl").write_text("".join(json.dumps(one) + "\n" for one in sets))
    (home / "short.jinja").write_text("{% for m in messages %}{{ m.role[0] }}{{ m.content }}{{ eos_token }}{% endfor %}")
    (home / "start").mkdir()
    (home / "start" / "recipe.json").write_text(tiny_recipe.to_json())
    return home


class JobEffect:
    """What the loop is handed for a recipe: its first batches, held-out rows, program and start; found once for each."""

    def __init__(self, folder, tiny_recipe):
        self.folder, self.recipe, self.known = folder, tiny_recipe, {}

    def job(self, train: dict, data: dict) -> tuple[Job, list, DataConfig]:
        files = {"corpus": "tale.txt", "cache": "cache"} | data
        for name in ("corpus", "validation", "chat_template", "cache"):
            if files.get(name):
                files[name] = str(self.folder / files[name])
        files["mixture"] = tuple(str(self.folder / entry) for entry in files.get("mixture", ()))
        data = dataclasses.replace(self.recipe.data, **files)
        kind = "pairs" if data.source_field else "chat" if data.messages_field else "causal"
        kind = "contrastive" if data.text_fields else kind
        recipe = dataclasses.replace(
            self.recipe,
            family="seq2seq" if kind == "pairs" else "gpt",
            model=dataclasses.replace(self.recipe.model, n_layers=1, context_length=64 if kind == "chat" else 16),
            objective=ObjectiveConfig(kind=kind, loss="cosent" if data.score_field else "ranking"),
            data=data,
            train=dataclasses.replace(self.recipe.train, **train),
        )
        jobs, starts = [], []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "run_steps", lambda job: jobs.append(job) or {"loss": 0.0})
            patch.setattr(loop, "check_start", lambda recipe, tokenizer: starts.append(recipe.train.init_from))
            loop.train(recipe, self.folder / "runs" / str(len(self.known)))
        return jobs[0], starts, data

    def __call__(self, train: dict, data: dict) -> tuple:
        key = json.dumps([train, data])
        if key not in self.known:
            job, starts, cfg = self.job(train, data)
            held = []
            evaluate = job.evaluate
            evaluate.count_bytes = lambda *_: 3
            term = "contrast" if cfg.text_fields else "nll"
            evaluate.step = lambda _, batch: held.append(rows_of(batch)) or {term: (1.0, 1.0, 1.0)}
            evaluate(None)
            batches = [next(job.batches(step)) for step in (0, 3)]
            program = job.step.trace(job.shapes, batches[0], 0).jaxpr if train else ""
            kept = any((self.folder / cfg.cache).rglob("ids.bin"))
            where = cfg.cache if kept else ""
            self.known[key] = [rows_of(batch) for batch in batches], held, str(program), starts, where
        return self.known[key]


def rows_of(batch: dict) -> dict:
    return {name: (x.shape, np.asarray(x).tobytes()) for name, x in batch.items()}


@pytest.fixture(scope="module")
def effect(folder, tiny_recipe, one_device):
    return JobEffect(folder, tiny_recipe)


@pytest.mark.parametrize("field", TRAIN)
def test_a_field_of_train_changes_what_the_loop_is_handed(field, effect, folder):
    value, others = TRAIN[field]
    value = str(folder / value) if field == "init_from" else value
    before, after = (effect({"log_every": 3} | others | more, {}) for more in ({}, {field: value}))
    assert before != after


@pytest.mark.parametrize("field", DATA)
def test_a_field_of_data_changes_what_the_loop_is_handed(field, effect):
    value, others = DATA[field]
    assert effect({}, others) != effect({}, others | {field: value})


def test_so_many_gigabytes_are_kept_of_prepared_text(folder):
    cfg = DataConfig(corpus=str(folder / "pairs.jsonl"), text_field="a", tokenizer="char", cache=str(folder / "prepared"))
    preparing.prepare(cfg, str(folder / "text"))
    found = [
        corpora.load(dataclasses.replace(cfg, corpus=str(folder / "text"), cache_gb=size)).store.cache_bytes
        for size in (1, 7)
    ]
    assert found == [10**9, 7 * 10**9]


# ---- the mesh ---------------------------------------------------------------------------------------------------------

MESH = {"data": 4, "fsdp": 2, "tensor": 2, "context": 2}
"""Another size of the axis, beside 2 of `data`, on so many devices more: what the axis spreads is all that changes."""


def mesh_effect(**fields) -> list[tuple[int, ...]]:
    """What one device holds of a kernel, of its moments, and of a batch of activations."""
    cfg = MeshConfig(**{"data": 2} | fields)
    mesh = make_mesh(cfg, jax.devices()[: math.prod(cfg.axes().values())])
    path = {"blocks": {"mlp": {"up": {"kernel": jax.ShapeDtypeStruct((1, 16, 32), np.float32)}}}}
    at = sharding.parameter_shardings(mesh, path)
    moments = sharding.spread_over_data(at, path)
    shapes = [jax.tree.leaves(tree)[0].shard_shape((1, 16, 32)) for tree in (at, moments)]
    stream = sharding.activation_sharding_fn(mesh)((16, 24, 16), ("batch", "length", "embed"))
    return [*shapes, stream.shard_shape((16, 24, 16))]


@pytest.mark.parametrize("field", MESH)
def test_a_field_of_the_mesh_changes_what_a_device_holds(field, eight_devices):
    assert mesh_effect() != mesh_effect(**{field: MESH[field]})


def test_how_much_is_copied_is_bounded(eight_devices):
    mesh = make_mesh(MeshConfig(1, 8), eight_devices)
    path = {"blocks": {"norm": {"scale": jax.ShapeDtypeStruct((1, 7), np.float32)}}}
    sharding.parameter_shardings(mesh, path, 1.0)
    with pytest.raises(InputError, match="mesh.max_replicated_fraction is 10.0%"):
        sharding.parameter_shardings(mesh, path, 0.1)


def test_vmem_reaches_the_compiler(effect, monkeypatch):
    asked = []
    monkeypatch.setattr(steps, "compiler_options", lambda mesh, width, kib: asked.append(kib))
    monkeypatch.setattr(effect, "recipe", dataclasses.replace(effect.recipe, mesh=MeshConfig(vmem_kib=777)))
    effect.job({}, {})
    assert asked == [777]


def test_every_field_is_tested_above():
    tested = {TrainConfig: {*LOOP, *TRAIN, "average_last_checkpoints"}, DataConfig: {*DATA, "cache_gb"}}
    tested[MeshConfig] = {*MESH, "max_replicated_fraction", "vmem_kib"}
    for config, names in tested.items():
        assert {field.name for field in dataclasses.fields(config)} == names
