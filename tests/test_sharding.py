"""Where everything lies: the committed table of three recipes, rows by host, slices, and what is refused."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from bothways import sharding
from bothways.config import MeshConfig
from bothways.configs import find
from bothways.errors import InputError
from bothways.model.axes import path_names
from bothways.registry import make_module, tiny_inputs
from bothways.rundir import param_shapes

TABLE = Path(__file__).parent / "shardings.txt"
MESHES = {  # recipe: vocabulary, mesh
    "gpt2_small": (50_257, {"data": 1, "fsdp": 8, "tensor": 1, "context": 1}),
    "bert_large": (30_522, {"data": 4, "fsdp": 8, "tensor": 2, "context": 1}),
    "gpt3_13b": (50_304, {"data": 4, "fsdp": 32, "tensor": 4, "context": 2}),
}


def table() -> str:
    """Every parameter's axes on a mesh, its shape, and its shape on one device.

    After a change that is meant: python -c 'from tests.train.test_sharding import *; TABLE.write_text(table())'
    """
    lines = []
    for name, (vocab_size, sizes) in MESHES.items():
        recipe = find(name)
        model = dataclasses.replace(recipe.model, vocab_size=vocab_size, scan_layers=True)
        shapes = param_shapes(dataclasses.replace(recipe, model=model))
        mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
        placed = sharding.parameter_shardings(mesh, shapes, MeshConfig.max_replicated_fraction)
        on = " ".join(f"{axis}={size}" for axis, size in sizes.items())
        lines.append(f"{name}, vocabulary {vocab_size:,}, on {on}")
        for (path, leaf), where in zip(jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(placed), strict=True):
            axes = " ".join(axis or "-" for axis in where.spec)
            whole, part = (" ".join(map(str, shape)) for shape in (leaf.shape, where.shard_shape(leaf.shape)))
            lines.append(f"  {'/'.join(path_names(path)):50} {whole:20} {axes:16} {part}")
    return "\n".join(lines) + "\n"


def test_shardings_are_those_that_are_committed():
    assert table() == TABLE.read_text()


@pytest.fixture(scope="module")
def bert_shapes(tiny):
    cfg = dataclasses.replace(tiny, vocab_size=40, d_model=32, n_heads=8, n_kv_heads=8, d_ff=48, segment_types=2)
    return jax.eval_shape(lambda: make_module("bert", cfg).init(jax.random.key(0), **tiny_inputs("bert"))["params"])


def test_a_mesh_that_does_not_divide_names_the_parameter(tiny, eight_devices):
    mesh = sharding.make_mesh(MeshConfig(1, 1, 8), eight_devices)
    module = make_module("gpt", tiny)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), **tiny_inputs("gpt"))["params"])
    wanted = r"query/bias \(3, 2, 6\): heads=2 is not divisible by mesh.tensor=8; 8 would be"
    with pytest.raises(InputError, match=wanted):
        sharding.parameter_shardings(mesh, shapes)


def test_copies_beyond_the_limit_are_refused_with_the_worst_by_name(bert_shapes, eight_devices):
    """`tensor` leaves position embeddings and BERT's dense layer whole; `fsdp` spreads them."""
    spread, copied = (sharding.make_mesh(MeshConfig(1, *sizes), eight_devices) for sizes in ((8, 1), (1, 8)))
    with pytest.raises(InputError, match=r"copies of 7\.\d% .*5.0%(.|\n)* most:\n  - mlm/dense/kernel \(32, 32\): 2"):
        sharding.parameter_shardings(copied, bert_shapes, max_replicated_fraction=0.05)
    sharding.parameter_shardings(copied, bert_shapes, max_replicated_fraction=0.1)
    sharding.parameter_shardings(spread, bert_shapes, max_replicated_fraction=0.05)
    alone = sharding.make_mesh(MeshConfig(8), eight_devices)  # copies are what `data` is for
    sharding.parameter_shardings(alone, bert_shapes, max_replicated_fraction=0.0)


def slices(count: int, wide: int, high: int) -> list:
    """Chips of TPU slices, as JAX describes them."""
    return [
        SimpleNamespace(id=n, slice_index=s, coords=(x, y, 0), core_on_chip=0, platform="tpu", device_kind="TPU v5e")
        for n, (s, y, x) in enumerate(np.ndindex(count, high, wide))
    ]


def test_slices_share_nothing_but_data():
    sizes = MeshConfig(4, 2, 2).sizes(16)
    grid = sharding.device_grid(sizes, slices(2, 4, 2))
    assert grid.shape == (4, 2, 2, 1)
    found = np.vectorize(lambda device: device.slice_index)(grid)
    np.testing.assert_array_equal(found, np.broadcast_to(np.array([0, 0, 1, 1])[:, None, None, None], grid.shape))
    assert len({device.id for device in grid.flat}) == 16
    with pytest.raises(InputError, match="mesh.data=1 is not divisible by the 2 slices"):
        sharding.device_grid(MeshConfig(1, 16).sizes(16), slices(2, 4, 2))


def test_one_host_holds_every_row(eight_devices):
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2), eight_devices)
    assert sharding.local_rows(mesh, 12).tolist() == list(range(12))
