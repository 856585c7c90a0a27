"""Text written a block at a time: against a plain loop without a cache, and, in blocks of one, against a GPT's decoding."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bothways import rundir
from bothways.config import MeshConfig, ObjectiveConfig
from bothways.data import tokenizer as tokenizers
from bothways.errors import InputError
from bothways.model.cache import Cache
from bothways.model.gpt import GPT
from bothways.recipes import Recipe
from bothways.registry import make_module
from bothways.sample.blocks import BlockDecoder, usual_block
from bothways.sample.decode import Decoder, Row
from bothways.sample.denoise import Canvas, Denoising, fold, keep_confident
from bothways.sample.diffusion import DiffusionModel
from bothways.sample.sampling_params import SamplingParams
from bothways.sharding import shardings_for_inference
from tests.corpus import made_up_text

MASK, EOS = 36, 35
PROMPTS = [[3], [5, 9, 1], [7, 7, 2, 11], [1, 2, 3, 4, 5, 6, 8]]
DRAWN, GREEDY = SamplingParams.make(1.0), SamplingParams.make(greedy=True)


class Tiny:
    """A GPT of two layers with random weights that is read in blocks; the mask is never written."""

    def __init__(self, cfg, params, predicts: str):
        self.module, self.params = GPT(dataclasses.replace(cfg, predicts=predicts)), params
        self.cfg, self.predicts, self.decoders = cfg, predicts, {}
        self.read = jax.jit(
            lambda tokens, block: self.scores(self.module.apply({"params": params}, tokens, block=block)[0])
        )

    def scores(self, features):
        return self.module.apply({"params": self.params}, features, method="logits").at[..., MASK].set(-jnp.inf)

    def decoder(self, block: int) -> BlockDecoder:
        def forward(params, tokens, cache, block):
            return self.module.apply({"params": params}, tokens, cache=cache, block=block)

        def begin(params, batch, size, source):
            return Cache.empty(self.cfg, batch, size)

        if block not in self.decoders:
            args = forward, lambda _, x: self.scores(x), begin, self.cfg.context_length, EOS, MASK, self.predicts, block
            self.decoders[block] = BlockDecoder(*args)
        return self.decoders[block]

    def write(self, prompts, block, how=None, method=DRAWN, most=9, **options) -> list[Row]:
        rows = [Row(list(p), jax.random.key(sum(p))) for p in prompts]
        self.decoder(block).filling(how or Denoising.make()).generate(self.params, rows, method, most, **options)
        return rows

    def plainly(self, prompt: list[int], block: int, steps: int, most: int) -> list[int]:
        """Greedily, with all that stands before the open block and the block itself read anew in every step."""
        row = list(prompt)
        while len(row) < len(prompt) + most and EOS not in row[len(prompt) :]:
            begin = len(row) // block * block
            if self.predicts == "next" and len(row) == begin:
                row.append(int(np.argmax(self.logprobs(row, block)[-1])))
            hidden = list(range(len(row), begin + block))
            row += [MASK] * len(hidden)
            for step in range(steps, 0, -1):
                found = self.logprobs(row, block)
                own = {i: found[i if self.predicts == "own" else i - 1] for i in hidden}
                for i in sorted(hidden, key=lambda i: -own[i].max())[: -(-len(hidden) // step)]:
                    row[i] = int(np.argmax(own[i]))
                    hidden.remove(i)
        said = row[len(prompt) :][:most]
        return said[: said.index(EOS) + 1] if EOS in said else said

    def logprobs(self, row: list[int], block: int) -> np.ndarray:
        """[T, V] of a row of the full context, whose end nothing before it sees."""
        padded = row + [0] * (self.cfg.context_length - len(row))
        return np.asarray(jax.nn.log_softmax(self.read(np.array([padded]), block)))[0, : len(row)]


@pytest.fixture(scope="module")
def models(tiny) -> dict[str, Tiny]:
    cfg = dataclasses.replace(tiny, n_layers=2, pad_vocab_to_multiple_of=2)
    shapes = jax.eval_shape(GPT(cfg).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.4, s.shape), s.dtype), shapes)
    return {name: Tiny(cfg, params, name) for name in ("next", "own")}


@pytest.mark.parametrize(("predicts", "block", "steps"), [("next", 4, 2), ("own", 4, 2), ("own", 5, 1)])
def test_with_a_cache_it_writes_what_a_loop_without_one_writes(models, predicts, block, steps):
    model = models[predicts]
    rows = model.write(PROMPTS, block, Denoising.make(steps), GREEDY)
    for prompt, row in zip(PROMPTS, rows, strict=True):
        assert row.tokens == model.plainly(prompt, block, steps, 9)
        assert row.stop == ("eos" if row.tokens[-1] == EOS else "max_tokens")
        assert MASK not in row.tokens


def test_blocks_of_one_are_a_gpts_decoding(models):
    """Under the same keys: tokens, log-probabilities and forward passes; also past the end of the context."""
    model = models["next"]
    forward = lambda params, tokens, cache: model.module.apply({"params": params}, tokens, cache=cache)  # noqa: E731
    begin = model.decoder(1)
    decoder = Decoder(
        forward, lambda _, x: model.scores(x), lambda _, b, size, s: Cache.empty(model.cfg, b, size), 23, EOS
    )
    wanted = [Row(list(p), jax.random.key(sum(p))) for p in PROMPTS]
    decoder.generate(model.params, wanted, DRAWN, 30)
    found = model.write(PROMPTS, 1, most=30)
    assert begin is model.decoder(1)
    assert max(len(row.tokens) for row in found) > 23
    for a, b in zip(found, wanted, strict=True):
        assert (a.tokens, a.stop) == (b.tokens, b.stop)
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=1e-4, atol=1e-4)
        assert a.passes <= b.passes  # the first token is drawn with the prompt


@pytest.mark.parametrize("predicts", ["next", "own"])
def test_a_row_does_not_depend_on_its_neighbours_nor_on_when_it_is_handed_back(models, predicts):
    model = models[predicts]
    how = Denoising.make(2, 0.3, remask=True) if predicts == "own" else Denoising.make(2, any_order=True)
    together = model.write(PROMPTS, 4, how, most=15)
    in_parts = model.write(PROMPTS, 4, how, most=15, chunk=2)
    for prompt, row, part in zip(PROMPTS, together, in_parts, strict=True):
        (alone,) = model.write([prompt], 4, how, most=15)
        assert row.tokens == alone.tokens == part.tokens
        np.testing.assert_allclose(row.logprobs, alone.logprobs, rtol=1e-3, atol=1e-3)
        (fewer,) = model.write([prompt], 4, how, most=6)
        assert fewer.tokens == row.tokens[:6]


def test_spread_over_devices_it_writes_the_same(models, eight_devices):
    model, how = models["own"], Denoising.make(2)
    rows = model.write(PROMPTS, 4, how, most=7)
    mesh = MeshConfig(data=1, fsdp=2, tensor=2, max_replicated_fraction=1.0)
    spread = jax.device_put(model.params, shardings_for_inference(model.params, mesh))
    other = Tiny(model.cfg, spread, "own")
    for a, b in zip(rows, other.write(PROMPTS, 4, how, most=7), strict=True):
        assert a.tokens == b.tokens
        np.testing.assert_allclose(a.logprobs, b.logprobs, rtol=1e-3, atol=1e-3)


def test_steps_and_threshold_decide_how_many_passes_a_block_takes(models):
    model, prompt = models["own"], [3, 4, 5, 6]

    def passes(how) -> int:
        (row,) = model.write([prompt], 4, how, most=8)
        assert len(row.tokens) == 8, "no end was drawn"
        return row.passes

    # two blocks: their steps, and one pass between them that keeps the first
    assert passes(Denoising.make()) == 4 + 1 + 4
    assert passes(Denoising.make(2)) == 2 + 1 + 2
    assert passes(Denoising.make(1)) == 1 + 1 + 1
    assert passes(Denoising.make(0, 1e-9)) == 1 + 1 + 1
    assert passes(Denoising.make(0, 1.0)) == 4 + 1 + 4


def test_in_a_random_order_any_token_may_be_kept_first():
    """Whatever its probability; the most confident first keeps always the same one."""
    B, zeros = 400, jnp.zeros((400, 4), jnp.int32)
    canvas = Canvas(zeros, jnp.zeros((B, 4)), zeros == 0, zeros == 0, jnp.zeros((B,), jnp.int32))
    logprobs = jnp.broadcast_to(jnp.array([-3.0, -0.1, -9.0, -2.0]), (B, 4))
    keys = fold(jax.random.split(jax.random.key(1), B), jnp.broadcast_to(jnp.arange(4), (B, 4)))
    kept = {
        any_order: np.asarray(~keep_confident(canvas, zeros, logprobs, Denoising.make(any_order=any_order), keys).hidden)
        for any_order in (False, True)
    }
    assert (kept[True].sum(axis=1) == 1).all()
    np.testing.assert_allclose(kept[True].mean(axis=0), 0.25, atol=0.08)
    assert kept[False].sum(axis=0).tolist() == [0, B, 0, 0]
    with pytest.raises(InputError, match="a random order knows no confidence"):
        Denoising.make(threshold=0.5, any_order=True)


def test_a_canvas_fills_whatever_its_scores_are():
    """Weights that are not finite give NaN; a loop that waits for them to be the most confident would never end."""
    open_ = jnp.array([[True, True, True, False]] * 2)
    zeros = jnp.zeros((2, 4), jnp.int32)
    canvas = Canvas(zeros, zeros.astype(jnp.float32), open_, open_, jnp.zeros((2,), jnp.int32))
    logprobs = jnp.array([[jnp.nan] * 4, [-jnp.inf, -1.0, jnp.nan, jnp.nan]])
    keys = fold(jax.random.split(jax.random.key(1), 2), zeros)
    left = []
    for _ in range(3):
        canvas = keep_confident(canvas, zeros, logprobs, Denoising.make(), keys)
        left.append(np.asarray(canvas.hidden))
    assert [hidden.sum(axis=1).tolist() for hidden in left] == [[2, 2], [1, 1], [0, 0]]
    assert left[0][1].tolist() == [True, False, True, False]  # a finite one is kept first


# ---- the run -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tiny) -> DiffusionModel:
    tokenizer = tokenizers.train([made_up_text(60)], "bpe", 330)
    cfg = dataclasses.replace(tiny, n_layers=1, context_length=16, vocab_size=len(tokenizer), predicts="own")
    recipe = Recipe(model=cfg, objective=ObjectiveConfig(kind="diffusion", block_sizes=(4, 0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(s.dtype), rundir.param_shapes(recipe))
    return DiffusionModel(rundir.Run(Path("runs/x"), recipe, tokenizer, make_module("gpt", cfg), params, 0))


@pytest.mark.parametrize("block", [4, 3])
def test_a_text_streams_by_blocks_and_stops_where_it_should(run, block):
    """In blocks with a cache, and in others by whole rows."""
    prompts = ["", "the king"]
    found = run.sample(prompts, max_tokens=24, block=block, num=2)
    pieces: dict[int, str] = {}
    again = run.sample(
        prompts, max_tokens=24, block=block, num=2, stream=lambda i, s: pieces.update({i: pieces.get(i, "") + s})
    )
    assert again == found
    assert len({sample.text for sample in found}) == 4
    assert [pieces[i] for i in range(4)] == [sample.text for sample in found]
    whole = found[3].text
    stop = whole[len(whole) // 2 :][:3]
    (cut,) = run.sample(["the king"], max_tokens=24, block=block, num=2, stop=[stop])[1:]
    assert (cut.text, cut.stop) == (whole[: whole.index(stop)], "stop")
    assert run.sample(prompts, max_tokens=24, block=block, num=2, seed=1) != found


def test_padding_that_is_the_end_of_a_text_still_ends_it(run):
    """As in a published vocabulary without a padding token; [UNK], which stands for no text, is not drawn."""

    class PadIsEnd:
        pad = run.tokenizer.eos

        def __getattr__(self, name):
            return getattr(run.tokenizer, name)

        def __len__(self):
            return len(run.tokenizer)

    assert run.tokenizer.pad != run.tokenizer.eos
    other = DiffusionModel(dataclasses.replace(run.run, tokenizer=PadIsEnd()))
    # All tokens alike: of 2,400 several are the end, and several would be [UNK].
    uniform = {"max_tokens": 24, "block": 4, "temperature": 1e4, "num": 100}
    assert {sample.stop for sample in other.sample(["the king"], **uniform)} == {"eos", "max_tokens"}
    drawn = []
    decode = PadIsEnd.__getattr__(other.tokenizer, "decode")
    PadIsEnd.decode = lambda self, ids: drawn.extend(ids) or decode(ids)
    other.sample(["the king"], **uniform)
    assert len(set(drawn)) > 100
    assert run.tokenizer.unk not in drawn


def test_a_prompt_that_whole_blocks_cannot_hold_is_refused(run):
    """Blocks of 5 fill 15 of the context's 16 tokens; nothing of a prompt is cut without a word."""
    objective = ObjectiveConfig(kind="diffusion", block_sizes=(5,))
    only = DiffusionModel(dataclasses.replace(run.run, recipe=dataclasses.replace(run.recipe, objective=objective)))
    long = made_up_text(60)
    fits, text = (next(t for n in range(99) if len(only.encode_prompt(t := long[:n])) == size) for size in (15, 16))
    message = "the prompt has 16 tokens, and blocks of 5 fill 15 of the model's context of 16; shorten it"
    with pytest.raises(InputError, match=message):
        only.sample([text], max_tokens=3)
    assert only.sample([fits], max_tokens=3)[0].tokens <= 3
    assert [only.room(5), run.room(4), run.room(3)] == [15, 16, 16]


def test_what_a_run_was_not_trained_for_is_refused(run):
    only = DiffusionModel(
        dataclasses.replace(
            run.run,
            recipe=dataclasses.replace(run.recipe, objective=ObjectiveConfig(kind="diffusion", block_sizes=(4, 8))),
        )
    )
    with pytest.raises(InputError, match="block is 3, and runs/x was trained on blocks of 4, 8: give one of those"):
        only.sample(["the"], block=3)
    with pytest.raises(InputError, match="blocks of 4, 8 and never saw what follows them, so it cannot fill"):
        only.fill(["the [MASK]"])
    with pytest.raises(InputError, match="sweeps is 2: blocks with a cache are not drawn again"):
        run.sample(["the"], block=4, sweeps=2)
    with pytest.raises(InputError, match="block is 0; give how many tokens are written together, 1 or more"):
        run.sample(["the"], block=0)
    with pytest.raises(InputError, match="steps is -1"):
        run.sample(["the"], block=4, steps=-1)
    assert [usual_block(sizes, 24) for sizes in ((4, 0), (4, 8), (32, 64), (0,), (1, 16, 32))] == [4, 8, 32, 12, 16]
    (filled,) = run.fill(["the [MASK] king"])
    assert len(filled.masks) == 1
