"""The kernel of short rows computes what the dense mask says, dropout included; interpreted where no TPU is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bothways import sharding
from bothways.chips import Topology, quiet_stderr
from bothways.config import MeshConfig
from bothways.model import kernels
from bothways.model.attention import attend_whole
from bothways.model.axes import activation_shardings
from bothways.model.config import TransformerConfig
from bothways.model.decoder import Decoder
from bothways.model.dropout import ScoreDropout
from bothways.model.mask import Mask
from bothways.plan.own_kernels import traced_kernels
from tests.model.test_kernels import CAUSAL, MASKS, PREFIX

KNOWN = ["bidirectional", "packed causal", "hidden keys"]
DROPOUT = ScoreDropout(jnp.array([3, 2**31 + 5], jnp.uint32), 0.3)


def outcome(kernel, mask: Mask, H: int, K: int, dropout: ScoreDropout | None = None, seed: int = 0) -> tuple:
    """Output and gradients, where a query sees something."""
    B, T, S = *mask.q_positions.shape, mask.k_positions.shape[1]
    keys = jax.random.split(jax.random.key(seed), 4)
    q, k, v, weight = (jax.random.normal(key, (B, n, H, K)) for key, n in zip(keys, (T, S, S, T), strict=True))
    weight = weight * mask.materialize().any(-1)[:, :, None, None]

    def loss(q, k, v):
        y = kernel(q, k, v, mask, dropout) * (weight != 0)
        return jnp.sum(y * weight), y

    (_, y), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return y, grads


def same(found, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), found, wanted)


@pytest.mark.parametrize(
    ("name", "H", "K", "dropped"),
    [
        *((name, 3, 64, False) for name in KNOWN),  # the last block of lanes is half empty
        ("packed causal", 3, 64, True),
        ("cross", 3, 64, True),
        ("packed bidirectional", 4, 8, True),  # all heads together are narrower than a block
        ("causal", 1, 128, True),  # a head fills a block
    ],
)
def test_it_equals_the_reference(name, H, K, dropped):
    dropout = DROPOUT if dropped else None
    same(outcome(kernels.short, MASKS[name], H, K, dropout), outcome(attend_whole, MASKS[name], H, K, dropout))


def test_on_a_mesh_every_device_draws_its_part_of_the_same_dropout(eight_devices):
    """Rows over data and fsdp, heads over tensor."""
    mask = MASKS["packed causal"]
    wanted = outcome(kernels.short, mask, 4, 64, DROPOUT)
    assert not np.allclose(wanted[0], outcome(kernels.short, mask, 4, 64, ScoreDropout(DROPOUT.seed + 1, 0.3))[0])
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2, 1), eight_devices)
    with activation_shardings(sharding.activation_sharding_fn(mesh)):
        same(outcome(kernels.short, mask, 4, 64, DROPOUT), wanted)


@pytest.mark.parametrize("causal", [True, False])
def test_several_blocks_of_queries_draw_other_rows(causal):
    """1,024 keys, of which a causal block of 256 queries reads those up to its own; without causality blocks of 512 and 256 read all."""
    row = jnp.arange(1024)[None]
    mask = Mask.self_attention(row, causal=causal)
    same(outcome(kernels.short, mask, 1, 32, DROPOUT), outcome(attend_whole, mask, 1, 32, DROPOUT))


@pytest.mark.parametrize(("causal", "share"), [(True, 5 / 8), (False, 1)])
def test_products_with_keys_behind_a_causal_block_are_not_counted(causal, share):
    """Rows of 1,024 in blocks of 256: 1 + 2 + 3 + 4 of 16. Each of 3 heads of 64 takes 128 lanes, and with them the empty half of the last."""
    mask = Mask.self_attention(jnp.arange(1024)[None], causal=causal)
    x = jax.ShapeDtypeStruct((1, 1024, 3, 64), jnp.bfloat16)
    program = jax.make_jaxpr(jax.grad(lambda q, k, v: jnp.sum(kernels.short(q, k, v, mask)), (0, 1, 2)))(x, x, x)
    known = traced_kernels(program.jaxpr)
    product = 2 * 4 * 1024 * 1024 * 128 * share
    assert {name: kernel.flops for name, kernel in known.items()} == {
        "short_rows_forward": 2 * product,
        "short_rows_backward": 5 * product,
    }


@pytest.mark.parametrize(("remat", "times"), [("dots", 1), ("full", 2)])
def test_what_the_kernel_reads_is_kept_where_products_are(remat, times):
    """Queries, keys and values with bias, and not what they are made of: they have their name in the forward pass alone."""
    cfg = TransformerConfig(vocab_size=37, context_length=128, d_model=64, n_layers=3, n_heads=2, d_ff=64)
    module = Decoder(dataclasses.replace(cfg, remat=remat, scan_layers=True, attention="short").resolved())
    tokens = jnp.zeros((1, 128), jnp.int32)
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), tokens)["params"])
    program = jax.make_jaxpr(jax.grad(lambda params: jnp.sum(module.apply({"params": params}, tokens)[0])))(params)
    assert str(program).count(f"name={kernels.SAVED}") == 3 * times


def test_what_it_does_not_know(monkeypatch, eight_devices):
    def chosen(wanted="short", mask=CAUSAL, H=2, G=2, K=64, T=256, W=None, dropout=None) -> str:
        q, k, v = (jnp.zeros((4, T, heads, width)) for heads, width in ((H, K), (G, K), (G, W or K)))
        return kernels.choose(wanted, q, k, v, mask, dropout)

    assert chosen() == chosen(dropout=DROPOUT) == "short"
    assert chosen(mask=CAUSAL.windowed(70)) == chosen(mask=PREFIX) == chosen(mask=MASKS["blocks of 16"]) == "xla"
    assert chosen(G=1) == chosen(K=48) == chosen(K=256) == chosen(W=32) == chosen(T=100) == chosen(T=1152) == "xla"
    assert chosen("splash", dropout=DROPOUT) == "xla"
    monkeypatch.setattr(kernels, "platform", lambda: "tpu")
    assert chosen("auto") == chosen("auto", dropout=DROPOUT) == "short"
    assert chosen("auto", mask=CAUSAL.windowed(70)) == chosen("auto", G=1) == "splash"
    monkeypatch.undo()
    with activation_shardings(sharding.activation_sharding_fn(sharding.make_mesh(MeshConfig(2, 1, 1, 4), eight_devices))):
        assert chosen() == "xla"


@pytest.mark.parametrize(("topology", "T", "H", "K"), [("v5e:2x4", 512, 16, 64), ("v5p:2x2x1", 1024, 25, 64)])
def test_the_compiler_for_tpus_takes_it(topology, T, H, K):
    """Forward and backward, with dropout, in bfloat16: BERT-large's heads, and GPT-2 XL's, which end in half a block."""
    pytest.importorskip("libtpu", reason="compiles for TPUs that are not attached (extra plan)")
    devices = Topology.parse(topology).devices()
    mesh = sharding.make_mesh(MeshConfig(len(devices), 1, 1, 1), devices)
    shape = jax.ShapeDtypeStruct((len(devices), T, H, K), jnp.bfloat16, sharding=sharding.batch_sharding(mesh))
    row = jnp.zeros((len(devices), T), jnp.int32)

    def step(q, k, v):
        with activation_shardings(sharding.activation_sharding_fn(mesh)):
            return jnp.sum(kernels.short(q, k, v, Mask.self_attention(row, causal=True, segments=row + 1), DROPOUT))

    with quiet_stderr():
        compiled = jax.jit(jax.value_and_grad(step, (0, 1, 2))).lower(shape, shape, shape).compile()
    assert compiled.as_text().count("tpu_custom_call") == 2
