"""The small parts against the formulas of their papers, written again in numpy."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bothways.model.attention import Attention, attend
from bothways.model.axes import path_names, traced_for
from bothways.model.block import ACTIVATIONS, MLP, Block
from bothways.model.config import RotaryScaling
from bothways.model.decoder import Decoder
from bothways.model.embed import Embedding, Table
from bothways.model.gpt import GPT
from bothways.model.layers import (
    Norm,
    Projection,
    rotary_frequencies,
    rotate,
    sinusoid,
)
from bothways.model.mask import Mask
from bothways.model.products import CPU_SPLITS, product, project, standardized, table_product

erf = np.vectorize(math.erf)


@pytest.fixture(autouse=True)
def same_numbers_in_any_order():
    np.random.seed(0)


def normal(*shape: int, std: float = 1.0) -> np.ndarray:
    return np.random.normal(0, std, shape).astype(np.float32)


def named(params: dict) -> dict[str, jax.Array]:
    return {"/".join(path_names(path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def gelu(x):
    return x * (1 + erf(x / math.sqrt(2))) / 2


FORMULAS = {
    "gelu": gelu,
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "swiglu": lambda x: x / (1 + np.exp(-x)),
    "geglu": gelu,
    "geglu_tanh": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_is_the_formula_of_its_activation(tiny_with, activation, filled):
    """down(f(up(x))), and for the gated ones down(up(x) * f(gate(x)))."""
    cfg, x = tiny_with(activation=activation), normal(1, 5, 22)
    mlp = MLP(cfg)
    params = filled(mlp, x)
    linear = {name: x @ p["kernel"] + p["bias"] for name, p in params.items() if name != "down"}
    f = FORMULAS[activation]
    assert set(linear) == ({"up", "gate"} if activation in ("swiglu", "geglu", "geglu_tanh") else {"up"})
    inner = linear["up"] * f(linear["gate"]) if "gate" in linear else f(linear["up"])
    wanted = inner @ params["down"]["kernel"] + params["down"]["bias"]
    got = jax.jit(mlp.apply)({"params": params}, x)
    np.testing.assert_allclose(got, wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize(("norm", "bias"), [("layer", True), ("layer", False), ("rms", True)])
def test_norm_is_its_formula(tiny_with, norm, bias, filled):
    """The mean is far from 0 and eps large, so that where each stands in the formula shows."""
    module = Norm(tiny_with(norm=norm, bias=bias, norm_eps=0.3))
    x = normal(2, 3, 22, std=0.7) + 5
    params = filled(module, x)
    assert set(params) == ({"scale", "bias"} if norm == "layer" and bias else {"scale"})
    centred = x - x.mean(-1, keepdims=True) if norm == "layer" else x
    wanted = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 0.3) * params["scale"] + params.get("bias", 0)
    np.testing.assert_allclose(jax.jit(module.apply)({"params": params}, x), wanted, atol=1e-5)


def test_norm_of_bfloat16_is_computed_in_float32(tiny_with):
    """1000 + small differences: bfloat16 keeps 8 bits, so the mean and the squares must not be in it."""
    module = Norm(tiny_with(norm="layer", bias=False))
    x = jnp.asarray(1000 + 8 * np.arange(22)[None, None] % 7 * 8, jnp.bfloat16)
    got = jax.jit(module.apply)({"params": {"scale": jnp.ones(22)}}, x)
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean()) / exact.std()
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float64), exact, rtol=2**-8)


def test_projection_contracts_its_last_axes(tiny, filled):
    x = normal(2, 5, 3, 4)
    module = Projection(tiny, (7, 6), n_in=2)
    params = filled(module, x)
    wanted = np.einsum("btij,ijkl->btkl", x, params["kernel"]) + params["bias"]
    np.testing.assert_allclose(jax.jit(module.apply)({"params": params}, x), wanted, atol=1e-5)


@pytest.mark.parametrize("width", [3 * CPU_SPLITS, 3 * CPU_SPLITS + 5])
def test_product_of_one_row_is_that_of_it_among_others(width):
    x, kernel = normal(2, width), normal(width, 7)
    alone = jnp.concatenate([product(row[None], kernel) for row in jnp.asarray(x)])
    np.testing.assert_allclose(alone, product(x, kernel), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(alone, x @ kernel, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [3 * CPU_SPLITS, 11 * CPU_SPLITS, 97])
def test_table_product_is_that_of_rows_among_more(size):
    x, table = normal(5, 31, 3), normal(size, 3)
    whole = table_product(jnp.asarray(x), table)
    np.testing.assert_allclose(whole, np.einsum("abd,vd->abv", x, table), rtol=1e-5, atol=1e-5)
    for rows in (x[0, 0], x[0], x[:, :6]):
        few = table_product(jnp.asarray(rows), table)
        np.testing.assert_allclose(few, rows @ table.T, rtol=1e-5, atol=1e-5)


def test_products_are_cut_where_few_rows_wait_for_a_cpu_and_nowhere_else():
    kernel, table = normal(3 * CPU_SPLITS, 7), normal(11 * CPU_SPLITS, 3)

    def cut(multiply, x, matrix) -> bool:
        """Whether the product is a batch of several."""
        (dot,) = (e for e in jax.make_jaxpr(lambda *a: multiply(*a))(x, matrix).eqns if e.primitive.name == "dot_general")
        return dot.params["dimension_numbers"][1] != ((), ())

    def rows(multiply, matrix, dtype=jnp.float32) -> list[int]:
        width = 3 if multiply is table_product else 3 * CPU_SPLITS
        return [n for n in (0, 1, 2, 32, 33) if cut(multiply, jnp.zeros((n, width), dtype), jnp.asarray(matrix, dtype))]

    assert rows(product, kernel) == [1]
    assert rows(table_product, table) == [1, 2, 32]
    assert rows(table_product, table, jnp.bfloat16) == []
    with traced_for("tpu"):
        assert rows(product, kernel) == rows(table_product, table) == []


def test_products_of_bfloat16_on_a_cpu_are_rounded_once():
    """Forward and both gradients, each a product of bfloat16 that gives float32."""
    x, kernel, weight = (jnp.asarray(normal(*shape), jnp.bfloat16) for shape in ((5, 31), (31, 7), (5, 7)))

    def loss(x, kernel):
        return jnp.sum((product(x, kernel) * weight).astype(jnp.float32))

    dots = [e for e in jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, kernel).eqns if e.primitive.name == "dot_general"]
    assert dots
    for dot in dots:
        assert [v.aval.dtype for v in (*dot.invars, *dot.outvars)] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    wide = [a.astype(jnp.float32) for a in (x, kernel, weight)]
    wanted = wide[0] @ wide[1], (wide[2] @ wide[1].T, wide[0].T @ wide[2])
    found = product(x, kernel), jax.grad(loss, (0, 1))(x, kernel)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), found, wanted)


def test_projections_and_norms_are_the_same_on_every_backend():
    x, inward, outward = (jnp.asarray(normal(*shape)) for shape in ((3, 5, 7), (7, 2, 128), (2, 128, 11)))

    def run(x):
        return standardized(project(project(x, inward, 1), outward, 2), 1e-5)

    plain, program = run(x), str(jax.make_jaxpr(lambda x: run(x))(x))
    with traced_for("tpu"):
        wide = str(jax.make_jaxpr(lambda x: run(x))(x))
        np.testing.assert_allclose(run(x), plain, rtol=2e-4, atol=2e-4)
    assert "3,2,5,128" in wide
    assert "3,2,5,128" not in program


def test_rotary_scores_depend_on_the_distance_only():
    """A query and a key moved on together keep their score; moved apart they do not."""
    q, k = normal(1, 1, 2, 6), normal(1, 1, 2, 6)

    @jax.jit
    def score(at_q: int, at_k: int) -> jax.Array:
        turned = rotate(q, jnp.array([[at_q]]), 100.0), rotate(k, jnp.array([[at_k]]), 100.0)
        return jnp.sum(turned[0] * turned[1], axis=-1)[0, 0]

    for distance in (0, 1, 5):
        for start in (1, 17):
            np.testing.assert_allclose(score(start + distance, start), score(distance, 0), atol=1e-4)
    np.testing.assert_allclose(score(3, 3), (q * k).sum(-1)[0, 0], atol=1e-5)
    assert np.abs(score(4, 0) - score(0, 0)).min() > 0.05
    assert np.abs(score(4, 0) - score(0, 4)).min() > 0.05  # before and after are not the same


def test_rotary_turns_pair_k_by_position_over_base_to_the_2k_over_width():
    """As complex numbers: feature k is the real part and feature k + K/2 the imaginary part."""
    x, positions = normal(2, 5, 3, 8), np.arange(10).reshape(2, 5)
    turns = positions[..., None, None] / 50.0 ** (2 * np.arange(4) / 8)
    turned = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * turns)
    wanted = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(rotate(x, positions, 50.0), wanted, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
def test_rotary_scaling_stretches_slow_pairs_and_leaves_fast_ones(kind):
    """Pairs that turn 10, 3.2, 1 ... times in 64 positions; all by 3, or those that turn less than once."""
    plain, one = rotary_frequencies(12, 1000.0, RotaryScaling())
    scaled, attention_factor = rotary_frequencies(12, 1000.0, RotaryScaling(kind, 3.0, 64, low=1.0, high=8.0))
    stretch = plain / scaled
    np.testing.assert_allclose(stretch[-2:], 3.0, rtol=1e-5)
    np.testing.assert_allclose(stretch[0], 3.0 if kind == "linear" else 1.0, rtol=1e-5)
    assert (np.diff(stretch) >= -1e-5).all()
    assert ((stretch > 1.01) & (stretch < 2.99)).any() == (kind != "linear")
    np.testing.assert_allclose((one, attention_factor), (1.0, 1 + 0.1 * np.log(3.0) if kind == "yarn" else 1.0))
    x = normal(1, 5, 3, 12)
    at_positions = np.arange(5)[None]
    turned = rotate(x, at_positions, 1000.0, RotaryScaling(kind, 3.0, 64, low=1.0, high=8.0))
    turns = at_positions[..., None, None] * scaled
    wanted = attention_factor * (x[..., :6] + 1j * x[..., 6:]) * np.exp(1j * turns)
    np.testing.assert_allclose(turned, np.concatenate([wanted.real, wanted.imag], axis=-1), atol=1e-5)


def test_sinusoid_is_the_formula_of_the_paper():
    """arXiv 1706.03762, section 3.5: PE(pos, 2i) = sin(pos / 10000^(2i/D)), PE(pos, 2i + 1) = cos of the same."""
    wanted = np.zeros((2, 3, 14))
    positions = np.array([[0, 1, 2], [7, 40, 3]])
    for place, position in np.ndenumerate(positions):
        for i in range(7):
            angle = position / 10_000 ** (2 * i / 14)
            wanted[place][2 * i : 2 * i + 2] = math.sin(angle), math.cos(angle)
    np.testing.assert_allclose(sinusoid(jnp.asarray(positions), 14), wanted, atol=1e-5)


@pytest.mark.parametrize("cap", [0.0, 0.5])
def test_attention_is_the_formula_with_grouped_heads(cap):
    """Head h of 6 reads key-value head h // 3 of 2; softmax(q k / sqrt(K)) over the keys that the mask lets through, of
    scores that are capped as cap tanh(score / cap)."""
    q, k, v = normal(2, 4, 6, 5), normal(2, 7, 2, 5), normal(2, 7, 2, 5)
    mask = Mask.cached(jnp.array([[0, 1, 2, 3], [3, 4, 5, 6]]), size=7).windowed(4)
    visible = np.asarray(mask.materialize())
    wanted = np.zeros((2, 4, 6, 5))
    for b, t, h in np.ndindex(2, 4, 6):
        scores = k[b, :, h // 3] @ q[b, t, h] / math.sqrt(5)
        exp = np.exp(cap * np.tanh(scores / cap) if cap else scores) * visible[b, t]
        wanted[b, t, h] = exp / exp.sum() @ v[b, :, h // 3]
    np.testing.assert_allclose(jax.jit(functools.partial(attend, cap=cap))(q, k, v, mask), wanted, atol=1e-5)


def test_attention_of_one_array_on_itself():
    """The same array as queries, keys and values is scaled as queries only."""
    x = jnp.asarray(normal(1, 4, 2, 5))
    mask = Mask.self_attention(jnp.arange(4)[None], causal=True)
    np.testing.assert_array_equal(attend(x, x, x, mask), attend(x, x + 0, x + 0, mask))


def test_a_query_that_sees_nothing_is_finite_and_so_is_its_gradient():
    nobody = Mask.self_attention(jnp.arange(3)[None], causal=True, segments=jnp.array([[1, 0, 0]]))
    q, k, v = (jnp.asarray(normal(1, 3, 2, 5)) for _ in range(3))
    loss = jax.jit(jax.value_and_grad(lambda *qkv: attend(*qkv, nobody).sum(), argnums=(0, 1, 2)))
    value, gradients = loss(q, k, v)
    assert jnp.isfinite(value)
    assert all(jnp.isfinite(g).all() for g in gradients)


def test_qk_norm_makes_the_size_of_queries_and_keys_irrelevant(tiny_with, filled):
    """Over the head width: queries and keys of any size give the same attention. Without it they do not."""
    x, positions = normal(1, 5, 22), jnp.arange(5)[None]
    mask = Mask.self_attention(positions, causal=True)

    def change(cfg) -> float:
        attention = Attention(cfg)
        params = filled(attention, x, mask, positions)
        larger = params | {name: {"kernel": params[name]["kernel"] * 3} for name in ("query", "key")}
        if cfg.qk_norm:
            assert [params[n]["scale"].shape for n in ("query_norm", "key_norm")] == [(6,), (6,)]
        outputs = [jax.jit(attention.apply)({"params": p}, x, mask, positions)[0] for p in (params, larger)]
        return float(jnp.abs(outputs[0] - outputs[1]).max())

    assert change(tiny_with(qk_norm=True, bias=False)) < 1e-3
    assert change(tiny_with(qk_norm=False, bias=False)) > 1e-1


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_block_normalises_before_or_after_each_sublayer(tiny_with, filled, norm_position):
    """pre: x + f(norm(x)), the stream itself is never normalised; post: norm(x + f(x)) (arXiv 1706.03762, section 3.1)."""
    cfg, x, positions = tiny_with(norm_position=norm_position), normal(1, 5, 22), jnp.arange(5)[None]
    mask = Mask.self_attention(positions, causal=True)
    params = filled(Block(cfg), x, mask, positions)

    @jax.jit
    def by_hand(params, x):
        sublayers = {
            "attention": lambda y: Attention(cfg).apply({"params": params["attention"]}, y, mask, positions)[0],
            "mlp": lambda y: MLP(cfg).apply({"params": params["mlp"]}, y),
        }
        for name, f in sublayers.items():
            norm = functools.partial(Norm(cfg).apply, {"params": params[f"{name}_norm"]})
            x = x + f(norm(x)) if norm_position == "pre" else norm(x + f(x))
        return x

    got, _ = jax.jit(Block(cfg).apply)({"params": params}, x, mask, positions)
    np.testing.assert_allclose(got, by_hand(params, x), atol=1e-5)


@pytest.mark.parametrize("all_else", [{}, {"qk_norm": True, "activation": "swiglu", "embed_norm": True}])
def test_bias_false_leaves_no_bias(tiny_with, all_else):
    """And bias=True has one for every kernel and every layer norm."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    shapes = {
        bias: named(jax.eval_shape(GPT(tiny_with(bias=bias, **all_else)).init, jax.random.key(0), tokens)["params"])
        for bias in (True, False)
    }
    assert not [name for name in shapes[False] if name.endswith("bias")]
    owners = [name.rsplit("/", 1)[0] for name in shapes[False] if name.endswith(("kernel", "scale"))]
    without = ("query_norm", "key_norm")  # RMS norms
    wanted = {f"{owner}/bias" for owner in owners if not owner.endswith(without)}
    assert set(shapes[True]) - set(shapes[False]) == wanted


