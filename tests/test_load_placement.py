"""A run opens wherever it is loaded: on one device or many, whatever it was trained on; from a disk or from a bucket."""

import dataclasses
import json
import types

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils.epath.backend import fsspec_backend
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

import bothways
from bothways import checkpoints, rundir, sharding
from bothways.commands.train import continuation_of
from bothways.config import FinetuneConfig, MeshConfig
from bothways.data import corpora
from bothways.data.tokens import obtain_tokenizer
from bothways.errors import CheckpointUnavailable, InputError
from bothways.model.stack import unstack_layers
from bothways.sample.directions import directions
from bothways.sample.masked import MaskedModel
from bothways.train.loop import train
from bothways.train.start import check_start, start_from
from bothways.train.tuning import FinetuneRunner
from tests.conftest import on_one_device, plotting
from tests.train.bodies import body, dog_task, write

MESH = MeshConfig(1, 2, 2)


def shards(params) -> set[int]:
    """On how many devices the parameters lie."""
    return {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(params)}


def same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.mark.parametrize("family", ["gpt", "bert"])
def test_one_device_to_four_and_back(family, tiny, tmp_path):
    made = body(family, tiny)
    write(made, tmp_path / "one")
    one, four = bothways.load(tmp_path / "one"), bothways.load(tmp_path / "one", MESH)
    assert (shards(one.run.params), shards(four.run.params)) == ({1}, {4})
    blocks = four.run.params[{"gpt": "decoder", "bert": "encoder"}[family]]["stack"]["blocks"]
    kernel = (blocks[0] if family == "gpt" else blocks)["mlp"]["up"]["kernel"]  # what decodes has a tree per layer
    assert kernel.sharding.shard_shape(kernel.shape)[-2:] == (22 // 2, 26 // 2)
    joined, asked = (unstack_layers(made.params, join) if family == "gpt" else made.params for join in (True, False))
    # Fine-tuning takes weights that lie on one device, and trains on all.
    settled = FinetuneConfig().settled(1, "adamw")
    tuner = FinetuneRunner(rundir.load_run(tmp_path / "one", print), dog_task("classify"), settled)
    assert shards(tuner.run.params) == {8}
    tuner.fresh.lower(jax.random.key(0), 1e-2, tuner.run.params)  # refuses arrays that lie apart from the mesh
    same(four.run.params, asked)
    # Only what the compiler can see into can it spread; a kernel needs explicit shard_map specs.
    assert (one.run.module.cfg.attention, four.run.module.cfg.attention) == ("auto", "xla")

    spread = rundir.load_run(tmp_path / "one", print, lambda shapes: sharding.shardings_for_inference(shapes, MESH))
    write(dataclasses.replace(made, params=spread.params), tmp_path / "four")  # a checkpoint of four devices
    back = bothways.load(tmp_path / "four")
    assert shards(back.run.params) == {1}
    same(back.run.params, joined)
    same(one.run.params, joined)

    assert {asks.run.module.cfg.attention for asks in directions(four).values()} == {"xla"}

    texts = ["the dog sees", "the king"]
    for model in (four, back):
        for found, wanted in zip(model.score(texts), one.score(texts), strict=True):
            assert found.logprob == pytest.approx(wanted.logprob, rel=1e-4)
    if family == "gpt":
        wanted, found = (m.sample(["the dog"], max_tokens=5, greedy=True)[0] for m in (one, four))
        assert found.text == wanted.text
        assert found.logprob == pytest.approx(wanted.logprob, rel=1e-4)


def test_weights_that_are_asked_are_of_the_type_they_are_multiplied_in(tiny, tmp_path):
    """And say what they say in float32."""
    made = body("bert", tiny, dtype="bfloat16")
    write(made, tmp_path / "run")
    asked, wide = bothways.load(tmp_path / "run"), rundir.load_run(tmp_path / "run", print)
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(wide.params)}
    assert kinds == {"float32"}
    flat = jax.tree_util.tree_leaves_with_path(asked.run.params)
    assert all((leaf.dtype == "bfloat16") == (path[-1].key in ("kernel", "embedding")) for path, leaf in flat)
    texts = ["the dog sees", "the king"]
    assert asked.score(texts) == MaskedModel(wide).score(texts)


def test_parameters_that_are_used_in_float32_stay_so(tiny):
    """A task's head, its dense layer too, and what T5 adds to scores."""
    relative = {"score_bias": "relative", "position_embedding": "none", "relative_buckets": 6, "relative_distance": 11}
    made = body("gpt", tiny, dtype="bfloat16", **relative)
    task = rundir.TaskInfo("dogs", "classify", ("dog", "none"), 8, ("accuracy",), hidden="tanh")
    shapes = rundir.param_shapes(made.recipe, task)
    asked = rundir.compute_dtype_shapes(shapes, made.recipe.model)
    wide = [path for path, leaf in jax.tree_util.tree_leaves_with_path(asked) if leaf.dtype == "float32"]
    names = {"/".join(key.key for key in path[-2:]) for path in wide if path[-1].key in ("kernel", "embedding")}
    assert names == {"task_head/kernel", "dense/kernel", "relative/embedding"}


