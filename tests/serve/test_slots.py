"""Slots by themselves, without a server: what others do at the same time leaves no trace in a row."""

import jax
import numpy as np
import pytest

from bothways.config import MeshConfig
from bothways.sample.sampling_params import SamplingParams
from bothways.serve import programs
from bothways.serve.runs import Limits, Runs, named
from bothways.serve.slots import PATIENCE, PREFILL_DELAY, Generation
from tests.serve.conftest import SLOTS

KEPT = [7, 11, 5, 17, 3, 29, 2, 23, 13, 19, 31, 37, 41, 43, 47, 53, 59, 61]
GREEDY = jax.tree.map(np.asarray, SamplingParams.make(temperature=0))


def generation(pool, ids: list[int], most: int) -> Generation:
    """A text that is not ended by eos, whose tokens come into `.said`."""
    one = Generation(ids, np.zeros(pool.programs.key_words, np.uint32), GREEDY, most, emit=lambda *_: False)
    one.said = []
    one.emit = lambda new, *_: one.said.extend(new)
    return one


@pytest.fixture(scope="module")
def pool(homes):
    return Runs(named([str(homes["causal"])]), Limits(**SLOTS)).get("causal").pool


def run(pool, until) -> None:
    while not until():
        pool.prefill(1)
        pool.step()


def test_steps_of_others_write_nothing_into_a_prompt_that_is_read_in_part(pool):
    """A prompt whose beginning was kept waits in a slot, where a shorter row stood before, while another row goes on."""
    alone = generation(pool, KEPT, 8)
    pool.add(alone)
    run(pool, lambda: not pool.busy)
    expected = np.asarray(pool.state.logits[0])
    other, short, waits = generation(pool, [3], 40), generation(pool, [9], 4), generation(pool, KEPT, 8)
    pool.add(other)
    pool.add(short)
    run(pool, lambda: len(short.said) == 4)
    pool.add(waits)
    assert waits.cached == 16
    pool.step()
    run(pool, lambda: len(waits.said) == 8)
    assert waits.said == alone.said
    np.testing.assert_allclose(pool.state.logits[1], expected, atol=1e-5)
    run(pool, lambda: not pool.busy)


def test_a_row_that_has_ended_does_not_say_how_much_of_the_cache_is_read(pool):
    long, short = generation(pool, [3], 4), generation(pool, [9] * 15, 4)
    pool.add(long)
    pool.add(short)
    run(pool, lambda: not pool.busy)
    pool.add(generation(pool, [3], 4))
    run(pool, lambda: not pool.busy)
    assert pool.state.cache.length.tolist() == [5, 0, 0]


def test_prompts_that_begin_together_are_read_together_and_write_what_each_writes_alone(pool, monkeypatch):
    monkeypatch.setattr(programs, "TOGETHER", 32)
    prompts, begin, counts = ([3], [9] * 15, [5, 7, 11]), pool.programs.begin_rows, []
    alone = []
    for ids in prompts:
        pool.add(one := generation(pool, ids, 8))
        run(pool, lambda: not pool.busy)
        alone.append(one.said)
    monkeypatch.setattr(
        pool.programs, "begin_rows", lambda *args: (counts.append(np.count_nonzero(args[4])), begin(*args))[1]
    )
    rows = [generation(pool, ids, 8) for ids in prompts]
    for row in rows:
        pool.add(row)
    run(pool, lambda: not pool.busy)
    assert [row.said for row in rows] == alone
    assert len({tuple(said) for said in alone}) == 3
    assert counts == [2, 1]


def test_in_a_full_pool_a_first_piece_is_delayed_to_share_a_pass_but_not_for_long(pool, monkeypatch):
    monkeypatch.setattr(programs, "TOGETHER", 32)
    begin, counts = pool.programs.begin_rows, []
    monkeypatch.setattr(
        pool.programs, "begin_rows", lambda *args: (counts.append(np.count_nonzero(args[4])), begin(*args))[1]
    )

    def add(size: int) -> Generation:
        pool.add(one := generation(pool, [3], size))
        return one

    first, _ = add(40), add(20)
    run(pool, lambda: first.said)
    third = add(4)
    for _ in range(PREFILL_DELAY):
        pool.prefill(1)
        assert third.read == 0
        pool.step(1)
    pool.prefill(1)
    assert third.read == 1
    run(pool, lambda: pool.free == 2)
    del counts[:]
    pair = add(4), add(4)
    pool.prefill(1)
    assert counts == [2]  # as many as one pass reads
    run(pool, lambda: pool.free == 2)
    fourth = add(4)
    pool.prefill(1)
    assert fourth.read == 1  # a slot is free: nobody waits for one
    run(pool, lambda: not pool.busy)
    assert [one.said for one in (third, *pair, fourth)] == [first.said[:4]] * 4


def test_a_long_prompt_is_read_though_shorter_ones_keep_coming(pool):
    long = generation(pool, [2, *KEPT], 1)
    pool.add(long)
    for _ in range(2 * PATIENCE):
        while pool.free:
            pool.add(generation(pool, [3], 1))
        pool.prefill(1)
        pool.step()
    assert long.passed == PATIENCE
    assert len(long.said) == 1
    run(pool, lambda: not pool.busy)


def test_slots_of_a_run_on_two_devices_write_what_one_device_writes(pool, homes):
    """Heads and their keys and values over `tensor`, as `serve --mesh.tensor 2` has them."""
    mesh, found = MeshConfig(data=1, tensor=2), []
    spread = Runs(named([str(homes["causal"])]), Limits(**SLOTS), mesh).get("causal").pool
    for one in (pool, spread):
        rows = [generation(one, ids, 8) for ids in (KEPT, [3])]
        for row in rows:
            one.add(row)
        run(one, lambda one=one: not one.busy)
        found.append([row.said for row in rows])
    assert found[0] == found[1]
    keys = spread.state.cache.layers[0].k
    assert len(keys.sharding.device_set) == 2
    assert keys.addressable_shards[0].data.shape[1] == 1  # of two heads
