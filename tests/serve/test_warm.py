"""What --warm promises: embeddings compile nothing once the port is open."""

import random

from bothways.sample.embed import pooled
from bothways.serve import compute, warm
from bothways.serve.runs import Limits, Runs, named
from tests.serve.conftest import SLOTS


def test_texts_of_any_number_and_length_compile_nothing_after_warming(homes, monkeypatch):
    for module in (compute, warm):
        monkeypatch.setattr(module, "PORTION", 4)
    runs = Runs(named([str(homes["masked"])]), Limits(**SLOTS))
    warm.warm(runs)
    known, model, drawn = pooled._cache_size(), runs.get("masked").model, random.Random(0)
    lengths = set()
    for _ in range(40):
        texts = ["a" * drawn.choice([1, 5, 20, 40]) for _ in range(drawn.randrange(1, 12))]
        compute.embed("", model, texts, lambda: None)
        lengths |= set(map(len, texts))
    assert lengths == {1, 5, 20, 40}
    assert pooled._cache_size() == known
