"""From rows to what a model reads: pure functions of (row, random generator). Seeded per example by the pipeline."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from common.errors import InputError
from data.tokenizer import Vocabulary
from data.tokens import Rows, Tokens

Example = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Masking:
    """How masked language modelling hides tokens."""

    rate: float = 0.15
    mask_share: float = 0.8
    random_share: float = 0.1
    whole_words: bool = False

    def slots(self, length: int) -> int:
        """P, the most tokens chosen in a row of this length."""
        return max(1, round(self.rate * length))


def places_within(segments: np.ndarray) -> np.ndarray:
    """[T] position of every token inside its own segment.

    >>> places_within(np.array([1, 1, 1, 2, 2, 0]))
    array([0, 1, 2, 0, 1, 0], dtype=int32)
    """
    index = np.arange(len(segments), dtype=np.int32)
    if segments[0] == segments[-1]:
        return index
    first = np.concatenate([[True], segments[1:] != segments[:-1]])
    return index - np.maximum.accumulate(np.where(first, index, 0)).astype(np.int32)


def as_is(row: Example, rng: np.random.Generator) -> Example:
    """For sources whose rows are what the model reads already."""
    return row


def causal(row: Example, rng: np.random.Generator) -> Example:
    """Next-token prediction: a row of T + 1 tokens into T inputs and T targets.

    The last token of a document has no next one, and padding none either: their weight is 0.
    """
    tokens, segments = row["tokens"], row["segments"]
    return {
        "tokens": tokens[:-1],
        "targets": tokens[1:],
        "segments": segments[:-1],
        "positions": places_within(segments[:-1]),
        "weights": ((segments[1:] == segments[:-1]) & (segments[1:] > 0)).astype(np.float32),
    }


def hide(
    tokens: np.ndarray, rng: np.random.Generator, vocabulary: Vocabulary, masking: Masking, slots: int
) -> tuple[np.ndarray, Example]:
    """Masked language modelling (arXiv 1810.04805, section 3.1, task 1).

    A share of the tokens is chosen, special ones never. Of the chosen, some become [MASK], some another token,
    and the rest stay as they are; what the loss asks for is the original of all of them.

    Args:
      tokens: [T].
      slots: P, room for so many chosen tokens; empty slots have weight 0.

    Returns:
      the tokens with some hidden, and {"places", "targets", "weights"}, each [P].
    """
    candidates = np.flatnonzero(~vocabulary.special[tokens])
    wanted = min(slots, max(1, round(masking.rate * len(candidates)))) if len(candidates) else 0
    if masking.whole_words:
        chosen = whole_words(tokens, candidates, wanted, rng, vocabulary)
    else:
        chosen = rng.permutation(candidates)[:wanted]
    chosen = np.sort(chosen)
    hidden, draw = tokens.copy(), rng.random(len(chosen))
    hidden[chosen[draw < masking.mask_share]] = vocabulary.mask
    other = chosen[(draw >= masking.mask_share) & (draw < masking.mask_share + masking.random_share)]
    hidden[other] = rng.choice(vocabulary.ordinary, len(other))
    empty = slots - len(chosen)
    return hidden, {
        "places": np.pad(chosen, (0, empty)).astype(np.int32),
        "targets": np.pad(tokens[chosen], (0, empty)).astype(np.int32),
        "weights": np.pad(np.ones(len(chosen), np.float32), (0, empty)),
    }


def whole_words(
    tokens: np.ndarray, candidates: np.ndarray, wanted: int, rng: np.random.Generator, vocabulary: Vocabulary
) -> np.ndarray:
    """Whole words in random order until `wanted` tokens are chosen; a word that would be too long is passed over."""
    after_gap = np.diff(candidates, prepend=-2) > 1
    word = np.cumsum(vocabulary.starts_word[tokens[candidates]] | after_gap)
    chosen: list[np.ndarray] = []
    left = wanted
    for w in rng.permutation(np.unique(word)):
        places = candidates[word == w]
        if len(places) <= left:
            chosen.append(places)
            left -= len(places)
        if not left:
            break
    return np.concatenate(chosen) if chosen else candidates[:0]


def masked_row(row: Example, rng: np.random.Generator, vocabulary: Vocabulary, masking: Masking, slots: int) -> Example:
    """A packed row of running text, without next sentences, as in RoBERTa: it opens with bos and some of it is hidden."""
    tokens, segments = row["tokens"], row["segments"]
    if tokens[0] != vocabulary.bos:
        tokens, segments = np.roll(tokens, 1), np.roll(segments, 1)
        tokens[0], segments[0] = vocabulary.bos, segments[1]
    hidden, asked = hide(tokens, rng, vocabulary, masking, slots)
    return {"tokens": hidden, "segments": segments, "positions": places_within(segments), **asked}


def hybrid(
    row: Example, rng: np.random.Generator, vocabulary: Vocabulary, masking: Masking, causal_share: float
) -> Example:
    """A row to be read forward, or, with `prefix` as long as the row, both ways (arXiv 2410.24159, section 2).

    Read both ways, hidden tokens are asked for one place before they stand: what the output at t says of token t + 1
    is one reading, with the next token hidden or behind the horizon. Their weight is 1 / rate.
    """
    example = causal(row, rng)
    length = len(example["tokens"])
    if rng.random() < causal_share:
        return example | {"prefix": np.int32(0)}
    tokens, asked = hide(example["tokens"][1:], rng, vocabulary, masking, masking.slots(length))
    weights = np.zeros(length, np.float32)
    weights[asked["places"][asked["weights"] > 0]] = 1 / masking.rate
    tokens = np.concatenate([example["tokens"][:1], tokens])
    return example | {"tokens": tokens, "weights": weights, "prefix": np.int32(length)}


class Pairs:
    """Pieces of documents for next-sentence prediction: a random-access source of pairs to be made.

    Each document is cut into pieces of about `length` - 3 tokens at the ends of sentences or lines.

    Raises:
      InputError: fewer than two documents; there would be no negatives.
    """

    def __init__(self, ids: np.ndarray, starts: np.ndarray, length: int, vocabulary: Vocabulary):
        self.ids, self.room, self.vocabulary = ids, length - 3, vocabulary
        if len(starts) < 2:
            raise InputError(
                f"next-sentence pairs need negatives from another document, and there is {len(starts)} document; "
                "give more files, or set --objective.next-sentence False"
            )
        self.begins = starts + 1  # behind bos
        self.ends = np.append(starts[1:], len(ids)) - 1  # before eos
        pieces = np.maximum(1, -(-(self.ends - self.begins) // self.room))
        self.first = np.concatenate([[0], np.cumsum(pieces)])

    def __len__(self) -> int:
        return int(self.first[-1])

    def document(self, index: int) -> int:
        return int(np.searchsorted(self.first, index, side="right")) - 1

    def __getitem__(self, index: int) -> Example:
        """{"piece": [n] tokens that begin and end at sentences where the text allows, "index"}."""
        d = self.document(index)
        begin, end = self.begins[d], self.ends[d]
        at = begin + (int(index) - self.first[d]) * self.room
        a, b = (self._sentence_start(x, begin, end) for x in (at, min(at + self.room, end)))
        if b - a < 2:  # a sentence longer than the piece
            a, b = at, min(at + self.room, end)
        return {"piece": np.asarray(self.ids[a:b], np.int32), "index": np.int64(index)}

    def _sentence_start(self, at: int, begin: int, end: int) -> int:
        """The first place from `at` on where a sentence begins."""
        if at in (begin, end):
            return int(at)
        window = np.asarray(self.ids[at - 1 : min(at + self.room, end)])
        ends = np.flatnonzero(self.vocabulary.ends_sentence[window])
        return int(at + ends[0]) if len(ends) else int(at)


def sentence_pair(
    row: Example, rng: np.random.Generator, source: Pairs, masking: Masking, slots: int, short_share: float = 0.1
) -> Example:
    """[CLS] A [SEP] B [SEP] with some of it hidden; B follows A, or comes from another document, half of the time each.

    The cut between A and B falls at a random sentence of the piece. Too long a pair loses tokens from the front or
    the back, at random, of the longer text; a tenth of the pairs are made short, so that fine-tuning finds other
    lengths than pretraining's familiar (arXiv 1810.04805, section 3.1 and appendix A.2).
    """
    v, room, piece = source.vocabulary, source.room, row["piece"]
    target = int(rng.integers(2, room + 1)) if rng.random() < short_share else room
    cuts = np.flatnonzero(v.ends_sentence[piece[:-1]]) + 1
    cut = int(rng.choice(cuts)) if len(cuts) else max(1, len(piece) // 2)
    a, b = piece[:cut], piece[cut:]
    random_b = bool(rng.random() < 0.5) or len(b) == 0
    if random_b:
        mine, other = source.document(int(row["index"])), None
        while other is None or source.document(other) == mine:
            other = int(rng.integers(len(source)))
        b = source[other]["piece"]
        begins = np.concatenate([[0], np.flatnonzero(v.ends_sentence[b[:-1]]) + 1])
        b = b[int(rng.choice(begins)) :]
    a, b = truncate_pair(a, b, target, rng)
    tokens = np.concatenate([[v.bos], a, [v.eos], b, [v.eos]]).astype(np.int32)
    types = np.repeat(np.array([0, 1], np.int32), [len(a) + 2, len(b) + 1])
    hidden, asked = hide(tokens, rng, v, masking, slots)
    fill = room + 3 - len(tokens)
    return {
        "tokens": np.pad(hidden, (0, fill), constant_values=v.pad),
        "segments": np.pad(np.ones(len(tokens), np.int32), (0, fill)),
        "types": np.pad(types, (0, fill)),
        "positions": np.arange(room + 3, dtype=np.int32),
        "random_next": np.int32(random_b),
        "pair_weight": np.float32(1),
        **asked,
    }


def masked_source(
    tokens: Tokens, length: int, vocabulary: Vocabulary, masking: Masking, *, pairs: bool, separate: bool, padded: bool
) -> tuple[Any, Callable[[Example, np.random.Generator], Example]]:
    """Rows for masked language modelling and the function that hides some of them: sentence pairs, or running text.

    Raises:
      InputError: pairs of a text with one document only.
    """
    shared = {"masking": masking, "slots": masking.slots(length)}
    if pairs:
        source = Pairs(tokens.ids, tokens.starts, length, vocabulary)
        return source, functools.partial(sentence_pair, source=source, **shared)
    rows = Rows(tokens, length - 1, vocabulary.pad, separate, padded)
    return rows, functools.partial(masked_row, vocabulary=vocabulary, **shared)


def truncate_pair(a: np.ndarray, b: np.ndarray, room: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Both texts in `room` tokens: one at a time goes from the longer, front or back at random."""
    ends = {"a": [0, len(a)], "b": [0, len(b)]}
    while (longest := max(ends.values(), key=lambda e: e[1] - e[0])) and sum(e[1] - e[0] for e in ends.values()) > room:
        if rng.random() < 0.5:
            longest[0] += 1
        else:
            longest[1] -= 1
    return a[slice(*ends["a"])], b[slice(*ends["b"])]