def test_what_one_device_cannot_hold_is_spread_over_all(tiny, monkeypatch):
    shapes = jax.eval_shape(lambda: body("gpt", tiny, n_heads=4, n_kv_heads=4, d_model=24).params)
    size = sum(leaf.size * 4 for leaf in jax.tree.leaves(shapes))
    for memory, devices in ((None, 1), (3 * size, 1), (size, 8)):
        device = type(jax.devices()[0])
        monkeypatch.setattr(device, "memory_stats", lambda _, n=memory: n and {"bytes_limit": n})
        found = sharding.shardings_for_inference(shapes, MeshConfig(1))
        assert {len(s.device_set) for s in jax.tree.leaves(found)} == {devices}
    assert found["decoder"]["stack"]["blocks"]["mlp"]["up"]["kernel"].mesh.shape["tensor"] == 2  # of 26, 390 and 4
    with pytest.raises(InputError, match="wants 16 devices, and this host has 8"):
        sharding.shardings_for_inference(shapes, MeshConfig(2, 8))


class Bucket(MemoryFileSystem):
    """Stands in for Google's storage: the same names, kept in memory, and no file can be added to."""

    protocol = ("gs", "gcs")
    store: dict = {}
    pseudo_dirs = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).removeprefix("gs://").strip("/")

    def _open(self, path, mode="rb", **options):
        assert "a" not in mode, "a bucket's files can only be written whole"
        return super()._open(path, mode, **options)


@pytest.fixture
def bucket():
    """While it lasts gs:// is `Bucket`, also where this process has met a real one before."""
    known, found = fsspec.registry.get("gcs"), fsspec_backend._get_filesystem
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    found.cache_clear()
    yield
    found.cache_clear()
    if known:
        fsspec.register_implementation("gcs", known, clobber=True)
    else:
        _registry.pop("gcs")


def test_a_run_directory_on_a_bucket(bucket, tiny_recipe, tmp_path, monkeypatch):
    """All but the arrays, which tensorstore would write to a real bucket by itself: here they lie on disk."""
    monkeypatch.setattr("tensorboardX.record_writer.GCS_ENABLED", False)  # its own client wants credentials
    manager = checkpoints.checkpoint_manager
    for module in (checkpoints, rundir):
        monkeypatch.setattr(module, "checkpoint_manager", lambda home, **kwargs: manager(tmp_path, **kwargs))
    Bucket().mkdir("gs://bucket/runs")
    home = rundir.directory("gs://bucket/runs/x")
    short = dataclasses.replace(tiny_recipe, train=dataclasses.replace(tiny_recipe.train, steps=4, save_every=2))
    with plotting(), on_one_device():
        train(short, "gs://bucket/runs/x")
    assert {"recipe.json", "tokenizer.model", "metrics.jsonl", "loss.png"} <= {path.name for path in home.iterdir()}
    lines = (home / "metrics.jsonl").read_text()
    assert [row["step"] for row in map(json.loads, lines.splitlines()) if "loss" in row] == [1, 2, 3, 4]
    with on_one_device():
        train(short, "gs://bucket/runs/x")  # complete: nothing is added
    assert (home / "metrics.jsonl").read_text() == lines
    assert bothways.load("gs://bucket/runs/x").recipe == rundir.read_recipe(home)

    on = continuation_of(home)
    assert on.data.tokenizer == "gs://bucket/runs/x/tokenizer.model"
    on = dataclasses.replace(on, model=dataclasses.replace(on.model, attention="xla"))
    check_start(on, obtain_tokenizer(on.data, corpora.load(on.data)))
    params = rundir.load_run(home, print).params
    fresh = jax.tree.map(jnp.zeros_like, params)
    same(start_from(rundir.directory(on.train.init_from), on, fresh, None), params)
    with pytest.raises(InputError, match="d_model is 24, and there 22"):
        train(dataclasses.replace(on, model=dataclasses.replace(on.model, d_model=24)), tmp_path / "on")


def test_a_bucket_that_cannot_be_reached(monkeypatch):
    with pytest.raises(InputError, match=r"cannot reach s3://nowhere/x .*install"):
        rundir.directory("s3://nowhere/x")


def test_a_bucket_that_does_not_answer_is_no_bad_input(monkeypatch):
    """It would be exit code 2, after which no launcher tries again."""

    def refuse(_):
        raise OSError("HTTP 503 Service Unavailable")

    monkeypatch.setattr(rundir.epath, "Path", lambda _: types.SimpleNamespace(exists=lambda: refuse(0)))
    with pytest.raises(CheckpointUnavailable, match="gs://bucket/x does not answer .*503.*; run the same command again"):
        rundir.directory("gs://bucket/x")


def test_what_a_bucket_cannot_hold_is_refused(bucket, tmp_path, monkeypatch, capfd):
    """And nothing is written to a directory here that is named like it; what is only read is looked for there."""
    monkeypatch.chdir(tmp_path)
    here = str(tmp_path / "x")
    for argv in (
        ["import", here, "gs://bucket/x"],
        ["export", here, "gs://bucket/x"],
        ["compare", "--workdir", "gs://bucket/x"],
    ):
        assert bothways.main(argv) == 2
        assert "gs://bucket/x is on a bucket" in capfd.readouterr().err
    assert bothways.main(["export", "gs://bucket/none", here]) == 2
    assert "gs://bucket/none does not exist" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())
