"""Labelled items as model inputs, no longer than they are. The layout is BERT's and GPT-1's alike: bos A eos, bos A eos B eos."""

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np

from bothways.data.hold_out import labels_of
from bothways.data.tasks import Item, Task
from bothways.data.tokenizer import Tokenizer
from bothways.errors import InputError

Example = dict[str, np.ndarray]


THRESHOLD = 0.5
"""Of an item that may have several labels, each label's least probability."""
NO_TEXT = {"begin_char": -1, "end_char": -1, "word": -1}
"""What stands at positions of padding; pad among tokens, elsewhere 0."""


def wrap(a: list[int], b: list[int] | None, tokenizer: Tokenizer, length: int) -> Example:
    """{"tokens", "segments", "types"}, each [n], n <= length; the longer text loses its end where both do not fit."""
    a, b = list(a), None if b is None else list(b)
    before, between, behind = tokenizer.frame(b is not None)
    room = length - len(before) - len(between) - len(behind)
    while len(a) + len(b or []) > room:
        longer = a if b is None or len(a) >= len(b) else b
        longer.pop()
    ids = [*before, *a, *between, *(b or []), *behind]
    first = len(ids) if b is None else len(before) + len(a) + len(between)
    return {
        "tokens": np.array(ids, np.int32),
        "segments": np.ones(len(ids), np.int32),
        "types": np.array([0] * first + [1] * (len(ids) - first), np.int32),
    }


PER_LABEL = ("labels", "label_weights")
"""Arrays [labels] of an item that may have several; all else of more than one number is [..., n tokens]."""


def collated(examples: list[Example], length: int, pad: int) -> Example:
    """Examples of any lengths as arrays [n, ...], positions [..., length] filled with padding; numbers as [n],
    what is PER_LABEL as [n, labels]."""
    found = {}
    for name, first in examples[0].items():
        if not np.ndim(first) or name in PER_LABEL:
            found[name] = np.array([example[name] for example in examples])
            continue
        fill = pad if name == "tokens" else NO_TEXT.get(name, 0)
        found[name] = np.full((len(examples), *first.shape[:-1], length), fill, first.dtype)
        for row, example in zip(found[name], examples, strict=True):
            row[..., : example[name].shape[-1]] = example[name]
    return found


def encode(
    item: Item, kind: str, labels: tuple[str, ...], tokenizer: Tokenizer, length: int, null_position: str = "first"
) -> list[Example]:
    """Model inputs of one item, with its label where it has one. Long documents of spans and long sentences of tags give several.

    Args:
      null_position: `first` or `last`, where a window of a span task says that it has no answer.
    """
    if kind in ("classify", "regress", "multilabel"):
        second = tokenizer.encode(item["text_b"]) if "text_b" in item else None
        example = wrap(tokenizer.encode(item["text"]), second, tokenizer, length)
        if kind == "multilabel":
            mine = item.get("label", ())
            each = {"labels": np.array([name in mine for name in labels], np.float32)}
            return [example | each | {"label_weights": np.ones(len(labels), np.float32), "weight": np.float32(1)}]
        label = item.get("label", 0 if kind == "regress" else labels[0])
        value = np.float32(label) if kind == "regress" else np.int32(labels.index(label))
        return [example | {"label": value, "weight": np.float32(1)}]
    if kind == "tag":
        return word_windows(item, labels, tokenizer, length)
    if kind == "choice":
        question = tokenizer.encode(item["text"])
        each = [wrap(question, tokenizer.encode(choice), tokenizer, length) for choice in item["choices"]]
        together = collated(each, max(len(e["tokens"]) for e in each), tokenizer.pad)
        return [together | {"label": np.int32(item.get("label", 0)), "weight": np.float32(1)}]
    return span_windows(item, tokenizer, length, null_position)


def word_windows(item: Item, labels: tuple[str, ...], tokenizer: Tokenizer, length: int) -> list[Example]:
    """Tags: a word's label stands at its first piece; all other positions have weight 0. `word` is the word's index there.

    A sentence that is longer than the row is cut into windows. Each word is asked for in one of them, where it has up
    to a quarter of the row for context on either side. A word that the vocabulary has no piece for (a lone accent, a
    zero-width space under WordPiece) is one `unk`, so that every word has its tag.
    """
    pieces = [tokenizer.encode((" " if i else "") + word) or [tokenizer.unk] for i, word in enumerate(item["words"])]
    opened, _, closed = tokenizer.frame(False)
    opening, room = len(opened), length - len(opened) - len(closed)
    context = room // 4
    sizes = np.array([min(len(p), room) for p in pieces])
    ends = np.cumsum(sizes)
    windows, begin = [], 0  # begin: the first word that no window has asked for
    while begin < len(pieces):
        before = ends[begin] - sizes[begin]
        left = int(np.searchsorted(ends - sizes, before - context)) if begin else 0
        base = ends[left] - sizes[left]
        if ends[begin] - base > room:  # a long word needs the room of its context
            left, base = begin, before
        right = int(np.searchsorted(ends, base + room, side="right"))  # words left..right - 1 are in the row
        last = right if right == len(pieces) else int(np.searchsorted(ends, base + room - context, side="right"))
        last = min(max(last, begin + 1), right)
        example = wrap([t for p in pieces[left:right] for t in p[:room]], None, tokenizer, length)
        n = len(example["tokens"])
        label, weight, word_at = np.zeros(n, np.int32), np.zeros(n, np.float32), np.full(n, -1, np.int32)
        for i in range(begin, last):
            position = opening + ends[i] - sizes[i] - base
            label[position] = labels.index(item["label"][i]) if "label" in item else 0
            weight[position], word_at[position] = 1, i
        windows.append(example | {"label": label, "weight": weight, "word": word_at})
        begin = last
    return windows


