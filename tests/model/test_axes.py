"""Every parameter has named axes, and each name stands for the size that it says."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from bothways import sharding
from bothways.config import MeshConfig
from bothways.model.axes import activation_shardings, logical_axes, path_names
from bothways.model.config import TransformerConfig
from bothways.model.layers import Projection
from bothways.model.mask import Mask
from bothways.model.stack import Stack
from bothways.registry import FAMILIES, make_module, tiny_inputs


def check(cfg: TransformerConfig, shapes) -> None:
    sizes = {
        "layers": cfg.n_layers,
        "vocab": cfg.vocab_size,
        "position": cfg.context_length,
        "segment": cfg.segment_types,
        "embed": cfg.d_model,
        "heads": cfg.n_heads,
        "kv_heads": cfg.n_kv_heads,
        "head": cfg.d_head,
        "ff": cfg.d_ff,
        "pooled": cfg.d_model,
        "classes": 2,
    }
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    assert leaves
    for path, leaf in leaves:
        names = path_names(path)
        axes = logical_axes(names)
        assert len(axes) == leaf.ndim, f"{'/'.join(names)}: {axes} for {leaf.shape}"
        named = tuple(sizes.get(axis, size) for axis, size in zip(axes, leaf.shape, strict=True))
        assert named == leaf.shape, f"{'/'.join(names)}: {axes} for {leaf.shape}"


def test_every_parameter_of_every_recipe_has_axes(recipe_shapes):
    for cfg, shapes in recipe_shapes.values():
        check(cfg, shapes)


ALL_ON = {"activation": "swiglu", "qk_norm": True, "segment_types": 3, "embed_norm": True} | {
    "tie_embeddings": False,
    "next_sentence": True,
    "output_bias": True,
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norm_position", ["pre", "post", "both"])
def test_every_parameter_with_all_options_on_has_axes(tiny_with, family, norm_position):
    """Here all sizes differ, so that axes in the wrong order cannot pass."""
    cfg = tiny_with(**ALL_ON, norm_position=norm_position, n_heads=10, n_kv_heads=5)
    module = make_module(family, cfg)
    check(cfg, jax.eval_shape(lambda: module.init(jax.random.key(0), **tiny_inputs(family))["params"]))


def test_every_parameter_of_a_stack_with_cross_attention_has_axes(tiny_with):
    cfg = tiny_with(n_heads=10, n_kv_heads=5, qk_norm=True)
    x, positions = jnp.zeros((1, 2, 22)), jnp.zeros((1, 2), jnp.int32)
    inputs = {"memory": x, "memory_mask": Mask.cross(positions, positions)}
    stack = Stack(cfg, cross=True)
    mask = Mask.self_attention(positions, causal=True)
    shapes = jax.eval_shape(lambda: stack.init(jax.random.key(0), x, mask, positions, **inputs)["params"])
    assert "cross" in shapes["blocks"]
    check(cfg, shapes)


def test_a_parameter_without_axes_is_refused_by_name():
    with pytest.raises(KeyError, match="decoder/blocks/router/kernel"):
        logical_axes(("decoder", "blocks", "router", "kernel"))


def test_a_kernel_and_its_gradient_stay_cut_over_tensor(tiny_with, eight_devices):
    """Where XLA may choose, it has computed gradients of kernels whole on every device: they are not left to it."""
    cfg = tiny_with(d_model=32, d_ff=48)
    up, x = Projection(cfg, (48,), name="up"), jnp.ones((2, 3, 32))
    params = up.init(jax.random.key(0), x)["params"]

    def cuts(**mesh: int) -> list[PartitionSpec]:
        place = sharding.activation_sharding_fn(sharding.make_mesh(MeshConfig(**mesh), eight_devices))

        def loss(params):
            with activation_shardings(place):
                return jnp.sum(up.apply({"params": params}, x) ** 2)

        steps = jax.make_jaxpr(jax.grad(loss))(params).jaxpr.eqns
        return [step.params["sharding"].spec for step in steps if step.primitive.name == "sharding_constraint"]

    assert cuts(fsdp=2, tensor=4) == [PartitionSpec(None, "tensor")] * 2  # forward, and backward
    assert cuts(fsdp=8) == []
