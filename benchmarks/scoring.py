"""Scores of texts: PLL of sentences (arXiv 1910.14659), all masked copies in full batches, against one copy at a time; and
causal scores of texts of many lengths."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import bothways
from benchmarks.harness import OURS, Row, Setting, alternate
from benchmarks.models import model_of, torch_model
from bothways.data.tokenizer import Tokenizer
from bothways.rundir import load_run
from bothways.sample.masked import MaskedModel, hidden_logprobs
from bothways.sample.score import causal_logprobs

PEERS = {"transformers, a sentence at a time": None, "transformers, a copy at a time": 1}


def sentences(size: int, count: int, most: int) -> list[list[int]]:
    """Made-up sentences of 6 to `most` tokens of `size`, as those of minimal-pair sets have."""
    rng = np.random.default_rng(0)
    return [rng.integers(5, size, n).tolist() for n in rng.integers(6, most + 1, count)]


def one_copy_at_a_time(model: MaskedModel, texts: list[list[int]]) -> list[float]:
    """The same sums through our own function, asked about one masked token at a time, padded to nothing."""
    bos, eos, found = model.tokenizer.bos, model.tokenizer.eos, []
    for ids in texts:
        row, total = np.array([[bos, *ids, eos]], np.int32), 0.0
        for place in range(1, len(ids) + 1):
            copy = row.copy()
            copy[0, place] = model.tokenizer.mask
            asked = {"mask_positions": np.array([[place]], np.int32), "targets": row[:, place : place + 1]}
            batch = {"tokens": copy, "segments": np.ones_like(row)} | asked
            total += float(hidden_logprobs(model.run.module, model.run.params, batch)[0, 0])
        found.append(total)
    return found


def our_side(home: Path, texts: list[list[int]]) -> dict[str, Callable]:
    model = bothways.load(home)
    return {"run": lambda: model.score_tokens(texts, "pll").tolist()}


def their_side(
    home: Path, texts: list[list[int]], bos: int, eos: int, mask: int, copies: int | None
) -> dict[str, Callable]:
    """`transformers` on so many masked copies of a sentence at a time; None: on all of its copies."""
    import torch

    model = torch_model(home, "BertForMaskedLM").eval()

    def score(ids: list[int]) -> float:
        row, positions = torch.tensor([bos, *ids, eos]), torch.arange(1, len(ids) + 1)
        total = 0.0
        for some in positions.split(copies or len(ids)):
            hidden = row.repeat(len(some), 1)
            hidden[torch.arange(len(some)), some] = mask
            with torch.inference_mode():
                logprobs = model(hidden).logits[torch.arange(len(some)), some].log_softmax(-1)
            total += logprobs[torch.arange(len(some)), row[some]].sum().item()
        return total

    return {"run": lambda: [score(ids) for ids in texts]}


def timed(sides: dict[str, Any], rounds: int) -> dict[str, list]:
    """Seconds of every side, round by round. All sides must give the same scores; they are closed."""
    found = {name: side.run() for name, side in sides.items()}
    for values in found.values():
        np.testing.assert_allclose(values, found[OURS], rtol=1e-4)
    seconds = alternate(sides, rounds)
    for side in sides.values():
        side.close()
    return seconds


def pll(setting: Setting) -> Row:
    """Sentences per second. All sides must give the same."""
    count, most = (3, 9) if setting.tiny else (64, 30)
    recipe, home = model_of(setting, "bert-base")
    texts = sentences(recipe.model.vocab_size, count, most)
    sides = {OURS: setting.side(our_side, home, texts, ours=True)}
    if setting.peers:
        special = Tokenizer.load(home)
        for name, copies in PEERS.items():
            sides[name] = setting.side(their_side, home, texts, special.bos, special.eos, special.mask, copies)
    seconds = timed(sides, 1)  # of three minutes
    tokens = sum(map(len, texts))
    what = f"BERT-base PLL of {count} sentences, {tokens / count:.0f} tokens each"
    return Row(what, "sentences/s", count, seconds, "10 x one at a time")


def causal_side(home: Path, texts: list[list[int]]) -> dict[str, Callable]:
    run = load_run(home, print)
    context = run.recipe.model.context_length
    return {"run": lambda: list(causal_logprobs(run.module, run.params, texts, context))}


def padded_side(home: Path, texts: list[list[int]], rows: int) -> dict[str, Callable]:
    """`transformers` on batches of so many texts, sorted by length and padded behind, as lm-evaluation-harness makes them."""
    import torch

    model = torch_model(home, "GPT2LMHeadModel").eval()
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))

    def score() -> list[float]:
        found = [0.0] * len(texts)
        for begin in range(0, len(order), rows):
            some = [texts[i] for i in order[begin : begin + rows]]
            tokens = torch.zeros(len(some), len(some[0]), dtype=torch.long)
            for row, ids in zip(tokens, some, strict=True):
                row[: len(ids)] = torch.tensor(ids)
            with torch.inference_mode():
                logprobs = model(tokens[:, :-1]).logits.log_softmax(-1)
                logprobs = logprobs.gather(2, tokens[:, 1:, None])[..., 0]
            for i, row in zip(order[begin : begin + rows], logprobs, strict=True):
                found[i] = row[: len(texts[i]) - 1].sum().item()
        return found

    return {"run": score}


def ragged(setting: Setting) -> Row:
    """Tokens that are not padding per second. Both sides must give the same."""
    count, most = (3, 9) if setting.tiny else (96, 250)
    recipe, home = model_of(setting, "gpt2")
    texts = sentences(recipe.model.vocab_size, count, most)
    sides = {OURS: setting.side(causal_side, home, texts, ours=True)}
    if setting.peers:
        sides["transformers, sorted, batches of 16"] = setting.side(padded_side, home, texts, 16)
    seconds = timed(sides, setting.rounds)
    tokens = sum(map(len, texts))
    what = f"GPT-2 124M causal scores of {count} texts of 6 to {most} tokens"
    return Row(what, "tokens/s", tokens, seconds, "1 x PyTorch")
