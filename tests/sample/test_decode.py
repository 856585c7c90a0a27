"""Decoding: what a row says follows from its prompt and its key, whatever is beside it and however it is cut up."""

import dataclasses

import jax
import numpy as np
import pytest

from bothways.sample.decode import Decoder, Row, bucket
from bothways.sample.sampling_params import SamplingParams, sample_token
from tests.sample.models import Known, markov, remembering

GREEDY = SamplingParams.make(greedy=True)
SAMPLING = SamplingParams.make(temperature=0.8)
METHODS = pytest.mark.parametrize("method", [GREEDY, SAMPLING], ids=["greedy", "sampling"])
CHOOSE = jax.jit(sample_token)
PROMPTS = [[5, 1, 4], [2], [6, 6, 1, 2, 5, 4, 1, 2, 2, 5, 1], [1, 2], [4, 4, 4, 4, 4, 4, 4]]

# A chain drawn by hand over the tokens 0 to 6, 0 ends:  1 -> 2 -> 4 -> 5 -> 0,  6 -> 6,  3 -> 6 or 0.
LIKELY = {1: [2], 2: [4], 4: [5], 5: [0], 6: [6], 3: [6, 0], 0: [1]}


def chain():
    table = np.full((7, 7), -1e9)
    for token, following in LIKELY.items():
        table[token, following] = np.log(1 / len(following))
    return markov(table, eos=0)


@pytest.fixture(scope="module")
def drawn_by_hand():
    return Speaker(chain(), chain().decoder(context=64))


@pytest.fixture(scope="module")
def memory():
    """A model that remembers everything, with a context longer than these tests need."""
    model = remembering(tokens=7, seed=3, eos_bias=-1.0)
    return Speaker(model, model.decoder(context=64))


def rows_of(prompts: list[list[int]], seed: int = 0) -> list[Row]:
    return [Row(list(p), jax.random.key(seed + 100 * sum(p) + len(p))) for p in prompts]


@dataclasses.dataclass(frozen=True)
class Speaker:
    """A model and its compiled decoder."""

    model: Known
    decoder: Decoder

    def __call__(self, prompts, method, most: int, seed: int = 0, **options) -> list[Row]:
        rows = rows_of(prompts, seed)
        self.decoder.generate(self.model.params, rows, method, most, **options)
        return rows


