"""Documents as streams of (name, text), long ones in pieces; and which part of a corpus is held out.

A piece that goes on with the document of the item before it has a name that ends in CONTINUED. So a document of any length is
one document, of which a piece is in memory at a time.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator

Documents = Iterator[tuple[str, str]]
SPLITS = ("train", "validation", "test")
LONGEST_PIECE = 2**20
"""Characters. A longer document is read and tokenized in pieces, cut behind a line break or before a space."""
FEW_DOCUMENTS = 40
"""From this many documents on, whole documents are held out; below, the end of the text is."""
CONTINUED = "\x1f"


def continues(name: str) -> bool:
    """Whether an item is of the same document as the one before it."""
    return name.endswith(CONTINUED)


def cut_of(text: str) -> int:
    """Where the first piece of a text of more than LONGEST_PIECE characters ends: in its second half, behind a line break, else
    before a space, else where it is full."""
    low, high = LONGEST_PIECE // 2, LONGEST_PIECE
    newline = text.rfind("\n", low, high) + 1
    space = 0 if newline else text.rfind(" ", low, high)
    return newline or (space if space > 0 else high)


def pieces_of(name: str, read: Callable[[int], str]) -> Documents:
    """The pieces of one document.

    Args:
      read: the next so many characters of it, fewer only at its end.
    """
    text, first = read(2 * LONGEST_PIECE), True
    while first or text:
        end = cut_of(text) if len(text) > LONGEST_PIECE else len(text)
        yield name if first else name + CONTINUED, text[:end]
        first, text = False, text[end:]
        if len(text) <= LONGEST_PIECE:
            text += read(LONGEST_PIECE)


def in_pieces(documents: Documents) -> Documents:
    """The same documents, long ones in pieces."""
    for name, text in documents:
        if len(text) <= LONGEST_PIECE:
            yield name, text
            continue
        begin = 0
        while begin < len(text):
            left = text[begin : begin + LONGEST_PIECE + 1]
            end = begin + (cut_of(left) if len(left) > LONGEST_PIECE else len(left))
            yield name + (CONTINUED if begin and not continues(name) else ""), text[begin:end]
            begin = end


def with_text(documents: Documents) -> Documents:
    """Those that are more than white space; of a long one every piece."""
    for name, text in documents:
        if text.strip() or continues(name) or len(text) > LONGEST_PIECE // 2:
            yield name, text


def numbered(documents: Iterable[tuple[str, str]], first: int = 0) -> Iterator[tuple[int, tuple[str, str]]]:
    """Each item with the number of its document."""
    number = first - 1
    for name, text in documents:
        number += not continues(name)
        yield number, (name, text)


@dataclasses.dataclass(frozen=True)
class Again:
    """Documents that are read anew each time they are gone through, so that none need be held in memory."""

    read: Callable[[], Documents]

    def __iter__(self) -> Documents:
        return self.read()


def held_out_in(number: int, paired: bool) -> str:
    """The split of a document by its number, where there are many: every 20th document or pair is for validation or test."""
    return {18: "validation", 19: "test"}.get((number // 2 if paired else number) % 20, "train")


def hold_out(documents: Iterable[tuple[str, str]], paired: bool = False, whole: bool = False) -> dict[str, Again]:
    """Splits of a corpus that has none: every 20th document or pair for validation and for test, or the end of the text.

    With few documents the last tenth of each is held out, half for validation and half for test, cut at a line
    where one ends near. Pairs are never cut.

    Args:
      documents: gone through each time that a split is, and up to twice before.
      whole: documents are not cut, however few.
    """
    lengths = None if paired or whole else lengths_of_few(documents)
    if lengths is None:

        def part(split: str) -> Documents:
            return (item for i, item in numbered(documents) if held_out_in(i, paired) == split)

        return {split: Again(functools.partial(part, split)) for split in SPLITS}
    cuts = _cuts(documents, lengths)

    def between(low: int, high: int) -> Documents:
        """Of each document what lies between two of its cuts."""
        for number, (name, text), begin in _with_begins(documents):
            a, b = cuts[number][low] - begin, cuts[number][high] - begin
            inside = text[max(0, a) : max(0, b)]
            if inside or not (continues(name) or lengths[number] > len(text)):
                yield (name.removesuffix(CONTINUED) if a >= 0 else name), inside

    return {split: Again(functools.partial(between, i, i + 1)) for i, split in enumerate(SPLITS)}


def lengths_of_few(documents: Iterable[tuple[str, str]]) -> list[int] | None:
    """Characters of each document; None where there are FEW_DOCUMENTS or more, which is seen when so many have come."""
    lengths: list[int] = []
    for number, (_, text) in numbered(documents):
        if number + 1 >= FEW_DOCUMENTS:
            return None
        lengths += [0] * (number + 1 - len(lengths))
        lengths[number] += len(text)
    return lengths


def _with_begins(documents: Iterable[tuple[str, str]]) -> Iterator[tuple[int, tuple[str, str], int]]:
    """Each item with the number of its document, and where in that it begins."""
    begin = 0
    for number, (name, text) in numbered(documents):
        begin = begin if continues(name) else 0
        yield number, (name, text), begin
        begin += len(text)


def _cuts(documents: Iterable[tuple[str, str]], lengths: list[int]) -> list[list[int]]:
    """Of each document where its parts for training, validation and test begin, and its end: behind the last line break
    between 85 % and 90 % of its length, and between 90 % and 95 %, or there where there is none."""
    found = []
    for size in lengths:
        found.append([0, int(size * 0.9), int(size * 0.95), size])
    for number, (_, text), begin in _with_begins(documents):
        size = lengths[number]
        for which, low, high in ((1, 0.85, 0.9), (2, 0.9, 0.95)):
            a, b = int(size * low) - begin, int(size * high) - begin
            newline = text.rfind("\n", max(0, a), max(0, b)) + 1
            if newline:
                found[number][which] = begin + newline
    return found
