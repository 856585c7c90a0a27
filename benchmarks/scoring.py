"""PLL of sentences (arXiv 1910.14659): all masked copies in full batches, against one copy at a time."""

import numpy as np

import bothways
from benchmarks.harness import OURS, Row, Setting, alternate
from benchmarks.models import model_of, torch_model
from sample.masked import MaskedModel, hidden_logprobs

PEER = "transformers, a copy at a time"


def sentences(model: MaskedModel, count: int, most: int) -> list[list[int]]:
    """Made-up sentences of 6 to `most` tokens, as those of minimal-pair sets have."""
    rng, size = np.random.default_rng(0), len(model.tokenizer)
    return [rng.integers(5, size, n).tolist() for n in rng.integers(6, most + 1, count)]


def one_copy_at_a_time(model: MaskedModel, texts: list[list[int]]) -> list[float]:
    """The same sums through our own function, asked about one masked token at a time, padded to nothing."""
    bos, eos, found = model.tokenizer.bos, model.tokenizer.eos, []
    for ids in texts:
        row, total = np.array([[bos, *ids, eos]], np.int32), 0.0
        for place in range(1, len(ids) + 1):
            copy = row.copy()
            copy[0, place] = model.tokenizer.mask
            asked = {"places": np.array([[place]], np.int32), "targets": row[:, place : place + 1]}
            batch = {"tokens": copy, "segments": np.ones_like(row)} | asked
            total += float(hidden_logprobs(model.run.module, model.run.params, batch)[0, 0])
        found.append(total)
    return found


def pll(setting: Setting) -> Row:
    """Sentences per second. Both sides must give the same."""
    count, most = (3, 9) if setting.tiny else (64, 30)
    model = bothways.load(model_of(setting, "bert-base")[1])
    home, texts = model.run.home, sentences(model, count, most)
    found: dict[str, list[float]] = {}

    def ours() -> None:
        found[OURS] = model.score_tokens(texts, "pll").tolist()

    sides = {OURS: ours}
    if setting.peers:
        import torch

        theirs = torch_model(home, "BertForMaskedLM").eval()
        bos, eos, mask = model.tokenizer.bos, model.tokenizer.eos, model.tokenizer.mask

        def one_at_a_time() -> None:
            found[PEER] = []
            for ids in texts:
                row, total = torch.tensor([[bos, *ids, eos]]), 0.0
                for place in range(1, len(ids) + 1):
                    copy = row.clone()
                    copy[0, place] = mask
                    with torch.inference_mode():
                        total += theirs(copy).logits[0, place].log_softmax(-1)[row[0, place]].item()
                found[PEER].append(total)

        sides[PEER] = one_at_a_time
    seconds = alternate(sides, setting.rounds)
    for values in found.values():
        np.testing.assert_allclose(values, found[OURS], rtol=1e-4)
    tokens = sum(map(len, texts))
    what = f"BERT-base PLL of {count} sentences, {tokens / count:.0f} tokens each"
    return Row(what, "sentences/s", count, seconds, "10 x a copy at a time")
