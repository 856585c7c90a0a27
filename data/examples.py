"""From rows to what a model reads: pure functions of (rows, draws), many rows at once, each with draws of its own."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from bothways.data.rng import ExampleRng
from bothways.data.tokenizer import Vocabulary
from bothways.data.tokens import Rows, Tokens
from bothways.errors import InputError

Example = dict[str, np.ndarray]
Span = tuple[np.ndarray, np.ndarray]
ASKED = {"mask_positions": np.int32, "targets": np.int32, "weights": np.float32}


@dataclasses.dataclass(frozen=True)
class Masking:
    """How masked language modelling hides tokens."""

    rate: float = 0.15
    mask_token_prob: float = 0.8
    random_token_prob: float = 0.1
    whole_words: bool = False

    def slots(self, length: int) -> int:
        """P, the most tokens chosen in a row of this length."""
        return max(1, round(self.rate * length))


def stacked(examples: list[Example]) -> Example:
    """Examples of one shape as arrays [n, ...]."""
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}


def segment_positions(segments: np.ndarray) -> np.ndarray:
    """[..., T] position of every token inside its own segment.

    >>> segment_positions(np.array([1, 1, 1, 2, 2, 0]))
    array([0, 1, 2, 0, 1, 0], dtype=int32)
    """
    index = np.arange(segments.shape[-1], dtype=np.int32)
    same = segments[..., 1:] == segments[..., :-1]
    first = np.zeros(segments.shape, np.int32)
    first[..., 1:] = np.where(same, 0, index[1:])
    return index - np.maximum.accumulate(first, axis=-1)


def as_is(rows: Example, draws: ExampleRng) -> Example:
    """For sources whose rows are what the model reads already."""
    return rows


def causal(rows: Example, draws: ExampleRng) -> Example:
    """Next-token prediction: rows [n, T + 1] into inputs and targets [n, T].

    The last token of a document has no next one, and padding none either: their weight is 0.
    """
    tokens, segments = rows["tokens"], rows["segments"]
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segments": segments[:, :-1],
        "positions": segment_positions(segments[:, :-1]),
        "weights": ((segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)).astype(np.float32),
    }


def hide(
    tokens: np.ndarray, draws: ExampleRng, vocabulary: Vocabulary, masking: Masking, slots: int
) -> tuple[np.ndarray, Example]:
    """Masked language modelling (arXiv 1810.04805, section 3.1, task 1).

    A share of each row's tokens is chosen, special ones never. Of the chosen, some become [MASK], some another token,
    and the rest stay as they are; the targets are the originals of all of them.

    Args:
      tokens: [n, T].
      slots: P, room for so many chosen tokens in a row; empty slots have weight 0.

    Returns:
      the tokens with some hidden, and {"mask_positions", "targets", "weights"}, each [n, P].
    """
    text = ~vocabulary.special[tokens]
    count = text.sum(axis=1)
    wanted = np.minimum(np.clip(np.round(masking.rate * count), 1, slots).astype(int), count)
    if masking.whole_words:
        chosen = whole_words(tokens, text, wanted, draws, vocabulary)
    else:
        rank = ranks(text, draws)
        chosen = text & (rank <= np.take_along_axis(np.sort(rank, axis=1), wanted[:, None] - 1, axis=1))
    row, place = np.nonzero(chosen)
    counts = chosen.sum(axis=1)
    slot = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    draw, other = draws.uniform(slots)[row, slot], draws.uniform(slots)[row, slot]
    original = tokens[row, place]
    random = vocabulary.ordinary[(other * len(vocabulary.ordinary)).astype(int)]
    hidden, (mask_token_prob, random_token_prob) = tokens.copy(), (masking.mask_token_prob, masking.random_token_prob)
    hidden[row, place] = np.where(
        draw < mask_token_prob, vocabulary.mask, np.where(draw < mask_token_prob + random_token_prob, random, original)
    )
    masked = {name: np.zeros((len(tokens), slots), t) for name, t in ASKED.items()}
    for name, values in (("mask_positions", place), ("targets", original), ("weights", 1)):
        masked[name][row, slot] = values
    return hidden, masked


def ranks(among: np.ndarray, draws: ExampleRng) -> np.ndarray:
    """[n, T] uint64, no two alike in a row, in random order; the largest of all where not `among`."""
    length = among.shape[1]
    own = np.uint64((1 << length.bit_length()) - 1)  # the low bits give way to the place
    return np.where(among, draws.bits(length) & ~own | np.arange(length, dtype=np.uint64), ~np.uint64(0))


def whole_words(
    tokens: np.ndarray, text: np.ndarray, wanted: np.ndarray, draws: ExampleRng, vocabulary: Vocabulary
) -> np.ndarray:
    """[n, T] bool: whole words in random order until `wanted` [n] tokens are chosen; one that is too long is passed over.

    A word begins at a token that is marked so, and behind whatever is not `text`.
    """
    n, length = tokens.shape
    begins = text & vocabulary.starts_word[tokens]
    begins[:, 0] |= text[:, 0]
    begins[:, 1:] |= text[:, 1:] & ~text[:, :-1]
    at = np.arange(n)[:, None] * length + np.cumsum(begins, axis=1) - 1  # which of the n * T words there may be
    sizes = np.bincount(at[text], minlength=n * length).reshape(n, length)
    order = np.argsort(ranks(sizes > 0, draws), axis=1)
    taken, left = np.zeros((n, length), bool), wanted.copy()
    for word in order.T[: (sizes > 0).sum(axis=1).max()]:
        size = sizes[np.arange(n), word]
        fits = size <= left
        taken[np.arange(n), word] = fits
        left -= np.where(fits, size, 0)
        if not left.any():
            break
    return text & taken.reshape(-1)[np.where(text, at, 0)]


def masked_row(rows: Example, draws: ExampleRng, vocabulary: Vocabulary, masking: Masking, slots: int) -> Example:
    """Packed rows [n, T] of running text, without next sentences, as in RoBERTa: each opens with bos, some is hidden."""
    tokens, segments = rows["tokens"], rows["segments"]
    opened = tokens[:, :1] == vocabulary.bos
    bos = np.full_like(tokens[:, :1], vocabulary.bos)
    tokens = np.where(opened, tokens, np.concatenate([bos, tokens[:, :-1]], axis=1))
    segments = np.where(opened, segments, np.concatenate([segments[:, :1], segments[:, :-1]], axis=1))
    hidden, masked = hide(tokens, draws, vocabulary, masking, slots)
    return {"tokens": hidden, "segments": segments, "positions": segment_positions(segments), **masked}


def hybrid(rows: Example, draws: ExampleRng, vocabulary: Vocabulary, masking: Masking, causal_share: float) -> Example:
    """Causal rows, or, with `prefix` as long as the row, bidirectional ones (arXiv 2410.24159, section 2).

    In bidirectional rows masked tokens are predicted at position t - 1, so that the output at t predicts token t + 1 in
    both, with that token masked or not attended. Their weight is 1 / rate.
    """
    forward = causal(rows, draws)
    n, length = forward["tokens"].shape
    both = draws.uniform(1) >= causal_share
    hidden, masked = hide(forward["tokens"][:, 1:], draws, vocabulary, masking, masking.slots(length))
    row, slot = np.nonzero(masked["weights"])
    weights = np.zeros((n, length), np.float32)
    weights[row, masked["mask_positions"][row, slot]] = 1 / masking.rate
    return forward | {
        "tokens": np.where(both, np.concatenate([forward["tokens"][:, :1], hidden], axis=1), forward["tokens"]),
        "weights": np.where(both, weights, forward["weights"]),
        "prefix": np.where(both[:, 0], length, 0).astype(np.int32),
    }


class Pairs:
    """Pieces of documents for next-sentence prediction: a source of pairs to be made.

    Each document is cut into pieces of about `length` - 3 tokens at the ends of sentences or lines.

    Raises:
      InputError: fewer than two documents; there would be no negatives.
    """

    def __init__(self, tokens: Tokens, length: int, vocabulary: Vocabulary):
        ids, starts = tokens.ids, tokens.starts
        self.tokens, self.ids, self.room, self.vocabulary = tokens, ids, length - 3, vocabulary
        if len(starts) < 2:
            raise InputError(
                f"next-sentence pairs need negatives from another document, and there is {len(starts)} document; "
                "give more files, or set --objective.no-next-sentence"
            )
        self.begins = starts + 1  # behind bos
        self.ends = np.append(starts[1:], len(ids)) - 1  # before eos
        pieces = np.maximum(1, -(-(self.ends - self.begins) // self.room))
        self.first = np.concatenate([[0], np.cumsum(pieces)])

    def __len__(self) -> int:
        return int(self.first[-1])

    @property
    def block_rows(self) -> int:
        """Pieces that lie in about one block of ids; 0 where ids are not read by blocks."""
        return -(-self.tokens.block // self.room)

    def read_ahead(self, blocks: np.ndarray) -> None:
        """Begins to read these blocks of pieces."""
        begins = self[np.minimum(blocks * self.block_rows, len(self) - 1)]["begin"]
        self.tokens.read_ahead(begins, self.block_rows * self.room)

    def document(self, indices: np.ndarray) -> np.ndarray:
        """[n] the document that each piece is of."""
        return np.searchsorted(self.first, indices, side="right") - 1

    def __getitem__(self, indices: np.ndarray) -> Example:
        """{"index", "begin", "end"} [n]: where pieces lie that begin and end at sentences, where the text allows."""
        d = self.document(indices)
        first, last = self.begins[d], self.ends[d]
        begin = first + (indices - self.first[d]) * self.room
        end = np.minimum(begin + self.room, last)
        a, b = (np.where((x == first) | (x == last), x, x + self._to_sentence(x, last)) for x in (begin, end))
        whole = b - a >= 2  # else a sentence is longer than the piece
        return {"index": indices, "begin": np.where(whole, a, begin), "end": np.where(whole, b, end)}

    def _to_sentence(self, at: np.ndarray, last: np.ndarray) -> np.ndarray:
        """How many tokens behind `at` the next sentence begins; 0 where none does within `room`."""
        return self.sentences(at, np.minimum(at + self.room, last) + 1, self.room + 1).argmax(axis=1)

    def sentences(self, begin: np.ndarray, end: np.ndarray, width: int) -> np.ndarray:
        """[n, width] bool: whether a sentence begins so many tokens behind `begin`, and before `end`."""
        at = begin[:, None] + np.arange(width)
        ends = self.vocabulary.ends_sentence[self.ids[np.minimum(at, len(self.ids)) - 1]]
        return ends & (at < end[:, None])


def pick_set_flag(flags: np.ndarray, draw: np.ndarray) -> np.ndarray:
    """[n] the place of one of the flags [n, W] that are set, by a number [n] in [0, 1); 0 where none is."""
    count = np.cumsum(flags, axis=1)
    return (count > np.floor(draw * count[:, -1])[:, None]).argmax(axis=1)


def sentence_pair(
    rows: Example, draws: ExampleRng, source: Pairs, masking: Masking, slots: int, short_share: float = 0.1
) -> Example:
    """[CLS] A [SEP] B [SEP] with some of it hidden; B follows A, or comes from another document, half of the time each.

    The cut between A and B falls at a random sentence of the piece. Too long a pair loses tokens from the front or
    the back, at random, of the longer text; a tenth of the pairs are made short, so that fine-tuning finds other
    lengths than pretraining's familiar (arXiv 1810.04805, section 3.1 and appendix A.2).
    """
    v, room, begin, end = source.vocabulary, source.room, rows["begin"], rows["end"]
    short, other_length, where_cut, coin, which, where_b = draws.uniform(6).T
    target = np.where(short < short_share, 2 + np.floor(other_length * (room - 1)), room).astype(int)

    inside = source.sentences(begin, end, 2 * room)  # no piece is longer
    inside[:, 0] = False
    cut = np.where(inside.any(axis=1), pick_set_flag(inside, where_cut), np.maximum(1, (end - begin) // 2))
    a, b = (begin, begin + cut), (begin + cut, end)

    random_b = (coin < 0.5) | (b[0] >= end)
    mine = source.document(rows["index"])
    before, own = source.first[mine], source.first[mine + 1] - source.first[mine]
    index = np.floor(which * (len(source) - own)).astype(int)
    elsewhere = source[index + np.where(index >= before, own, 0)]  # any piece but those of this document
    opening = source.sentences(elsewhere["begin"], elsewhere["end"], 2 * room)
    opening[:, 0] = True
    other = (elsewhere["begin"] + pick_set_flag(opening, where_b), elsewhere["end"])
    b = tuple(np.where(random_b, x, y) for x, y in zip(other, b, strict=True))

    coins = np.unpackbits(draws.bits(2, 1 + room // 32).view(np.uint8), axis=2)
    (a, size_a), (b, size_b) = truncated(a, b, target, coins)
    at = np.arange(room + 3)
    first, last = (1 + size_a)[:, None], (2 + size_a + size_b)[:, None]  # the two eos
    taken = np.where(at < first, a[:, None] + at - 1, b[:, None] + at - first - 1)
    tokens = source.ids[np.clip(taken, 0, len(source.ids) - 1)].astype(np.int32)
    tokens = np.where(at == 0, v.bos, np.where((at == first) | (at == last), v.eos, np.where(at < last, tokens, v.pad)))
    tokens = tokens.astype(np.int32)
    hidden, masked = hide(tokens, draws, v, masking, slots)
    return {
        "tokens": hidden,
        "segments": (at <= last).astype(np.int32),
        "types": ((at > first) & (at <= last)).astype(np.int32),
        "positions": np.broadcast_to(at.astype(np.int32), tokens.shape),
        "random_next": random_b.astype(np.int32),
        "pair_weight": np.ones(len(tokens), np.float32),
        **masked,
    }


def truncated(a: Span, b: Span, room: np.ndarray, coins: np.ndarray) -> tuple[Span, Span]:
    """Two texts in `room` [n] tokens: the longer one loses a token at a time, at its front or back at random.

    Args:
      a, b: where each text begins and ends, [n] each.
      coins: [n, 2, W] of 0 and 1, W at least as many as a text may lose; 1: from the front.

    Returns:
      where each text begins now, and its length.
    """
    size_a, size_b = a[1] - a[0], b[1] - b[0]
    kept_a = np.minimum(size_a, np.maximum(room // 2, room - size_b))
    kept_b = np.minimum(size_b, room - kept_a)
    lost = np.stack([size_a - kept_a, size_b - kept_b], axis=1)
    front = (coins & (np.arange(coins.shape[2]) < lost[..., None])).sum(axis=2, dtype=int)
    return (a[0] + front[:, 0], kept_a), (b[0] + front[:, 1], kept_b)


def masked_source(
    tokens: Tokens, length: int, vocabulary: Vocabulary, masking: Masking, *, pairs: bool, separate: bool, padded: bool
) -> tuple[Any, Callable[[Example, ExampleRng], Example]]:
    """Rows for masked language modelling and the function that hides some of them: sentence pairs, or running text.

    Raises:
      InputError: pairs of a text with one document only.
    """
    shared = {"masking": masking, "slots": masking.slots(length)}
    if pairs:
        source = Pairs(tokens, length, vocabulary)
        return source, functools.partial(sentence_pair, source=source, **shared)
    rows = Rows(tokens, length - 1, vocabulary.pad, separate, padded)
    return rows, functools.partial(masked_row, vocabulary=vocabulary, **shared)
