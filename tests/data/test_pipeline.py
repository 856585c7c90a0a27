"""The order of examples is one endless stream, whoever reads it, in whatever pieces, from wherever."""

import numpy as np
import pytest

from bothways.data.pipeline import Stacked, evaluation_batches, training_batches
from bothways.data.rng import ExampleRng, epoch_permutation

ROWS = 11
SEED = 5


def rows_of(count: int, offset: int = 0) -> Stacked:
    return Stacked([{"tokens": np.array([i + offset, i + offset], np.int32)} for i in range(count)])


def example(rows, draws):
    """The rows' numbers, something drawn, and weights that tell a real example from an empty one."""
    draw = draws.bits(2)
    return {"row": rows["tokens"][:, 0], "draw": draw, "weights": np.ones(draw.shape, np.float32)}


def take(iterator, count: int) -> list[dict[str, np.ndarray]]:
    return [next(iterator) for _ in range(count)]


def shares(batch_size: int, hosts: int) -> list[np.ndarray]:
    """The rows of every host: neighbours together."""
    return np.split(np.arange(batch_size), hosts)


def read(batches: int, batch_size: int, position: int = 0, hosts: int = 1, seed: int = SEED, rows=None):
    """Global batches, put together from what the hosts read."""
    options = {"batch_size": batch_size, "seed": seed, "position": position}
    rows = rows_of(ROWS) if rows is None else rows
    parts = [take(training_batches(rows, example, mine=mine, **options), batches) for mine in shares(batch_size, hosts)]
    assert all(len(batch["row"]) == batch_size // hosts for part in parts for batch in part)
    return [joined(of_hosts) for of_hosts in zip(*parts, strict=True)]


def joined(batches) -> dict[str, np.ndarray]:
    return {k: np.concatenate([batch[k] for batch in batches]) for k in batches[0]}


@pytest.fixture(scope="module")
def stream() -> dict[str, np.ndarray]:
    """The first examples of the run, read one at a time by one host: five epochs and a little."""
    return joined(read(60, 1))


def check(batches, stream, position: int) -> None:
    found = joined(batches)
    for name, values in found.items():
        np.testing.assert_array_equal(values, stream[name][position : position + len(values)])


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_global_batches_are_the_same_for_any_number_of_hosts(stream, hosts):
    batches = read(7, 8, hosts=hosts)
    assert len(batches) == 7
    check(batches, stream, 0)


def test_a_host_reads_any_rows_of_a_batch(stream):
    """On a mesh that follows the network a host's rows need not be neighbours, and hosts may hold the same ones."""
    mine = np.array([0, 1, 4, 5])
    found = joined(take(training_batches(rows_of(ROWS), example, batch_size=8, seed=SEED, position=3, mine=mine), 2))
    np.testing.assert_array_equal(found["draw"], stream["draw"][3 + np.concatenate([mine, mine + 8])])


@pytest.mark.parametrize("position", [0, 1, 3, ROWS - 1, ROWS, ROWS + 1, 2 * ROWS + 5])
@pytest.mark.parametrize(("batch_size", "hosts"), [(1, 1), (4, 1), (4, 2), (4, 4), (6, 2), (24, 4)])
def test_a_resumed_run_reads_on_as_if_it_had_never_stopped(stream, position, batch_size, hosts):
    check(read(1 if batch_size > 10 else 3, batch_size, position, hosts), stream, position)


def test_the_number_of_hosts_and_the_batch_size_may_change_on_the_way(stream):
    pieces = [(2, 4, 4), (3, 2, 1), (2, 8, 2), (1, 6, 3)]  # (batches, batch size, hosts)
    batches, position = [], 0
    for count, batch_size, hosts in pieces:
        batches += read(count, batch_size, position, hosts)
        position += count * batch_size
    assert len(joined(batches)["row"]) == position == 36
    check(batches, stream, 0)


def test_an_epoch_visits_every_row_once(stream):
    for epoch in range(5):
        assert sorted(stream["row"][epoch * ROWS : (epoch + 1) * ROWS]) == list(range(ROWS))


def test_epochs_and_seeds_have_orders_of_their_own(stream):
    epochs = {tuple(stream["row"][epoch * ROWS : (epoch + 1) * ROWS]) for epoch in range(5)}
    seeds = {tuple(joined(read(1, ROWS, seed=seed))["row"]) for seed in range(5)}
    assert len(epochs) == len(seeds) == 5
    assert tuple(range(ROWS)) not in epochs | seeds


def test_what_is_drawn_for_example_n_depends_on_the_seed_and_n_alone(stream):
    elsewhere = joined(read(15, 4, hosts=2, rows=rows_of(29, offset=1000)))
    np.testing.assert_array_equal(elsewhere["draw"], stream["draw"])
    assert len(np.unique(stream["draw"])) == stream["draw"].size  # also when a row comes again in the next epoch
    other = joined(read(15, 4, seed=SEED + 1))
    assert not np.isin(other["draw"], stream["draw"]).any()


# ---- draws and orders ----------------------------------------------------------------------------------------------


def test_what_is_drawn_first_does_not_depend_on_what_is_drawn_later_or_for_others():
    draws, alone = ExampleRng(3, np.arange(20)), ExampleRng(3, np.array([7]))
    for shape in ((5,), (), (2, 3)):
        np.testing.assert_array_equal(draws.bits(*shape)[7], alone.bits(*shape)[0])
    again = ExampleRng(3, np.arange(20))
    np.testing.assert_array_equal(again.bits(11)[:, 5], ExampleRng(3, np.arange(20)).bits(6)[:, 5])
    assert len({int(g.integers(2**62)) for g in draws.generators()}) == 20


def test_draws_are_even_and_independent():
    """Over neighbouring seeds, numbers and positions: each bit as often 0 as 1, alone and against its neighbours."""
    drawn = np.stack([ExampleRng(seed, np.arange(64)).bits(64) for seed in range(16)])  # [seeds, numbers, positions]
    for mixture in (drawn, *(drawn ^ np.roll(drawn, 1, axis) for axis in range(3))):
        ones = np.array([((mixture >> np.uint64(bit)) & np.uint64(1)).sum() for bit in range(64)])
        assert abs(ones - drawn.size / 2).max() < 5 * np.sqrt(drawn.size) / 2
    cells = np.histogram(ExampleRng(0, np.arange(256)).uniform(256), 64, (0, 1))[0]
    assert abs(((cells - 1024) ** 2 / 1024).sum() - 63) < 5 * np.sqrt(2 * 63)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 1000, 4097])
