"""Vectors of short texts, from text to numbers, beside sentence-transformers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

import bothways
from benchmarks.harness import OURS, Row, Setting, alternate, threads
from benchmarks.models import model_of
from bothways.convert.run import export_run
from bothways.embedding import EmbeddingInfo, write_embedding


def short_texts(count: int) -> list[str]:
    """Made-up texts of 4 to 25 words of the vocabulary, as titles, questions and sentences have."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    return [" ".join("".join(rng.choice(letters, 3)) for _ in range(n)) for n in rng.integers(4, 26, count)]


def our_side(home: Path, texts: list[str]) -> dict[str, Callable]:
    model = bothways.load(home)
    return {"run": lambda: model.embed(texts), "some": lambda: model.embed(texts[:8])}


def their_side(home: Path, texts: list[str], dtype: str) -> dict[str, Callable]:
    """In batches of 32 sorted by length, its default."""
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads())
    model = SentenceTransformer(str(home), device="cpu", model_kwargs={"dtype": getattr(torch, dtype)})
    return {"run": lambda: model.encode(texts), "some": lambda: model.encode(texts[:8])}


def short(setting: Setting, name: str = "minilm") -> Row:
    """Texts per second. Both sides must give the same vectors."""
    count = 5 if setting.tiny else 10_000
    recipe, home = model_of(setting, name)
    dtype = recipe.model.compute_dtype.name
    write_embedding(home, EmbeddingInfo("mean", True, 64))
    texts = short_texts(count)
    sides = {OURS: setting.side(our_side, home, texts, ours=True)}
    if setting.peers:
        opened = home.with_name(f"{name}-sentence")
        if not opened.exists():
            export_run(home, opened, lambda _: None)
        sides["sentence-transformers"] = setting.side(their_side, opened, texts, dtype)
    found = {name: side.some() for name, side in sides.items()}
    for vectors in found.values():
        np.testing.assert_allclose(vectors, found[OURS], atol=1e-4 if dtype == "float32" else 3e-2)
    seconds = alternate(sides, setting.rounds)
    for side in sides.values():
        side.close()
    said = "" if dtype == "float32" else f", in {dtype}"
    return Row(f"MiniLM's shape, vectors of {count:,} texts of 4 to 25 words{said}", "texts/s", count, seconds, "1.3 x")


def short_bfloat16(setting: Setting) -> Row:
    """The same with products of bfloat16 on both sides."""
    return short(setting, "minilm-bfloat16")