def span_windows(
    item: Item, tokenizer: Tokenizer, length: int, null_position: str = "first", most_question: int = 64
) -> list[Example]:
    """Questions on a document, which is cut into windows that overlap by half (BERT's SQuAD code strides likewise).

    `start` and `end` are token positions of the first answer, both `null` where the window has none: the position of bos,
    or of the last token, which alone has seen the window where tokens see what is before them only.
    `begin_char` and `end_char` [n] map positions back to the document, -1 where a position may not answer.
    """
    question = tokenizer.encode(item["text"])[:most_question]
    pieces = tokenizer.encode_with_offsets(item["text_b"])
    before, between, behind = tokenizer.frame(True)
    room = length - len(question) - len(before) - len(between) - len(behind)
    if room < 8:
        raise InputError(
            f"a question of {len(question)} tokens leaves {room} of {length} for its document; use a longer --length"
        )
    windows, at = [], 0
    while True:
        part = pieces[at : at + room]
        offset = len(before) + len(question) + len(between)
        example = wrap(question, [p[0] for p in part], tokenizer, length)
        begin, end = (np.full(len(example["tokens"]), -1, np.int32) for _ in range(2))
        for i, (_, b, e) in enumerate(part):
            begin[offset + i], end[offset + i] = b, e
        null = start = stop = 0 if null_position == "first" else len(example["tokens"]) - 1
        if item.get("answers"):
            first, text = item["answers"][0]
            inside = [offset + i for i, (_, b, e) in enumerate(part) if b < first + len(text) and e > first]
            if inside and part[0][1] <= first and part[-1][2] >= first + len(text):
                start, stop = inside[0], inside[-1]
        windows.append(
            example
            | {
                "start": np.int32(start),
                "end": np.int32(stop),
                "null": np.int32(null),
                "begin_char": begin,
                "end_char": end,
                "weight": np.float32(1),
            }
        )
        if at + room >= len(pieces):
            return windows
        at += max(1, room // 2)


def label_weights(spec: Sequence[str], task: Task) -> np.ndarray | None:
    """[labels] how much an item, or word, of each label counts in training; None: all the same.

    Args:
      spec: `balanced`, or LABEL=WEIGHT for some of them. balanced: n / (labels x n of the label); of items with several
        labels, how many lack the label for each that has it.

    Raises:
      InputError: a task without labels, a label that it does not have, a weight that is no positive number.
    """
    if not spec:
        return None
    if not task.labels:
        raise InputError(f"--class-weights are for labels, and {task.name} is a {task.kind} task, which has none")
    if tuple(spec) == ("balanced",):
        items = task.splits["train"]
        counts = collections.Counter(label for item in items for label in labels_of(item, task.kind))
        n = np.array([counts[label] for label in task.labels], float)
        return (len(items) - n).clip(1) / n if task.kind == "multilabel" else n.sum() / (len(n) * n)
    found = np.ones(len(task.labels))
    for part in spec:
        label, _, number = part.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if label not in task.labels or not 0 < weight < float("inf"):
            raise InputError(
                f"--class-weights {part!r}: wanted balanced, or LABEL=WEIGHT with a positive number and one of the labels "
                f"{', '.join(task.labels[:10])}"
            )
        found[task.labels.index(label)] = weight
    return found


def weighted(example: Example, kind: str, weights: np.ndarray) -> Example:
    """An example whose items, words or labels count as much as these say."""
    if kind == "multilabel":
        return example | {"label_weights": np.where(example["labels"] > 0, weights, 1).astype(np.float32)}
    return example | {"weight": (example["weight"] * weights[example["label"]]).astype(np.float32)}


class TaskRows:
    """A split's examples, a source of rows; `item_of[i]` is the item that example i comes from.

    Args:
      weights: [labels] how much each counts in the loss; None: all the same.
    """

    def __init__(
        self,
        items: list[Item],
        task: Task,
        tokenizer: Tokenizer,
        length: int,
        null_position: str = "first",
        weights: np.ndarray | None = None,
    ):
        self.examples: list[Example] = []
        self.item_of: list[int] = []
        self.pad = tokenizer.pad
        if task.kind == "choice" and len({len(item["choices"]) for item in items}) > 1:
            raise InputError(f"task {task.name}: every item must have the same number of choices")
        for i, item in enumerate(items):
            encoded = encode(item, task.kind, task.labels, tokenizer, length, null_position)
            self.examples += encoded if weights is None else [weighted(e, task.kind, weights) for e in encoded]
            self.item_of += [i] * len(encoded)
        self.lengths = np.array([example["tokens"].shape[-1] for example in self.examples])

    def __len__(self) -> int:
        return len(self.examples)

    def batch(self, indices: np.ndarray, length: int) -> Example:
        """Arrays [n, ...] of these examples, their positions filled up to `length`."""
        return collated([self.examples[i] for i in indices], length, self.pad)


def softmax(scores: np.ndarray) -> np.ndarray:
    exp = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)