def say(model, prompt: list[int], key: jax.Array, method: SamplingParams, most: int, context: int = 10**6) -> list[int]:
    """The same by hand, a token at a time: token n is drawn with the key folded with n."""
    history, tokens = list(prompt), []
    while len(tokens) < most and tokens[-1:] != [model.eos]:
        if len(history) >= context:
            history = history[-(context // 2) :]
        scores = model.logprobs(history)[None].astype(np.float32)
        token, _ = CHOOSE(scores, jax.random.fold_in(key, len(tokens))[None], method)
        tokens.append(int(token[0]))
        history.append(tokens[-1])
    return tokens


def test_a_chain_is_followed_to_its_end(drawn_by_hand):
    rows = drawn_by_hand([[1], [6], [3, 5], [1, 2]], GREEDY, 6)
    assert [row.tokens for row in rows] == [[2, 4, 5, 0], [6] * 6, [0], [4, 5, 0]]
    assert [row.stop for row in rows] == ["eos", "max_tokens", "eos", "eos"]
    np.testing.assert_allclose([sum(row.logprobs) for row in rows], 0, atol=1e-5)


def test_eos_as_the_last_token_allowed_is_eos(drawn_by_hand):
    rows = drawn_by_hand([[2], [1], [2], [1]], GREEDY, 3)
    assert [(row.tokens, row.stop) for row in rows] == [([4, 5, 0], "eos"), ([2, 4, 5], "max_tokens")] * 2


def test_both_ways_of_a_fork_are_taken(drawn_by_hand):
    rows = [row for seed in range(8) for row in drawn_by_hand([[1, 3], [2, 3], [5, 3], [6, 3]], SAMPLING, 1, seed=seed)]
    ended = [row.stop == "eos" for row in rows]
    assert 8 <= sum(ended) <= 24
    np.testing.assert_allclose([row.logprobs for row in rows], np.log(0.5), rtol=1e-5)


@METHODS
def test_a_batch_of_ragged_prompts_says_what_the_model_says(memory, method):
    rows = memory(PROMPTS, method, 20)
    assert {row.stop for row in rows} == {"eos", "max_tokens"}
    for row, prompt in zip(rows, PROMPTS, strict=True):
        assert row.tokens == say(memory.model, prompt, row.key, method, 20)
        assert row.stop == ("eos" if row.tokens[-1] == memory.model.eos else "max_tokens")
        assert row.context == prompt + row.tokens
        np.testing.assert_allclose(sum(row.logprobs), memory.model.total(prompt, row.tokens), rtol=1e-4)
        assert len(row.logprobs) == len(row.tokens)


@METHODS
def test_each_prompt_alone_says_the_same_as_in_a_batch(memory, method):
    together = memory(PROMPTS, method, 20)
    for row, prompt in zip(together, PROMPTS, strict=True):
        (alone,) = memory([prompt], method, 20)
        assert (alone.tokens, alone.stop) == (row.tokens, row.stop)


@METHODS
@pytest.mark.parametrize("chunk", [1, 3, 7, 20, 100])
def test_in_chunks_it_is_the_same_text(memory, method, chunk):
    seen = []
    whole = memory(PROMPTS, method, 20)
    pieces = memory(
        PROMPTS, method, 20, chunk=chunk, after_chunk=lambda rows: seen.append(max(len(r.tokens) for r in rows))
    )
    assert [(row.tokens, row.stop) for row in pieces] == [(row.tokens, row.stop) for row in whole]
    np.testing.assert_allclose([sum(r.logprobs) for r in pieces], [sum(r.logprobs) for r in whole], rtol=1e-5)
    assert seen == [*range(chunk, 20, chunk), 20]


def test_a_row_stopped_from_outside_ends_and_the_others_do_not(memory):
    def stop_the_second(rows):
        for row in rows:
            if row.context[:1] == [2] and len(row.tokens) >= 4:
                row.stop = "stop"

    free = memory(PROMPTS, SAMPLING, 20, seed=4)
    rows = memory(PROMPTS, SAMPLING, 20, seed=4, chunk=4, after_chunk=stop_the_second)
    assert len(free[1].tokens) > 4
    assert (rows[1].tokens, rows[1].stop) == (free[1].tokens[:4], "stop")
    assert [row.tokens for row in rows[:1] + rows[2:]] == [row.tokens for row in free[:1] + free[2:]]


def test_other_keys_say_something_else(memory):
    first, second = (memory(PROMPTS, SAMPLING, 20, seed=seed) for seed in (0, 1))
    assert all(a.tokens != b.tokens for a, b in zip(first, second, strict=True))


@pytest.fixture(scope="module")
def short_of_context():
    model = remembering(tokens=7, seed=3, eos_bias=-4.0)
    return Speaker(model, model.decoder(context=9))


@METHODS
def test_beyond_the_context_the_text_goes_on_from_its_last_half(short_of_context, method):
    prompts = [[5, 1], [1, 2, 3, 4, 5, 6, 1], [2] * 9]
    expected = None
    for chunk in (0, 3):
        rows = short_of_context(prompts, method, 25, chunk=chunk)
        expected = expected or [
            say(short_of_context.model, p, row.key, method, 25, 9) for p, row in zip(prompts, rows, strict=True)
        ]
        assert [row.tokens for row in rows] == expected
    assert max(map(len, expected)) == 25


# ---- a real model --------------------------------------------------------------------------------------------------

GPT_PROMPTS = [[11, 30, 7], [5], [9, 8, 30, 12, 1, 2, 36, 20, 21, 4]]


def gpt_says(gpt, prompt: list[int], key: jax.Array, method: SamplingParams, most: int) -> list[int]:
    class Uncached:
        eos = -1
        logprobs = staticmethod(lambda history: gpt.logprobs(history)[-1])

    return say(Uncached, prompt, key, method, most, gpt.module.cfg.context_length)


def gpt_generate(gpt, prompts, method, most, **options) -> list[Row]:
    rows = rows_of(prompts)
    gpt.decoder.generate(gpt.params, rows, method, most, **options)
    return rows


def test_a_gpt_says_in_a_batch_what_it_says_alone_and_without_a_cache(gpt):
    together = gpt_generate(gpt, GPT_PROMPTS, SAMPLING, 12)
    for row, prompt in zip(together, GPT_PROMPTS, strict=True):
        (alone,) = gpt_generate(gpt, [prompt], SAMPLING, 12)
        assert row.tokens == alone.tokens == gpt_says(gpt, prompt, row.key, SAMPLING, 12)
        np.testing.assert_allclose(row.logprobs, alone.logprobs, atol=1e-4)
    assert len({tuple(row.tokens) for row in together}) == len(GPT_PROMPTS)


def test_a_gpt_goes_on_beyond_its_context(gpt):
    most = 40
    assert most > gpt.module.cfg.context_length
    rows = gpt_generate(gpt, GPT_PROMPTS, GREEDY, most)
    for row, prompt in zip(rows, GPT_PROMPTS, strict=True):
        assert row.tokens == gpt_says(gpt, prompt, row.key, GREEDY, most)
        assert len(row.tokens) == most


# ---- compilation ---------------------------------------------------------------------------------------------------


def test_prompts_of_one_bucket_share_their_program():
    model = remembering(tokens=7, seed=0)
    decoder = model.decoder(context=256)
    speak = Speaker(model, decoder)
    sizes = []
    for length in (1, 5, 16, 17, 24):
        speak([[1] * length], GREEDY, 10)
        speak([[1] * length], GREEDY, 9)
        sizes.append((decoder.prefill._cache_size(), decoder.run._cache_size()))
    assert sizes == [(1, 1), (1, 1), (1, 1), (2, 2), (2, 2)]
    for temperature in (0.5, 0.9):
        speak([[1] * 3, [2]], SamplingParams.make(temperature=temperature, top_k=3), 10)
    speak([[1], [2, 3]], SamplingParams.make(top_p=0.7), 10, chunk=4)
    assert (decoder.prefill._cache_size(), decoder.run._cache_size()) == (3, 3)


def test_buckets_are_powers_of_two():
    assert [bucket(n) for n in (1, 16, 17, 32, 33)] == [16, 16, 32, 32, 64]
    assert [bucket(n, 1) for n in (1, 2, 3, 4, 5)] == [1, 2, 4, 4, 8]