@pytest.fixture(scope="module")
def initial(tiny):
    """Initial parameters of a model whose sizes all differ and are large enough to measure a deviation on."""
    wide = dataclasses.replace(
        tiny, vocab_size=301, context_length=211, d_model=66, n_heads=14, n_kv_heads=7, d_head=10, d_value=10, d_ff=230
    )
    wide = dataclasses.replace(wide, activation="swiglu")

    @functools.cache
    def init(init: str, init_residual: str) -> dict[str, np.ndarray]:
        module = Decoder(dataclasses.replace(wide, init=init, init_residual=init_residual))
        return named(jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])

    return init


INSIDE = ["attention/query", "attention/key", "attention/value", "mlp/up", "mlp/gate"]
RESIDUAL = ["attention/out", "mlp/down"]
FAN_IN = dict.fromkeys(INSIDE, 66) | {"attention/out": 14 * 10, "mlp/down": 230}
FAN_OUT = {"attention/query": 140, "attention/key": 70, "attention/value": 70, "attention/out": 66}
FAN_OUT |= {"mlp/up": 230, "mlp/gate": 230, "mlp/down": 66}


@pytest.mark.parametrize(
    ("init", "init_residual", "std", "residual_factor"),
    [
        ("fan_in", "same", {n: f**-0.5 for n, f in FAN_IN.items()}, 1.0),
        ("normal", "depth", dict.fromkeys(FAN_IN, 0.5), 6**-0.5),  # 1/sqrt(2L), L = 3
        ("xavier", "same", {n: (2 / (f + FAN_OUT[n])) ** 0.5 for n, f in FAN_IN.items()}, 1.0),
        ("fan_in", "zero", {n: f**-0.5 for n, f in FAN_IN.items()}, 0.0),
    ],
)
def test_initial_deviations(initial, init, init_residual, std, residual_factor):
    """Every kernel has mean 0 and the deviation that init and init_residual say; embeddings have init_std = 0.5."""
    params = initial(init, init_residual)
    for name, wanted in std.items():
        kernel = params[f"stack/blocks/{name}/kernel"]
        wanted *= residual_factor if name in RESIDUAL else 1
        np.testing.assert_allclose(np.std(kernel), wanted, rtol=0.03, err_msg=name)
        assert abs(kernel.mean()) <= 0.03 * wanted
    for name in ("embed/token/embedding", "embed/position/embedding"):
        np.testing.assert_allclose(params[name].std(), 0.5, rtol=0.03, err_msg=name)
    assert all((leaf == 0).all() for name, leaf in params.items() if name.endswith("bias"))
    assert all((leaf == 1).all() for name, leaf in params.items() if name.endswith("scale"))