def decisions(
    info: Any,
    scores: Sequence[np.ndarray],
    examples: list[Example],
    item_of: list[int],
    items: list[Item],
    longest: int = 30,
) -> list[tuple[Any, Any]]:
    """(answer, probability) of every item, from a task head's scores.

    Args:
      info: kind and labels of the task, and whether questions may have no answer.
      scores: of every example [outputs]; [n, outputs] for tag; [n, 2] for span, start and end, with positions that may
        not answer far below; [choices] for choice.
      longest: tokens in an answer span.

    Returns:
      classify: a label; multilabel: the labels whose probability is at least THRESHOLD, and {label: probability} of all;
      regress: a number and None; tag: a label and a probability per word; choice: an index;
      span: a piece of the document, or the empty text where that is more likely and the task has such questions
        (info.no_answer): SQuAD 2.0 has, 1.1 has not (arXiv 1806.03822).
    """
    if info.kind in ("classify", "choice"):
        p = [softmax(row) for row in scores]
        best = [int(row.argmax()) for row in p]
        return [(info.labels[i] if info.kind == "classify" else i, float(row[i])) for i, row in zip(best, p, strict=True)]
    if info.kind == "regress":
        return [(float(row[0]), None) for row in scores]
    if info.kind == "multilabel":
        each = [dict(zip(info.labels, (1 / (1 + np.exp(-row.astype(float)))).tolist(), strict=True)) for row in scores]
        return [([label for label, p in of.items() if p >= THRESHOLD], of) for of in each]
    return (tags if info.kind == "tag" else spans)(info, scores, examples, item_of, items, longest)


def tags(info: Any, scores: Any, examples: list[Example], item_of: list[int], items: list[Item], _: int) -> list[Any]:
    """(labels, probabilities) of every item's words: windows follow one another, each with words of its own."""
    found: list[tuple[list, list]] = [([], []) for _ in items]
    for row, example, i in zip(scores, examples, item_of, strict=True):
        for p in softmax(row[example["word"] >= 0]):
            found[i][0].append(info.labels[int(p.argmax())])
            found[i][1].append(float(p.max()))
    return found


def spans(
    info: Any, scores: Any, examples: list[Example], item_of: list[int], items: list[Item], longest: int
) -> list[Any]:
    """(answer, probability) of every question: the best span of any window; none where every window says so."""
    best_span: list[tuple[float, str, float]] = [(-np.inf, "", 0.0)] * len(items)
    none = [np.inf] * len(items)
    for row, example, i in zip(scores, examples, item_of, strict=True):
        start, end = row[:, 0], row[:, 1]
        none[i] = min(none[i], float(start[example["null"]] + end[example["null"]]))
        positions = np.flatnonzero(example["begin_char"] >= 0)
        if not len(positions):  # a document of characters that the vocabulary drops
            continue
        pairs = start[positions][:, None] + end[positions][None, :]
        ahead = np.subtract.outer(np.arange(len(positions)), np.arange(len(positions)))
        pairs = np.where((ahead <= 0) & (ahead > -longest), pairs, -np.inf)
        a, b = np.unravel_index(pairs.argmax(), pairs.shape)
        if pairs[a, b] > best_span[i][0]:
            text = items[i]["text_b"][example["begin_char"][positions[a]] : example["end_char"][positions[b]]].strip()
            p = float(softmax(start)[positions[a]] * softmax(end)[positions[b]])
            best_span[i] = (float(pairs[a, b]), text, p)
    return [
        ("", 1 - p) if info.no_answer and score <= none[i] else (text, p) for i, (score, text, p) in enumerate(best_span)
    ]
