"""PLL of sentences (arXiv 1910.14659): all masked copies in full batches, against one copy at a time."""

import numpy as np

import bothways
from benchmarks.harness import OURS, Row, Setting, alternate
from benchmarks.models import model_of, torch_model

PEER = "transformers, a copy at a time"


def pll(setting: Setting) -> Row:
    """Sentences per second, of 6 to 30 tokens, as those of minimal-pair sets have. Both sides must give the same."""
    count, most = (3, 9) if setting.tiny else (64, 30)
    recipe, home = model_of(setting, "bert-base")
    model, rng = bothways.load(home), np.random.default_rng(0)
    sentences = [rng.integers(5, recipe.model.vocab_size, n).tolist() for n in rng.integers(6, most + 1, count)]
    found: dict[str, list[float]] = {}

    def ours() -> None:
        found[OURS] = model.score_tokens(sentences, "pll").tolist()

    sides = {OURS: ours}
    if setting.peers:
        import torch

        theirs = torch_model(home, "BertForMaskedLM").eval()
        bos, eos, mask = model.tokenizer.bos, model.tokenizer.eos, model.tokenizer.mask

        def one_at_a_time() -> None:
            found[PEER] = []
            for ids in sentences:
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
    tokens = sum(map(len, sentences))
    what = f"BERT-base PLL of {count} sentences, {tokens / count:.0f} tokens each"
    return Row(what, "sentences/s", count, seconds, "10 x a copy at a time")
