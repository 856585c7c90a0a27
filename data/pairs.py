"""Rows for an encoder-decoder: pairs packed into rows of sources and targets, and text with spans to be restored."""

import hashlib
import os
from pathlib import Path

import numpy as np

from bothways.data.examples import Example, segment_positions, stacked
from bothways.data.rng import ExampleRng
from bothways.data.tokenizer import Vocabulary
from bothways.data.tokens import Rows, Tokens
from bothways.errors import InputError

OPEN_ROWS = 64
"""Rows that still take pairs while others are being packed."""


def pack(lengths: np.ndarray, room: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """First-fit packing of pairs, in random order, into rows with `room` tokens for sources and as many for targets; or of
    texts of one side.

    Args:
      lengths: [pairs, 2] tokens of each source and target, or [texts, 1], none above room.

    Returns:
      [pairs] the pairs in the order of the rows, and [rows + 1] where each row begins in it.
    """
    left = np.full((OPEN_ROWS, lengths.shape[1]), room)
    held: list[list[int]] = [[] for _ in range(OPEN_ROWS)]
    rows: list[list[int]] = []
    for pair in np.random.default_rng(seed).permutation(len(lengths)):
        fits = np.flatnonzero((left >= lengths[pair]).all(axis=1))
        at = fits[0] if len(fits) else int(left.min(axis=1).argmin())
        if not len(fits):  # the fullest row is closed
            rows.append(held[at])
            held[at], left[at] = [], room
        held[at].append(int(pair))
        left[at] -= lengths[pair]
    rows += [row for row in held if row]
    order = np.array([pair for row in rows for pair in row], np.int64)
    return order, np.cumsum([0, *map(len, rows)])


def packing(home: Path | None, lengths: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """`pack`, done once for a set of token files, and kept beside them in `home` if they have one."""
    # Lengths depend on more than the token files: on what opens and closes the two sides.
    key = hashlib.sha256(np.ascontiguousarray(lengths, np.int64).tobytes()).hexdigest()[:16]
    kept = home and home / f"packed-{room}-{key}.npz"
    if kept and kept.exists():
        found = np.load(kept)
        return found["order"], found["first"]
    order, first = pack(lengths, room)
    if kept:
        partial = kept.with_suffix(f".{os.getpid()}.partial.npz")
        np.savez(partial, order=order, first=first)
        partial.replace(kept)
    return order, first


class PackedPairs:
    """Pairs of documents, 2i the source and 2i + 1 its target, several to a row: a source.

    A source ends with eos; a target is read from bos on and predicts its own tokens and eos; a published vocabulary may say
    otherwise (data/published.py). Segments keep the pairs of a row apart. Pairs with more than `length` tokens on a side are left out.

    Raises:
      InputError: no pair fits into a row.
    """

    def __init__(self, tokens: Tokens, length: int, vocabulary: Vocabulary):
        self.tokens, self.length, self.pad = tokens, length, vocabulary.pad
        self.start = np.array(vocabulary.target_start or (vocabulary.bos,), np.int32)
        before, behind = vocabulary.around_source or ((), (vocabulary.eos,))
        self.before, self.behind = np.array(before, np.int32), np.array(behind, np.int32)
        ends = np.append(tokens.starts[1:], len(tokens.ids))
        lengths = (ends - tokens.starts - 2).reshape(-1, 2)  # without bos and eos
        lengths = lengths + np.array([len(before) + len(behind), len(self.start)])
        fitting = np.flatnonzero((lengths <= length).all(axis=1))
        if not len(fitting):
            raise InputError(
                f"each of the {len(lengths)} pairs has a side of more than model.context_length={length} tokens; "
                f"the shortest needs --model.context-length {lengths.max(axis=1).min()}"
            )
        self.order, self.first = packing(tokens.home, lengths[fitting], length)
        self.order = fitting[self.order]
        self.left_out = len(lengths) - len(fitting)
        self.padding = 1 - lengths[fitting].sum() / (2 * length * len(self))

    @property
    def note(self) -> str:
        """What is worth knowing of the rows, for a person."""
        dropped = f", {self.left_out} pairs too long left out" if self.left_out else ""
        return f"{len(self.order):,} pairs in {len(self):,} rows, {self.padding:.1%} padding{dropped}"

    def __len__(self) -> int:
        return len(self.first) - 1

    def _text(self, document: int) -> np.ndarray:
        starts = self.tokens.starts
        end = starts[document + 1] if document + 1 < len(starts) else len(self.tokens.ids)
        return np.asarray(self.tokens.ids[starts[document] : end], np.int32)

    def __getitem__(self, indices: np.ndarray) -> Example:
        return stacked([self._row(index) for index in indices])

    def _row(self, index: int) -> Example:
        pairs = self.order[self.first[index] : self.first[index + 1]]
        sources = [np.concatenate([self.before, self._text(2 * pair)[1:-1], self.behind]) for pair in pairs]
        targets = [np.concatenate([self.start, self._text(2 * pair + 1)[1:]]) for pair in pairs]
        return packed(sources, targets, self.length, self.length, self.pad)


def packed(sources: list[np.ndarray], targets: list[np.ndarray], room: int, target_room: int, pad: int) -> Example:
    """A row of several pairs. A target [bos, tokens, eos] becomes inputs without its last and targets without its first."""

    def filled(parts: list[np.ndarray], room: int) -> tuple[np.ndarray, np.ndarray]:
        ids, numbers = np.concatenate(parts), np.repeat(np.arange(1, len(parts) + 1), [len(p) for p in parts])
        spare = (0, room - len(ids))
        return np.pad(ids, spare, constant_values=pad).astype(np.int32), np.pad(numbers, spare).astype(np.int32)

    source, source_segments = filled(sources, room)
    tokens, segments = filled([t[:-1] for t in targets], target_room)
    return {
        "source": source,
        "source_segments": source_segments,
        "source_positions": segment_positions(source_segments),
        "tokens": tokens,
        "targets": filled([t[1:] for t in targets], target_room)[0],
        "segments": segments,
        "positions": segment_positions(segments),
        "weights": (segments > 0).astype(np.float32),
    }


class Spans:
    """Rows of running text in which spans will be hidden (T5, arXiv 1910.10683, section 3.1.4).

    The hidden tokens leave the source, one [MASK] in the place of each span; the target holds them in order, each
    span behind a [MASK]. So the source is shorter than the text; rows are as long as makes it `length` tokens.
    """

    def __init__(self, tokens: Tokens, length: int, vocabulary: Vocabulary, rate: float, mean_span: float, padded: bool):
        self.vocabulary, self.rate, self.mean_span, self.length = vocabulary, rate, mean_span, length
        room, self.target_length = span_lengths(length, rate, mean_span)
        self.rows = Rows(tokens, room - 1, vocabulary.pad, False, padded)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def block_rows(self) -> int:
        return self.rows.block_rows

    def read_ahead(self, blocks: np.ndarray) -> None:
        self.rows.read_ahead(blocks)

    def __getitem__(self, indices: np.ndarray) -> Example:
        return self.rows[indices]


def hidden_spans(room: int, rate: float, mean_span: float) -> tuple[int, int]:
    """How many of `room` tokens are hidden, in how many spans."""
    hidden = min(max(1, round(room * rate)), room - 1)
    return hidden, min(max(1, round(hidden / mean_span)), room - hidden)


def span_lengths(length: int, rate: float, mean_span: float) -> tuple[int, int]:
    """Tokens of text that make a source and a target of at most `length` tokens, and those of the target; both with their
    eos."""
    for room in range(2 * length, 1, -1):
        hidden, spans = hidden_spans(room, rate, mean_span)
        if max(room - hidden, hidden) + spans + 1 <= length:
            break
    return room, hidden + spans + 1


def parts(total: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """`total` cut at random into `count` parts of at least 1, every way equally likely."""
    cuts = np.sort(rng.permutation(total - 1)[: count - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def corrupted(rows: Example, draws: ExampleRng, source: Spans) -> Example:
    """Rows of text with spans hidden.

    Documents run into one another, as in T5: an eos between them could be hidden, and a target that holds one in its
    middle teaches to stop there.
    """
    v = source.vocabulary
    text = (rows["segments"] > 0) & (rows["tokens"] != v.bos) & (rows["tokens"] != v.eos)
    texts = [tokens[kept] for tokens, kept in zip(rows["tokens"], text, strict=True)]
    return stacked([with_spans_hidden(text, rng, source) for text, rng in zip(texts, draws.generators(), strict=True)])


def with_spans_hidden(text: np.ndarray, rng: np.random.Generator, source: Spans) -> Example:
    """Text and spans take turns, beginning with text; the lengths are random."""
    v = source.vocabulary
    if len(text) < 2:  # a last row's single token: nothing to mask
        return packed([np.append(text, v.eos)], [np.array([v.bos, v.eos])], source.length, source.target_length, v.pad)
    hidden, spans = hidden_spans(len(text), source.rate, source.mean_span)
    stay, go = parts(len(text) - hidden, spans, rng), parts(hidden, spans, rng)
    inverse = np.repeat(np.tile([False, True], spans), np.stack([stay, go], axis=1).reshape(-1))
    first = inverse & ~np.concatenate([[False], inverse[:-1]])
    shown = np.where(first, v.mask, text)[~inverse | first]
    ends = np.cumsum(np.stack([stay, go], axis=1).reshape(-1))
    spans = [np.concatenate([[v.mask], text[a:b]]) for a, b in zip(ends[::2], ends[1::2], strict=True)]
    target = np.concatenate([v.target_start[:1] or [v.bos], *spans, [v.eos]])
    return packed([np.append(shown, v.eos)], [target], source.length, source.target_length, v.pad)
