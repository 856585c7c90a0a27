"""Dropout by hash: as random as threefry's where it is tested, and a function of seed and position alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bothways.model.dropout import Dropout, ScoreDropout, column_hash, keep_factor, row_hash, seed_words

RATE = 0.1
ROWS, COLUMNS, SEEDS = 512, 509, 6


def hashed(seed: int) -> np.ndarray:
    words = seed_words(jax.random.key(seed))
    row, column = (
        row_hash(words, jnp.arange(ROWS, dtype=jnp.uint32)),
        column_hash(words, jnp.arange(COLUMNS, dtype=jnp.uint32)),
    )
    return np.asarray(keep_factor(RATE, row[:, None], column) == 0, np.float64)


def threefry(seed: int) -> np.ndarray:
    return np.asarray(jax.random.bernoulli(jax.random.key(seed), RATE, (ROWS, COLUMNS)), np.float64)


def statistics(draw) -> dict[str, float]:
    """Each in units of its standard deviation if all elements were independent."""
    masks = np.stack([draw(seed) for seed in range(SEEDS)])
    x = (masks - RATE) / np.sqrt(RATE * (1 - RATE))
    n = x[0].size

    def worst(z) -> float:
        return float(np.max(np.abs(z)))

    lags = [(0, 1), (0, 2), (0, 64), (0, 128), (1, 0), (2, 0), (64, 0), (256, 0), (1, 1), (3, 5), (128, 128)]
    pairs = [np.sum(x * np.roll(x, lag, (1, 2)), axis=(1, 2)) / np.sqrt(n) for lag in lags]
    spectrum = np.abs(np.fft.fft2(x)) ** 2 / n  # exponential: a period in the mask would stand out
    rows, columns = x.sum(2) / np.sqrt(COLUMNS), x.sum(1) / np.sqrt(ROWS)
    return {
        "rate": worst(x.sum((1, 2)) / np.sqrt(n)),
        "row": worst(rows),
        "column": worst(columns),
        "variance of rows": worst((np.var(rows, axis=1) - 1) * np.sqrt(ROWS / 2)),
        "variance of columns": worst((np.var(columns, axis=1) - 1) * np.sqrt(COLUMNS / 2)),
        "neighbours": worst(np.array(pairs)),
        "seeds": worst([np.sum(x[i] * x[j]) / np.sqrt(n) for i in range(SEEDS) for j in range(i)]),
        "seeds, shifted": worst(
            [np.sum(x[0] * np.roll(x[1], (i, j), (0, 1))) / np.sqrt(n) for i in range(5) for j in range(5)]
        ),
        "spectrum": float(spectrum[:, 1:, 1:].max()),
    }


LIMITS = {"row": 5.5, "column": 5.5, "spectrum": 22.0}


@pytest.mark.parametrize("draw", [threefry, hashed])
def test_masks_are_random(draw):
    """Rate, rows, columns, neighbours, seeds (which stand for layers and steps) and periods; threefry by the same limits."""
    found = statistics(draw)
    assert {name: z for name, z in found.items() if z > LIMITS.get(name, 4.5)} == {}


def test_rates_are_what_they_say():
    row, column = (f(jnp.array([3, 5], jnp.uint32), jnp.arange(1000, dtype=jnp.uint32)) for f in (row_hash, column_hash))
    for rate in (0.001, 0.1, 0.5, 0.97):
        factor = keep_factor(rate, row[:, None], column)
        assert np.mean(np.asarray(factor) == 0) == pytest.approx(rate, abs=4.5 * (rate * (1 - rate) / 1e6) ** 0.5)
        np.testing.assert_allclose(np.unique(factor), [0, 1 / (1 - rate)], rtol=1e-6)


def test_any_part_of_a_score_mask_is_that_of_the_whole():
    drop = ScoreDropout(jnp.array([7, 11], jnp.uint32), 0.3)
    whole = drop.factor(2, 3, 13, None, jnp.arange(17))
    part = drop.factor(2, 3, 13, jnp.arange(5, 9), jnp.arange(2, 11))
    np.testing.assert_array_equal(part, whole[:, :, 5:9, 2:11])
    assert len({whole[b, h].tobytes() for b in range(2) for h in range(3)}) == 6


def test_the_module_follows_its_key_and_the_rate_only():
    x = jnp.ones((3, 5, 7), jnp.bfloat16)

    def run(seed, x=x, **fields):
        return Dropout(**{"rate": 0.5} | fields).apply({}, x, rngs={"dropout": jax.random.key(seed)})

    y = run(0)
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(np.unique(y.astype(jnp.float32)), [0, 2])
    assert (y == run(0)).all()
    assert (y != run(1)).any()
    np.testing.assert_array_equal(run(0, x * 3), y * 3)
    assert Dropout(0.5, deterministic=True).apply({}, x) is x
    assert Dropout(0.0).apply({}, x) is x
    assert Dropout(0.5).apply({}, x, True) is x


@pytest.mark.parametrize("spec", [("a", "b", None), (None, "a", "b"), ("b", None, "a")])
def test_masks_do_not_depend_on_the_mesh(spec, eight_devices):
    x = jnp.ones((4, 8, 16))
    mesh = jax.make_mesh((2, 4), ("a", "b"), devices=eight_devices)
    at = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    def run(x):
        return Dropout(0.5).apply({}, x, rngs={"dropout": jax.random.key(3)})

    spread = jax.jit(run, in_shardings=at, out_shardings=at)
    np.testing.assert_array_equal(spread(x), run(x))
    program = spread.lower(x).compile().as_text()
    assert "all-" not in program
    assert "[4,8,16]" not in program.split("ENTRY")[1]  # no device draws the whole mask
