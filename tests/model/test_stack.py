"""Properties of the whole stack: what can reach what, and that its layout in the machine changes nothing."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bothways.model.decoder import Decoder
from bothways.model.encoder import Encoder
from bothways.model.loss import cross_entropy
from bothways.model.mask import Mask
from bothways.model.stack import Stack
from bothways.registry import make_module

LOCAL = {"layer_pattern": ("local",), "window": 3}
PLAIN = {"activation": "relu", "norm": "rms", "bias": False}  # compiles in half the time


def influence(module, params, **inputs) -> np.ndarray:
    """[T, T]: how much the features at t move with the embedding of the token at s; all tokens differ."""
    tokens = jnp.array([[5, 3, 17, 36, 0, 11, 8, 2, 29]])

    def features(table: jax.Array) -> jax.Array:
        embed = params["embed"] | {"token": {"embedding": table}}
        out = module.apply({"params": params | {"embed": embed}}, tokens, **inputs)
        out = out[0] if isinstance(out, tuple) else out
        return out[0] @ jnp.cos(jnp.arange(out.shape[-1]))  # some direction; a sum would be blind after a norm

    gradient = jax.jit(jax.jacrev(features))(params["embed"]["token"]["embedding"])
    return np.abs(gradient[:, tokens[0]]).max(axis=-1)


# Through 2 layers that reach two positions each, a token reaches 4 positions.
@pytest.mark.parametrize(
    ("kind", "fields", "inputs", "reaches"),
    [
        (Decoder, {}, {}, lambda t, s: s <= t),
        (Decoder, {"norm_position": "post", "position_embedding": "rotary"}, {}, lambda t, s: s <= t),
        (Decoder, {}, {"prefix": jnp.array([4])}, lambda t, s: (s <= t) | (s < 4)),
        (Decoder, LOCAL, {}, lambda t, s: (s <= t) & (t - s <= 4)),
        (Encoder, {}, {}, lambda t, s: (t >= 0) & (s >= 0)),
        (Encoder, LOCAL, {}, lambda t, s: np.abs(t - s) <= 4),
    ],
    ids=["causal", "causal_post_norm", "prefix", "causal_local", "bidirectional", "bidirectional_local"],
)
def test_a_token_reaches_exactly_what_the_mask_lets_through(tiny_with, filled, kind, fields, inputs, reaches):
    """The gradient of the features at t with respect to the input at s is 0 exactly where s may not be seen."""
    module = kind(tiny_with(**PLAIN, n_layers=2, **fields))
    found = influence(module, jax.device_put(filled(module, jnp.zeros((1, 2), jnp.int32))), **inputs)
    t, s = np.indices((9, 9))
    assert (found[~reaches(t, s)] == 0).all()
    assert (found[reaches(t, s)] > 1e-6).all()


def test_cross_attention_reaches_the_memory_of_its_segment(tiny_with, filled):
    stack = Stack(tiny_with(**PLAIN, n_layers=2, scan_layers=True), cross=True)
    rng = np.random.default_rng(0)
    x, memory = (jnp.asarray(rng.normal(size=(1, n, 22)), jnp.float32) for n in (4, 5))
    q_segments, k_segments = jnp.array([[1, 1, 2, 2]]), jnp.array([[1, 2, 2, 0, 1]])
    positions = jnp.arange(4)[None]
    mask = Mask.self_attention(positions, causal=True, segments=q_segments)
    memory_mask = Mask.cross(q_segments, k_segments)
    params = jax.device_put(filled(stack, x, mask, positions, memory=memory, memory_mask=memory_mask))

    def features(memory):
        y, _ = stack.apply({"params": params}, x, mask, positions, None, memory, memory_mask)
        return y[0] @ jnp.cos(jnp.arange(22))

    gradient = np.abs(jax.jit(jax.jacrev(features))(memory)[:, 0]).max(axis=-1)
    same = np.asarray(q_segments[0][:, None] == k_segments[0])
    assert (gradient[~same] == 0).all()
    assert (gradient[same] > 1e-6).all()


def same(got, wanted):
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5 * np.abs(w).max()), got, wanted)


@pytest.fixture(scope="module")
def value_and_gradients(tiny, filled):
    """Of a loss with dropout, the key always the same; the last of 5 layers is left over by the loop over pairs."""
    pattern = {"n_layers": 5, "layer_pattern": ("global", "local"), "window": 3}
    rotary = {"position_embedding": "rotary", "rotary_base_local": 50.0}
    cfg = dataclasses.replace(tiny, **PLAIN, **pattern, **rotary, dropout_residual=0.3, first_norm=False)

    def run(**layout):
        module = Decoder(dataclasses.replace(cfg, **layout))
        tokens = jnp.asarray(np.random.default_rng(0).integers(0, 37, (2, 7)))

        def loss(params, key):
            features, _ = module.apply({"params": params}, tokens, deterministic=False, rngs={"dropout": key})
            return jnp.mean(features**3)

        return jax.jit(jax.value_and_grad(loss))(filled(module, tokens), jax.random.key(1))

    return run


@pytest.fixture(scope="module")
def unrolled(value_and_gradients):
    return value_and_gradients(scan_layers=False, remat="none")


@pytest.mark.parametrize(("scan_layers", "remat"), [(True, "dots"), (False, "full")])
def test_layout_changes_nothing(value_and_gradients, unrolled, scan_layers, remat):
    """Scanned or unrolled, rematerialised or not: the same loss and gradients, dropout included."""
    same(value_and_gradients(scan_layers=scan_layers, remat=remat), unrolled)


def test_without_a_first_norm_only_the_first_block_has_none(unrolled):
    gradient = unrolled[1]["stack"]["blocks"]["attention_norm"]["scale"]
    assert [bool(np.any(layer)) for layer in np.asarray(gradient)] == [False, True, True, True, True]


def test_scanned_equals_unrolled_without_a_pattern(tiny_with, filled):
    tokens = jnp.array([[5, 3, 17, 36, 0]])
    modules = [Decoder(tiny_with(scan_layers=scan)) for scan in (False, True)]
    same(*(jax.jit(module.apply)({"params": filled(module, tokens)}, tokens)[0] for module in modules))


@pytest.mark.parametrize(("fields", "kinds"), [({}, 1), ({"layer_pattern": ("global", "local"), "window": 3}, 2)])
def test_layers_that_are_alike_are_traced_once(tiny_with, fields, kinds):
    """Unrolled, with dropout: forward and backward know one block of each kind, however many layers there are."""

    def products(layers: int) -> int:
        module = Decoder(tiny_with(**PLAIN, **fields, n_layers=layers, dropout_residual=0.1))
        tokens = jnp.zeros((1, 5), jnp.int32)
        params = jax.eval_shape(lambda: module.init(jax.random.key(0), tokens)["params"])
        rngs = {"dropout": jax.random.key(1)}
        loss = jax.grad(lambda p: module.apply({"params": p}, tokens, deterministic=False, rngs=rngs)[0].sum())
        return jax.jit(loss).lower(params).as_text().count("dot_general")

    assert products(kinds) == products(3 * kinds) == products(5 * kinds)


def test_in_bfloat16_every_product_of_a_training_step_on_a_cpu_gives_float32(tiny_with):
    """Projections, attention, the table and all their gradients: no operand was made wide, no sum is narrow."""
    module = make_module("gpt", tiny_with(dtype="bfloat16", n_kv_heads=1))
    tokens = jnp.zeros((2, 5), jnp.int32)
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), tokens)["params"])

    def loss(params):
        def run(module):
            features, _ = module(tokens)
            return cross_entropy(features, *module.unembedding(), tokens, jnp.ones(tokens.shape)).nats

        return module.apply({"params": params}, method=run)

    text = jax.jit(jax.grad(loss)).lower(params).as_text()
    found = re.findall(r"dot_general .* : \(tensor<\S*?(\w+)>, tensor<\S*?(\w+)>\) -> tensor<\S*?(\w+)>", text)
    assert len(found) > 20
    assert {tuple(name.split("x")[-1] for name in one) for one in found} == {("bf16", "bf16", "f32")}


def test_layers_drop_different_features_at_the_configured_rate(tiny_with, filled):
    """Each layer is made to add dropout(1) to a stream of zeros: with rate 1/5, 0 or 5/4.

    Layers that dropped the same features could only add up to 0 or 15/4.
    """
    stack = Stack(tiny_with(dropout_residual=0.2))
    x, positions = jnp.zeros((1, 99, 22)), jnp.arange(99)[None]
    mask = Mask.self_attention(positions, causal=True)
    params = jax.tree.map(np.zeros_like, filled(stack, x, mask, positions))
    params["blocks"]["mlp"]["down"]["bias"] += 1

    @jax.jit
    def run(key):
        return stack.apply({"params": params}, x, mask, positions, deterministic=False, rngs={"dropout": key})[0]

    total = np.asarray(run(jax.random.key(0)))
    values, counts = np.unique(np.round(total, 4), return_counts=True)
    np.testing.assert_array_equal(values, [0, 1.25, 2.5, 3.75])
    binomial = [0.2**3, 3 * 0.8 * 0.2**2, 3 * 0.8**2 * 0.2, 0.8**3]
    np.testing.assert_allclose(counts / total.size, binomial, atol=0.04)
    assert (run(jax.random.key(1)) != total).any()


READERS = [("decoder", "learned"), ("decoder", "sinusoidal"), ("decoder", "rotary"), ("encoder", "rotary")]


@pytest.fixture(scope="module", params=READERS, ids="-".join)
def read(request, tiny, filled):
    """(tokens, positions, segments) -> features, of a model with a local layer."""
    kind, positions = request.param
    cfg = dataclasses.replace(tiny, position_embedding=positions, n_layers=2, layer_pattern=("global", "local"), window=3)
    module = {"decoder": Decoder, "encoder": Encoder}[kind](cfg)
    params = jax.device_put(filled(module, jnp.zeros((1, 2), jnp.int32)))

    @jax.jit
    def run(tokens, positions, segments):
        out = module.apply({"params": params}, tokens, positions, segments)
        return out[0] if isinstance(out, tuple) else out

    return run


FIRST, SECOND, OTHER = [5, 3, 17, 36, 0], [11, 8, 2, 29, 8], [1, 1, 9, 30, 2]


def row(read, *documents: list[int], padding: list[int]) -> np.ndarray:
    """Features of documents packed into a row; its padding is segment 0."""
    lengths = [len(document) for document in documents]
    positions = np.concatenate([np.arange(n) for n in (*lengths, len(padding))])
    segments = np.repeat([*range(1, len(documents) + 1), 0], [*lengths, len(padding)])
    tokens = np.concatenate([*documents, padding]).astype(np.int32)
    return np.asarray(read(*(jnp.asarray(numbers[None], jnp.int32) for numbers in (tokens, positions, segments))))[0]


def test_a_packed_document_gives_what_it_gives_alone(read):
    packed = row(read, FIRST, SECOND, padding=[0] * 3)
    for document, found in ((FIRST, packed[:5]), (SECOND, packed[5:10])):
        np.testing.assert_allclose(row(read, document, padding=[0] * 8)[:5], found, atol=1e-5)


def test_changing_a_neighbour_or_the_padding_changes_nothing(read):
    """Not one bit."""
    before = row(read, FIRST, SECOND, padding=[0] * 3)
    other_first = row(read, OTHER, SECOND, padding=[0] * 3)
    other_second = row(read, FIRST, OTHER, padding=[0] * 3)
    other_padding = row(read, FIRST, SECOND, padding=[7, 8, 9])
    np.testing.assert_array_equal(other_first[5:10], before[5:10])
    np.testing.assert_array_equal(other_second[:5], before[:5])
    np.testing.assert_array_equal(other_padding[:10], before[:10])
    assert (other_first[:5] != before[:5]).any(axis=-1).all()
    assert (other_second[5:10] != before[5:10]).any(axis=-1).all()


@pytest.mark.parametrize("read", [("encoder", "rotary")], indirect=True, ids="-".join)
def test_a_padded_text_gives_what_it_gives_without_padding(read):
    padded = row(read, FIRST, padding=[7] * 8)
    np.testing.assert_allclose(padded[:5], row(read, FIRST, padding=[]), atol=1e-5)


def test_layers_that_are_all_alike_are_scanned_one_at_a_time(value_and_gradients):
    alike = {"layer_pattern": ("local",)}
    same(value_and_gradients(scan_layers=True, **alike), value_and_gradients(scan_layers=False, **alike))
