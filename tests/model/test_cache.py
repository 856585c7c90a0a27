"""Reading a text through the cache, piece by piece, equals reading it at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bothways.model.cache import Cache
from bothways.model.decoder import Decoder
from bothways.model.products import transpose_kernels
from bothways.model.stack import unstack_layers

LENGTHS = np.array([3, 8, 5])  # of the prompts, right-padded to 8 slots in one batch
STEPS = 4
CASES = {
    "learned_prefix": {"layer_pattern": ("local", "global"), "window": 3, "norm_position": "post"},
    "rotary_grouped": {
        "position_embedding": "rotary",
        "n_heads": 6,
        "n_kv_heads": 2,
        "qk_norm": True,
        "scan_layers": True,
    }
    | {"layer_pattern": ("global", "local"), "window": 4, "rotary_base_local": 50.0},
    "rotary_parallel": {"position_embedding": "rotary", "parallel": "one_norm", "rotary_width": 4, "query_scale": 3.0}
    | {"score_cap": 0.5}
    | {"layer_pattern": ("nope", "global"), "qk_norm": True, "qk_norm_over": "all", "bias": False, "qkv_bias": True},
}


@dataclasses.dataclass
class Setting:
    cfg: object
    tokens: np.ndarray
    """[3, 12]: prompts and what follows them; in the padded prefill, what follows is the padding's content."""
    prefix: jax.Array | None
    full: np.ndarray
    """Features of one pass over everything, without a cache."""
    cached: object
    """(tokens, cache) -> features, cache."""

    def prefilled(self):
        features, cache = self.cached(self.tokens[:, :8], Cache.empty(self.cfg, batch=3, size=13))
        return features, cache.replace(length=jnp.asarray(LENGTHS))


@pytest.fixture(scope="module", params=CASES)
def setting(request, tiny, filled) -> Setting:
    cfg = dataclasses.replace(tiny, n_layers=2, **CASES[request.param])
    module = Decoder(cfg)
    tokens = np.random.default_rng(0).integers(0, 37, (3, 12))
    params = jax.device_put(filled(module, tokens))
    prefix = jnp.array([3, 2, 0]) if "prefix" in request.param else None
    full, none = jax.jit(lambda t: module.apply({"params": params}, t, prefix=prefix))(tokens)
    assert none is None
    # One case as several devices read them; one as a single CPU that decodes several rows at once.
    joined = "rotary" in request.param
    ready = unstack_layers(params, join=joined)
    ready = transpose_kernels(ready) if joined else ready
    cached = jax.jit(lambda t, cache: module.apply({"params": ready}, t, prefix=prefix, cache=cache))
    return Setting(cfg, tokens, prefix, np.asarray(full), cached)


def test_prefill_and_steps_equal_one_full_pass(setting):
    """Rows of different lengths go on each from its own; what the padding wrote into the cache is never seen."""
    features, cache = setting.prefilled()
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(features[row, :length], setting.full[row, :length], atol=1e-5)
    for step in range(STEPS):
        at = (np.arange(3), LENGTHS + step)
        features, cache = setting.cached(setting.tokens[at][:, None], cache)
        np.testing.assert_allclose(features[:, 0], setting.full[at], atol=1e-5)
        np.testing.assert_array_equal(cache.length, LENGTHS + step + 1)


def test_prefill_in_two_pieces_equals_one(setting):
    empty = Cache.empty(setting.cfg, batch=3, size=13)
    once, whole = setting.cached(setting.tokens[:, :8], empty)
    first, cache = setting.cached(setting.tokens[:, :4], empty)
    second, cache = setting.cached(setting.tokens[:, 4:8], cache)
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), once, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), cache, whole)


def test_taken_rows_go_on_as_the_rows_they_were_taken_from(setting):
    rows = jnp.array([2, 0, 0])
    _, cache = setting.prefilled()
    token = setting.tokens[:, :1]
    features, after = setting.cached(token, cache)
    taken, taken_after = setting.cached(token[rows], cache.gather_rows(rows))
    if setting.prefix is None:  # a prefix belongs to the row, and is not in the cache
        np.testing.assert_allclose(taken, features[rows], atol=1e-6)
    np.testing.assert_array_equal(taken_after.length, after.length[rows])
    assert after.size == 13


def test_a_cache_has_a_place_per_layer_for_keys_and_values_of_its_heads(setting):
    cache = Cache.empty(setting.cfg, batch=2, size=7)
    shapes = [(layer.k.shape, layer.v.shape) for layer in cache.layers]
    assert shapes == [((2, setting.cfg.n_kv_heads, 7, 6),) * 2] * 2
    assert cache.length.tolist() == [0, 0]