def test_an_order_holds_every_row_once(count):
    for epoch in (0, 3, 10**9):
        assert sorted(epoch_permutation(epoch * count + np.arange(count), count, SEED)) == list(range(count))


@pytest.mark.parametrize("count", [5, 16, 23])
def test_every_row_comes_equally_often_at_every_place_and_behind_every_other(count):
    epochs = 4000
    order = epoch_permutation(np.arange(epochs * count), count, SEED).reshape(epochs, count)
    at = np.stack([np.bincount(order[:, place], minlength=count) for place in range(count)])
    assert abs(at - epochs / count).max() < 5 * np.sqrt(epochs / count)
    behind = np.zeros((count, count))
    np.add.at(behind, (order[:, :-1], order[:, 1:]), 1)
    expected = epochs * (count - 1) / (count * (count - 1))
    assert abs(behind[~np.eye(count, dtype=bool)] - expected).max() < 5 * np.sqrt(expected)


# ---- evaluation ----------------------------------------------------------------------------------------------------


def evaluate(count: int, batch_size: int, hosts: int = 1, seed: int = SEED, limit: int = 0):
    """Global batches: the hosts' parts one after the other."""
    options = {"batch_size": batch_size, "seed": seed, "limit": limit}
    parts = [
        list(evaluation_batches(rows_of(count), example, mine=mine, **options)) for mine in shares(batch_size, hosts)
    ]
    assert len({len(part) for part in parts}) == 1
    assert all(len(batch["row"]) == batch_size // hosts for part in parts for batch in part)
    return [joined(of_hosts) for of_hosts in zip(*parts, strict=True)]


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 3, 7, 8, 9, 16, 29])
def test_evaluation_reads_every_row_once_in_order(count, hosts):
    batches = evaluate(count, 8, hosts)
    assert len(batches) == -(-count // 8)
    found = joined(batches)
    assert found["row"][:count].tolist() == list(range(count))
    assert (found["weights"][:count] == 1).all()
    for name, values in found.items():
        assert not values[count:].any(), name
        np.testing.assert_array_equal(values, joined(evaluate(count, 8))[name])


def test_evaluation_draws_the_same_each_time_and_for_any_batch_size():
    first = joined(evaluate(13, 4))["draw"][:13]
    np.testing.assert_array_equal(joined(evaluate(13, 6, hosts=2))["draw"][:13], first)
    assert len(np.unique(first)) == first.size
    assert not np.isin(joined(evaluate(13, 4, seed=SEED + 1))["draw"][:13], first).any()


@pytest.mark.parametrize("hosts", [1, 2])
def test_a_limited_evaluation_is_spread_over_the_whole_text(hosts):
    full = joined(evaluate(101, 4))
    found = joined(evaluate(101, 4, hosts, limit=6))
    assert found["row"][:6].tolist() == [0, 20, 40, 60, 80, 100]
    np.testing.assert_array_equal(found["draw"][:6], full["draw"][found["row"][:6]])
    assert not found["weights"][6:].any()
    assert len(joined(evaluate(5, 4, limit=100))["row"]) == 8
    for count in range(1, 60):
        rows = joined(evaluate(count, 1, limit=7))["row"]
        assert len(set(rows.tolist())) == len(rows) == min(count, 7)
