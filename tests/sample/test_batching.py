"""Batches: every item once, like lengths together, and never more than the memory that was chosen."""

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from bothways.sample import batching


@settings(deadline=None)
@given(st.lists(st.integers(1, 97), max_size=211), st.integers(1, 499), st.integers(1, 997))
def test_every_item_once_within_the_budget(lengths, budget, ahead):
    rows = lambda length: max(1, budget // length)  # noqa: E731
    seen = 0

    def stream():
        nonlocal seen
        for item in enumerate(lengths):
            seen += item[1]
            yield item

    got, done = [], 0
    for batch in batching.batched(stream(), lambda item: (item[1],), rows, ahead):
        longest = max(length for _, length in batch)
        assert len(batch) == 1 or len(batch) * longest <= budget
        got += batch
        assert seen - done <= ahead + 97  # what is held while it waits
        done += sum(length for _, length in batch)
    assert sorted(got) == list(enumerate(lengths))


@given(st.lists(st.integers(1, 61), max_size=97), st.integers(1, 31), st.integers(1, 7))
def test_shared_rows_hold_every_item_once_and_no_more_than_fits(lengths, width, most):
    rows = batching.sharing_rows(lengths, width, most)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    for row in rows:
        assert len(row) == 1 or (sum(lengths[i] for i in row) <= width and len(row) <= most)
    tokens, positions, segments = batching.laid_out([[[i] * lengths[i] for i in row] for row in rows] or [[[1]]], 61, -1)
    for i, row in enumerate(rows):
        for number, item in enumerate(row, 1):
            here = segments[i] == number
            assert set(tokens[i][here]) == {item}
            assert positions[i][here].tolist() == list(range(lengths[item]))
        assert (tokens[i][segments[i] == 0] == -1).all()


def test_rows_follow_from_memory(tiny):
    """Half the memory never allows more rows, and a longer row never more than a shorter one."""
    for memory in (2**12, 2**20, 2**23):
        rows = batching.rows_that_fit(tiny, memory)
        found = [rows(length) for length in (5, 23, 97, 499, 7919)]
        assert found == sorted(found, reverse=True)
        for length in (5, 97, 7919):
            count = rows(length)
            assert count == 1 or count * batching.row_bytes(tiny, batching.bucket(length)) <= memory
            assert batching.rows_that_fit(tiny, memory // 2)(length) <= count


def test_caches_count_where_rows_are_decoded(tiny):
    deep = dataclasses.replace(tiny, n_layers=331, context_length=997)
    fits, decodes = (f(23) for f in (batching.rows_that_fit(deep, 2**24), batching.rows_that_decode(deep, 499, 2**24)))
    assert decodes < fits


def test_the_first_part_is_small():
    assert [len(part) for part in batching.growing(range(100), 8, 32)] == [8, 16, 32, 32, 12]
