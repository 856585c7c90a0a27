"""Large prepared text: read by blocks, in an order that makes reads long, and the same rows as from memory."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bothways.data import blocks, corpora, examples, pairs, pipeline, prepared, preparing, tokens
from bothways.data.blocks import block_permutation
from bothways.data.config import DataConfig
from bothways.errors import InputError
from tests.data.test_prepared import texts, vocabulary  # noqa: F401  (a fixture)

HYPOTHESIS = settings(max_examples=60, deadline=None, database=None, derandomize=True)


@HYPOTHESIS
@given(count=st.integers(1, 700), block=st.integers(1, 31), lanes=st.integers(1, 7), seed=st.integers(0, 5))
def test_every_row_comes_once_an_epoch(count, block, lanes, seed):
    found = block_permutation(np.arange(2 * count), count, block, seed, lanes)
    assert sorted(found[:count]) == list(range(count))
    assert sorted(found[count:]) == list(range(count))
    at = np.array([count - 1, 0, count])  # a function of the number alone
    np.testing.assert_array_equal(block_permutation(at, count, block, seed, lanes), found[at])


def test_rows_next_to_each_other_are_of_different_blocks_and_few_are_open():
    count, block, lanes = 13 * 8 * 11, 13, 8
    order = block_permutation(np.arange(count), count, block, 3, lanes) // block
    for begin in range(0, count, lanes * block):
        window = order[begin : begin + lanes * block]
        assert len(set(window)) == lanes
        assert all(len(set(window[i : i + lanes])) == lanes for i in range(0, len(window), lanes))
    of_a_host = order.reshape(-1, lanes)[:, :4]  # batches of 8 on two hosts
    assert len(set(of_a_host[:13].flat)) == 4


def test_how_far_it_is_from_a_full_shuffle():
    """Over seeds, a row comes anywhere in the epoch; two rows of one block come near each other, and that is all."""
    count, block, lanes, seeds = 7 * 5 * 12, 7, 5, 600
    place = np.empty((seeds, count))
    for seed in range(seeds):
        place[seed, block_permutation(np.arange(count), count, block, seed, lanes)] = np.arange(count)
    mean, deviation = place.mean(axis=0), place.std(axis=0)
    uniform = count / np.sqrt(12)
    assert np.abs(mean - (count - 1) / 2).max() < 5 * uniform / np.sqrt(seeds)
    assert np.abs(deviation / uniform - 1).max() < 0.12
    distance = np.abs(place - place[:, :1])  # from row 0
    assert np.abs(distance[:, block:].mean() / (count / 3) - 1) < 0.05  # of another block: as in a full shuffle
    assert distance[:, 1:block].max() < lanes * block  # of its own: within one window
    first = [tuple(np.argsort(p)[:2]) for p in place]
    assert max(Counter(first).values()) < 5


@pytest.fixture
def both(tmp_path, vocabulary, monkeypatch):  # noqa: F811
    """(tokens in memory, the same read by blocks, the corpus read by blocks)."""
    monkeypatch.setattr(preparing, "SHARD_TOKENS", 4001)
    monkeypatch.setattr(prepared, "BLOCK", 512)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts(500)))
    cfg = DataConfig(corpus=str(tmp_path / "a.jsonl"), tokenizer=str(vocabulary), cache=str(tmp_path / "cache"))
    preparing.prepare(cfg, str(tmp_path / "text"))
    corpus = corpora.load(dataclasses.replace(cfg, corpus=str(tmp_path / "text")))
    whole = tokens.prepare(corpus, "train", corpus.store.own_tokenizer(), cfg.cache)
    monkeypatch.setattr(prepared, "WHOLE", 1000)
    return whole, tokens.prepare(corpus, "train", corpus.store.own_tokenizer(), cfg.cache), corpus


def sources(text: tokens.Tokens, vocabulary_of) -> dict:
    masking = examples.Masking()
    made = {"rows": (tokens.Rows(text, 31, 0), examples.causal)}
    for name, two in (("masked rows", False), ("masked pairs", True)):
        made[name] = examples.masked_source(text, 32, vocabulary_of, masking, pairs=two, separate=True, padded=False)
    spans = pairs.Spans(text, 32, vocabulary_of, 0.15, 3.0, False)
    made["spans"] = (spans, lambda rows, draws: pairs.corrupted(rows, draws, spans))
    return made


@pytest.mark.parametrize("kind", ["rows", "masked rows", "masked pairs", "spans"])
def test_rows_are_those_of_text_in_memory(both, kind):
    whole, by_blocks, corpus = both
    assert not isinstance(whole.ids, blocks.BlockIds)
    assert isinstance(by_blocks.ids, blocks.BlockIds)
    vocabulary_of = corpus.store.own_tokenizer().vocabulary()
    rows, example = sources(whole, vocabulary_of)[kind]
    other, other_example = sources(by_blocks, vocabulary_of)[kind]
    options = {"batch_size": 64, "seed": 5}
    for a, b in zip(
        pipeline.evaluation_batches(rows, example, **options),
        pipeline.evaluation_batches(other, other_example, **options),
        strict=True,
    ):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_stretches_may_lie_across_blocks_and_behind_the_end(both):
    whole, by_blocks, _ = both
    size = len(whole.ids)
    for length in (1, 31, 700):  # a block has 256 tokens, and the last of a shard has fewer
        begins = np.array([0, 251, size - 300, size - 1])
        np.testing.assert_array_equal(by_blocks.stretches(begins, length), whole.stretches(begins, length))
    assert by_blocks.stretches(begins[:0], 31).shape == (0, 31)


@pytest.mark.parametrize("kind", ["rows", "masked rows", "masked pairs", "spans"])
def test_batches_are_the_same_for_any_number_of_hosts_and_any_start(both, kind):
    _, by_blocks, corpus = both
    rows, example = sources(by_blocks, corpus.store.own_tokenizer().vocabulary())[kind]
    assert pipeline.blocks_of(rows) > 1

    def batches(position, mine, size=12):
        made = pipeline.training_batches(rows, example, batch_size=size, seed=2, position=position, mine=mine)
        found = [next(made) for _ in range(4)]
        made.close()
        return found

    one = batches(0, None)
    halves = [batches(0, np.arange(6)), batches(0, np.arange(6, 12))]
    later = batches(24, None)
    for name in one[0]:
        for n in range(4):
            np.testing.assert_array_equal(one[n][name], np.concatenate([half[n][name] for half in halves]))
        for n in range(2):
            np.testing.assert_array_equal(one[n + 2][name], later[n][name])


class AtOnce(contextlib.nullcontext):
    """An executor that has done what it is given when `submit` returns."""

    def __init__(self, *_, **__):
        super().__init__(self)

    def submit(self, work, *given):
        done = concurrent.futures.Future()
        done.set_result(work(*given))
        return done


@pytest.mark.parametrize("mine", [np.arange(5), np.arange(1, 5, 2)])
def test_blocks_are_asked_for_a_window_before_they_are_wanted(both, monkeypatch, mine):
    """So a training step waits for the first batch only, as long as the store is faster than it."""
    _, by_blocks, _ = both
    asked, leads, number = {}, [], 0
    ask, wait = blocks.BlockIds._ask, blocks.BlockIds._wait

    def asks(ids, wanted):
        wanted = list(wanted)
        for block in wanted:
            asked.setdefault(block, number)
        return ask(ids, wanted)

    def waits(ids, wanted):
        leads.extend((number - asked.get(block, number + 1), asked.get(block)) for block in wanted)
        return wait(ids, wanted)

    monkeypatch.setattr(blocks.BlockIds, "_ask", asks)
    monkeypatch.setattr(blocks.BlockIds, "_wait", waits)
    monkeypatch.setattr(pipeline, "AHEAD", 1)
    monkeypatch.setattr(pipeline.concurrent.futures, "ThreadPoolExecutor", AtOnce)  # one batch after another
    rows = tokens.Rows(by_blocks, 31, 0)
    monkeypatch.setattr(pipeline, "LANES", 5)
    monkeypatch.setattr(pipeline, "block_permutation", functools.partial(block_permutation, lanes=5))
    window = rows.block_rows  # in batches
    made = pipeline.training_batches(rows, examples.causal, batch_size=5, seed=3, mine=mine)
    for number in range(len(rows) // 5):  # noqa: B007  (the two above look at it)
        next(made)
    made.close()
    assert all(lead >= 0 for lead, _ in leads)
    later = [lead for lead, at in leads if at]
    assert len(later) > window
    assert min(later) >= window // 2


def test_memory_and_disk_are_bounded(both):
    _, _, corpus = both
    home = corpora.Path(corpus.store.folder.where).parent / "bounded"
    ids = blocks.BlockIds(corpus.store, "train", home, disk=5 * 512, memory=3)
    rng = np.random.default_rng(0)
    for _ in range(40):
        at = rng.integers(0, len(ids), 2)
        ids[at]
        assert len(ids.held) <= 3
        assert sum(path.stat().st_size for path in home.glob("*.block")) <= 5 * 512
    assert len(list(home.glob("*.block"))) == 5


def test_blocks_on_disk_are_not_fetched_again_and_damaged_ones_are(both, monkeypatch):
    _, _, corpus = both
    home, asked = corpora.Path(corpus.store.folder.where).parent / "kept", []
    block = prepared.Prepared.block
    monkeypatch.setattr(prepared.Prepared, "block", lambda *a: asked.append(a[1:]) or block(*a))
    first = blocks.BlockIds(corpus.store, "train", home, disk=10**6)[0:1000]
    count = len(asked)
    assert count >= 2
    np.testing.assert_array_equal(blocks.BlockIds(corpus.store, "train", home, disk=10**6)[0:1000], first)
    assert len(asked) == count
    path = sorted(home.glob("*.block"))[0]
    path.write_bytes(b"x" + path.read_bytes()[1:])
    np.testing.assert_array_equal(blocks.BlockIds(corpus.store, "train", home, disk=10**6)[0:1000], first)
    assert len(asked) == count + 1


def test_an_altered_block_stops_the_run(both):
    _, by_blocks, corpus = both
    path = corpora.Path(corpus.store.folder.where) / "train-00000-001.ids"
    path.write_bytes(bytes(path.stat().st_size))
    rows = pipeline.training_batches(tokens.Rows(by_blocks, 31, 0), examples.causal, batch_size=64, seed=1)
    with pytest.raises(InputError, match="is altered"):
        list(itertools.islice(rows, 20))
