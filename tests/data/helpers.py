"""Reading in a test: all documents of a corpus, by split or joined again; examples one by one."""

from pathlib import Path

import numpy as np

from bothways.data import corpora
from bothways.data.config import DataConfig

STORY = "".join(f"line {i} of a {'long ' * (i % 4)}story\n" for i in range(100))


def load(corpus: Path | str, cache: Path, **fields) -> corpora.Corpus:
    return corpora.load(DataConfig(corpus=str(corpus), cache=str(cache), **fields))


def everything(corpus: corpora.Corpus) -> dict[str, list[tuple[str, str]]]:
    return {split: list(corpus.documents(split)) for split in corpus.splits}


def in_all(corpus: corpora.Corpus) -> dict[str, str]:
    """The text of every document, its parts in the splits joined again."""
    whole: dict[str, str] = {}
    for documents in everything(corpus).values():
        for name, text in documents:
            whole[name] = whole.get(name, "") + text
    return whole


def singly(examples: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Arrays [n, ...] as n examples."""
    return [dict(zip(examples, values, strict=True)) for values in zip(*examples.values(), strict=True)]
