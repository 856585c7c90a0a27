"""Reading a corpus in a test: all its documents, by split or joined again."""

from pathlib import Path

from data import corpora
from data.config import DataConfig

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