def test_layers_start_from_different_numbers(initial):
    kernel = initial("fan_in", "same")["stack/blocks/mlp/up/kernel"]
    assert all(np.abs(kernel[i] - kernel[j]).max() > 0.1 for i in range(3) for j in range(i))


def test_embedding_is_a_sum_of_token_position_and_type_then_norm(tiny_with, filled):
    """embed_scale multiplies the token's part alone by sqrt(D) (arXiv 1706.03762, section 3.4)."""
    cfg = tiny_with(embed_scale=True, segment_types=2, embed_norm=True)
    tokens, positions, types = jnp.array([[3, 36, 3]]), jnp.array([[0, 22, 7]]), jnp.array([[0, 1, 1]])
    params = filled(Embedding(cfg), tokens, positions, types)
    rows = [params[n]["embedding"][ids[0]] for n, ids in (("token", tokens), ("position", positions), ("segment", types))]
    total = rows[0] * math.sqrt(22) + rows[1] + rows[2]
    wanted = (total - total.mean(-1, keepdims=True)) / np.sqrt(total.var(-1, keepdims=True) + cfg.norm_eps)
    wanted = wanted * params["norm"]["scale"] + params["norm"]["bias"]
    got = jax.jit(Embedding(cfg).apply)({"params": params}, tokens, positions, types)
    np.testing.assert_allclose(got[0], wanted, atol=1e-4)


@pytest.mark.parametrize("occurrences", [512, 32_768])
def test_the_gradient_of_a_frequent_token_is_summed_in_float32(occurrences, tiny_with):
    """In bfloat16 256 + 1 is 256."""
    table = Table(tiny_with(dtype="bfloat16"), rows=3)
    ids = jnp.full((occurrences,), 2)
    params = table.init(jax.random.key(0), ids)["params"]
    assert table.apply({"params": params}, ids).dtype == jnp.bfloat16
    grads = jax.grad(lambda p: table.apply({"params": p}, ids).astype(jnp.float32).sum())(params)
    np.testing.assert_array_equal(grads["embedding"][:, 0], [0, 0, occurrences])
