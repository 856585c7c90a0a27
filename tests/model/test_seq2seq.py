"""The encoder-decoder: what it sees, cached decoding, sizes of the published models, stability at initialisation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bothways.configs import find
from bothways.model.cache import Cache
from bothways.registry import make_module
from bothways.rundir import param_shapes

SOURCES = np.array([5, 2, 7])  # of a batch right-padded to 7 positions
LENGTHS = np.array([3, 5, 1])  # of the targets' beginnings, right-padded to 5
STEPS = 3
CASES = {
    "as_published": {"position_embedding": "sinusoidal", "norm_position": "post", "embed_scale": True, "d_value": 5},
    "modern": {"position_embedding": "rotary", "n_heads": 6, "n_kv_heads": 2, "qk_norm": True, "tie_embeddings": False}
    | {"layer_pattern": ("global", "local"), "window": 4, "scan_layers": True},
}


@dataclasses.dataclass
class Setting:
    module: object
    params: dict
    source: np.ndarray
    segments: np.ndarray
    """[3, 7]: 1 where the source is."""
    tokens: np.ndarray
    """[3, 8]: targets."""

    def full(self, tokens, source, **rest):
        run = jax.jit(lambda params, *inputs, **rest: self.module.apply({"params": params}, *inputs, **rest))
        return np.asarray(run(self.params, tokens, source, **rest))


@pytest.fixture(scope="module", params=CASES)
def setting(request, tiny, filled) -> Setting:
    module = make_module("seq2seq", dataclasses.replace(tiny, n_layers=2, **CASES[request.param]))
    rng = np.random.default_rng(0)
    source, tokens = rng.integers(0, 37, (3, 7)), rng.integers(0, 37, (3, 8))
    segments = (np.arange(7) < SOURCES[:, None]).astype(np.int32)
    return Setting(module, jax.device_put(filled(module, tokens, source)), source, segments, tokens)


def test_cached_decoding_equals_one_full_pass(setting):
    """Ragged sources and ragged targets: the encoder runs once, then each row goes on from its own length."""
    full = setting.full(setting.tokens, setting.source, source_segments=setting.segments)
    apply = setting.module.apply
    begin = jax.jit(lambda params, *source: apply({"params": params}, *source, 13, method="init_cache"))
    decode = jax.jit(lambda params, tokens, cache: apply({"params": params}, tokens, cache, method="decode"))
    cache = begin(setting.params, setting.source, setting.segments)
    remembered = [layer.cross_kv for layer in cache.layers]
    features, cache = decode(setting.params, setting.tokens[:, :5], cache)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(features[row, :length], full[row, :length], atol=1e-5)
    cache = cache.replace(length=jnp.asarray(LENGTHS))
    for step in range(STEPS):
        at = (np.arange(3), LENGTHS + step)
        features, cache = decode(setting.params, setting.tokens[at][:, None], cache)
        np.testing.assert_allclose(features[:, 0], full[at], atol=1e-5)
    for before, layer in zip(remembered, cache.layers, strict=True):
        np.testing.assert_array_equal(before.k, layer.cross_kv.k)


def test_a_target_sees_its_past_and_all_of_its_source(setting):
    """The gradient of the features at place 3 with respect to every input, seen through the embedding of each place."""
    table = np.asarray(setting.params["embed"]["token"]["embedding"])

    def at_three(token_vectors, source_vectors):
        # Every position gets a row of the table of its own, so that the gradient distinguishes positions.
        vectors = jnp.concatenate([token_vectors, source_vectors, table[15:]])
        params = setting.params | {"embed": {"token": {"embedding": vectors}}}
        tokens, source = jnp.arange(8)[None], 8 + jnp.arange(7)[None]
        segments = jnp.asarray(setting.segments[:1])
        features = setting.module.apply({"params": params}, tokens, source, source_segments=segments)
        return jnp.sum(features[0, 3] ** 3)

    by_token, by_source = jax.jit(jax.grad(at_three, (0, 1)))(table[:8], table[8:15])
    np.testing.assert_array_equal(np.abs(by_token).sum(1) > 0, np.arange(8) <= 3)
    np.testing.assert_array_equal(np.abs(by_source).sum(1) > 0, setting.segments[0] > 0)


def test_pairs_packed_into_a_row_are_what_they_are_alone(setting):
    source, tokens = setting.source[:1], setting.tokens[:1]
    numbers = {
        "source_segments": np.array([[1, 1, 1, 2, 2, 2, 0]]),
        "source_positions": np.array([[0, 1, 2, 0, 1, 2, 0]]),
        "segments": np.array([[1, 1, 2, 2, 2, 2, 0, 0]]),
        "positions": np.array([[0, 1, 0, 1, 2, 3, 0, 0]]),
    }
    packed = setting.full(tokens, source, **numbers)
    np.testing.assert_allclose(packed[:, :2], setting.full(tokens[:, :2], source[:, :3]), atol=1e-5)
    np.testing.assert_allclose(packed[:, 2:6], setting.full(tokens[:, 2:6], source[:, 3:6]), atol=1e-5)


def test_following_the_survivors_of_a_search_leaves_the_sources_alone(tiny):
    cache = Cache.empty(tiny, 4, 3)
    numbered = jax.tree.map(lambda x: x + jnp.arange(4).reshape(4, *[1] * (x.ndim - 1)).astype(x.dtype), cache)
    layers = tuple(layer.replace(cross_kv=layer) for layer in numbered.layers)
    taken = numbered.replace(layers=layers).gather_rows(jnp.array([2, 2, 0, 1]), cross=False)
    assert taken.length.tolist() == [2, 2, 0, 1]
    assert taken.layers[0].k[:, 0, 0, 0].tolist() == [2, 2, 0, 1]
    assert taken.layers[0].cross_kv.k[:, 0, 0, 0].tolist() == [0, 1, 2, 3]


# Table 3 of arXiv 1706.03762, millions of parameters: what each row's flags change against base. The paper rounds
# to millions and does not print its vocabulary's exact size, so differences are compared, to 1.5 million.
TABLE_3 = {
    "N2": ({"n_layers": 2}, 36),
    "N4": ({"n_layers": 4}, 50),
    "N8": ({"n_layers": 8}, 80),
    "d_k 16": ({"d_head": 16, "d_value": 64}, 58),
    "d_k 32": ({"d_head": 32, "d_value": 64}, 60),
    "d_ff 1024": ({"d_ff": 1024}, 53),
    "d_ff 4096": ({"d_ff": 4096}, 90),
    "h 1": ({"n_heads": 1}, 65),
    "h 32": ({"n_heads": 32}, 65),
}


def millions(recipe, **fields) -> float:
    model = dataclasses.replace(recipe.model, scan_layers=True, **fields)
    shapes = param_shapes(dataclasses.replace(recipe, model=model))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6


@pytest.mark.parametrize("row", TABLE_3)
def test_sizes_of_the_ablations_are_the_published(row):
    fields, printed = TABLE_3[row]
    base = find("transformer_base")
    assert abs((millions(base, **fields) - millions(base)) - (printed - 65)) < 1.5


def test_sizes_of_base_and_big():
    """4 D^2 + 4 D per attention, 2 D F + F + D per MLP, 2 D per norm, and one table for everything."""
    for name, layers, width, ff, printed in (("base", 6, 512, 2048, 65), ("big", 6, 1024, 4096, 213)):
        attention, mlp, norm = 4 * width**2 + 4 * width, 2 * width * ff + ff + width, 2 * width
        exact = 37_000 * width + layers * (3 * attention + 2 * mlp + 5 * norm)
        assert millions(find(f"transformer_{name}")) * 1e6 == exact
        assert abs(exact / 1e6 / printed - 1) < 0.04


@pytest.mark.parametrize(("layers", "residual", "least"), [(6, "same", 0.1), (12, "same", 0.01), (12, "depth", 0.3)])
def test_post_norm_is_stable_at_initialisation(layers, residual, least):
    """Activations keep their variance in every layer, and no layer's gradient vanishes or explodes.

    As published, a norm after each sum of two equal variances shrinks what flows back through it, so gradients fall
    toward the first layers, by 1/sqrt(2) a layer and no faster (arXiv 2002.04745, section 3.2). With
    init_residual=depth they hardly do.
    """
    published = find("transformer_base").model
    small = {"vocab_size": 53, "d_model": 64, "n_heads": 4, "d_ff": 256, "init_std": 64**-0.5, "context_length": 16}
    off = {"dropout_embed": 0.0, "dropout_residual": 0.0, "dtype": "float32", "scan_layers": True}
    cfg = dataclasses.replace(published, **small | off | {"n_layers": layers, "init_residual": residual}).resolved()
    module = make_module("seq2seq", cfg)
    rng = np.random.default_rng(0)
    tokens, source = rng.integers(0, 53, (4, 13)), rng.integers(0, 53, (4, 11))
    params = jax.jit(module.init)(jax.random.key(0), tokens, source)["params"]

    def loss(params):
        features = module.apply({"params": params}, tokens, source)
        logits = module.apply({"params": params}, features, method="logits")
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.roll(tokens, -1, 1)[..., None], 2)
        return -jnp.mean(picked), features

    grads, features = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert abs(float(jnp.var(features)) - 1) < 0.1
    for side in ("encoder", "decoder"):
        for name, kernel in jax.tree_util.tree_leaves_with_path(grads[side]["stack"]["blocks"]["mlp"]):
            if kernel.ndim == 3:
                norms = np.sqrt(np.square(kernel).sum((1, 2)))
                assert norms.min() > least * norms.max(), (side, name, norms)
                steps = norms[1:] / norms[:-1]
                assert steps.min() > 0.5, (side, name, norms)
                assert steps.max() < 2.5, (side, name, norms)
