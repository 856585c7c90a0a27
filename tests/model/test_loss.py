"""Cross-entropy in pieces, against the naive formula on all logits at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bothways.model import loss as model_loss
from bothways.model.loss import cross_entropy, token_logprobs

B, T, D, V = 3, 12, 7, 53
RNG = np.random.default_rng(0)
FEATURES = jnp.asarray(RNG.normal(size=(B, T, D)), jnp.float32)
TABLE = jnp.asarray(RNG.normal(size=(V, D)), jnp.float32)
BIAS = jnp.asarray(RNG.normal(size=(V,)), jnp.float32)
TARGETS = jnp.asarray(RNG.choice(np.delete(np.arange(V), 5), (B, T)))
WEIGHTS = jnp.asarray(RNG.choice([0.0, 0.5, 1.0, 3.0], (B, T)), jnp.float32)


def naive(features, table, bias, smoothing=0.0, cap=0.0):
    """-sum of weight * (smoothed target distribution . log softmax)."""
    logits = features @ table.T
    logits = (cap * jnp.tanh(logits / cap) if cap else logits) + bias
    target = (1 - smoothing) * jax.nn.one_hot(TARGETS, V) + smoothing / V
    return -jnp.sum(WEIGHTS[..., None] * target * jax.nn.log_softmax(logits))


def pieced(features, table, bias, cap=0.0, smoothing=0.0, max_logits=None):
    return cross_entropy(features, table, bias, cap, TARGETS, WEIGHTS, smoothing, max_logits).nats


# Times 3: what comes after the loss must reach every gradient.
naive_gradients = jax.jit(jax.value_and_grad(lambda *a: 3 * naive(*a), argnums=(0, 1, 2)), static_argnums=4)


def gradients(*arguments, **options):
    numbers = tuple(i for i, a in enumerate(arguments) if a is not None)
    return jax.jit(jax.value_and_grad(lambda *a: 3 * pieced(*a, **options), argnums=numbers))(*arguments)


@pytest.mark.parametrize(
    ("max_logits", "smoothing", "bias"),
    [  # 12 positions in 1, 2, 6 and 12 pieces; the last limit is less than one position has
        (None, 0.0, BIAS),
        (B * 6 * V, 0.2, None),
        (B * 3 * V - 1, 0.2, BIAS),
        (1, 0.0, None),
    ],
)
def test_value_and_gradients_are_those_of_the_naive_formula(max_logits, smoothing, bias):
    got, got_gradients = gradients(FEATURES, TABLE, bias, smoothing=smoothing, max_logits=max_logits)
    wanted, wanted_gradients = naive_gradients(FEATURES, TABLE, jnp.zeros(V) if bias is None else bias, smoothing)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    for g, w in zip(got_gradients, wanted_gradients, strict=bias is not None):
        np.testing.assert_allclose(g, w, atol=1e-4)


@pytest.mark.parametrize("cap", [0.7, 3.0])
@pytest.mark.parametrize(("max_logits", "smoothing", "bias"), [(None, 0.2, None), (B * 3 * V, 0.0, BIAS)])
def test_capped_scores_have_the_value_and_gradients_of_the_naive_formula(max_logits, smoothing, bias, cap):
    """A bias that hides what fills up the table is beyond any cap."""
    bias = bias if bias is None else bias.at[5].set(-1e30)
    got, got_gradients = gradients(FEATURES, TABLE, bias, cap=cap, smoothing=smoothing, max_logits=max_logits)
    arguments = FEATURES, TABLE, jnp.zeros(V) if bias is None else bias
    wanted, wanted_gradients = naive_gradients(*arguments, smoothing, cap)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    for g, w in zip(got_gradients, wanted_gradients, strict=bias is not None):
        np.testing.assert_allclose(g, w, atol=1e-4)
    assert abs(wanted - naive_gradients(*arguments, smoothing, 0.0)[0]) > 1
    logits = cap * jnp.tanh(FEATURES @ TABLE.T / cap) + (0 if bias is None else bias)
    logprobs = token_logprobs(FEATURES, TABLE, bias, cap, TARGETS, B * 4 * V)
    exact = jnp.take_along_axis(jax.nn.log_softmax(logits), TARGETS[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(logprobs, exact, rtol=1e-5)


def test_the_loss_without_a_gradient_is_the_same():
    got = jax.jit(lambda: pieced(FEATURES, TABLE, BIAS, smoothing=0.1, max_logits=B * 4 * V))()
    np.testing.assert_allclose(3 * got, naive_gradients(FEATURES, TABLE, BIAS, 0.1)[0], rtol=1e-5)


def test_large_logits_do_not_overflow():
    value, found = gradients(1e3 * FEATURES, TABLE, BIAS, max_logits=B * 4 * V)
    np.testing.assert_allclose(value, naive_gradients(1e3 * FEATURES, TABLE, BIAS, 0.0)[0], rtol=1e-5)
    assert all(jnp.isfinite(g).all() for g in found)


def test_a_token_of_weight_zero_is_not_there():
    """Its features change nothing, and it gets no gradient; every other token does."""
    out = np.asarray(WEIGHTS == 0)
    other = jnp.where(out[..., None], 9.0, FEATURES)
    (got, (dx, *d_rest)), (wanted, (_, *d_wanted)) = (
        gradients(x, TABLE, BIAS, max_logits=B * 4 * V) for x in (other, FEATURES)
    )
    assert got == wanted
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-4), d_rest, d_wanted)
    np.testing.assert_array_equal(np.abs(dx).max(axis=-1) > 0, ~out)


def test_bfloat16_features_lose_no_more_than_their_own_rounding():
    """Sums and the table's gradient are in float32; the features' gradient comes back in bfloat16."""
    narrow = FEATURES.astype(jnp.bfloat16)
    value, found = gradients(narrow, TABLE, BIAS, max_logits=B * 4 * V)
    rounded = narrow.astype(jnp.float32), TABLE.astype(jnp.bfloat16).astype(jnp.float32)
    wanted, wanted_gradients = naive_gradients(*rounded, BIAS, 0.0)
    assert [g.dtype for g in found] == [jnp.bfloat16, jnp.float32, jnp.float32]
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    for got, exact in zip(found, wanted_gradients, strict=True):
        assert np.abs(np.asarray(got, np.float32) - exact).max() < 2**-8 * np.abs(exact).max()


@pytest.mark.parametrize("max_logits", [None, B * 4 * V])
def test_correct_counts_the_weight_of_right_predictions(max_logits):
    best = jnp.argmax(FEATURES @ TABLE.T + BIAS, axis=-1)
    right = TARGETS % 2 == 0
    targets = jnp.where(right, best, (best + 1) % V)
    got = jax.jit(lambda: cross_entropy(FEATURES, TABLE, BIAS, 0.0, targets, WEIGHTS, max_logits=max_logits))()
    assert got.correct == jnp.sum(WEIGHTS * right)


def array_sizes(jaxpr) -> set[int]:
    """Elements of every array that a program makes, inside loops and calls too."""
    sizes = set()
    for eqn in jaxpr.eqns:
        sizes |= {int(np.prod(v.aval.shape)) for v in eqn.outvars}
        for parameter in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(parameter, "jaxpr", parameter)
            sizes |= array_sizes(inner) if hasattr(inner, "eqns") else set()
    return sizes


@pytest.mark.parametrize("with_gradient", [False, True])
def test_all_logits_never_exist_at_once(with_gradient):
    """No array of the program is larger than max_logits, forward and backward; without a limit one holds B T V."""

    def largest(max_logits) -> int:
        def loss(*arguments):
            return pieced(*arguments, smoothing=0.1, max_logits=max_logits)

        program = jax.value_and_grad(loss, argnums=(0, 1, 2)) if with_gradient else loss
        return max(array_sizes(jax.make_jaxpr(program)(FEATURES, TABLE, BIAS).jaxpr))

    assert largest(None) == B * T * V
    assert largest(B * 4 * V) == B * 4 * V


def test_devices_that_share_nothing_add_no_room_for_logits(monkeypatch):
    """The budget of one device, although the process has eight: nothing is spread here."""
    assert jax.device_count() == 8
    monkeypatch.setattr(model_loss, "MAX_LOGITS", B * 4 * V)
    sizes = array_sizes(
        jax.make_jaxpr(lambda *x: pieced(*x, smoothing=0.1, max_logits=None))(FEATURES, TABLE, BIAS).jaxpr
    )
    assert max(sizes) == B * 4 * V
