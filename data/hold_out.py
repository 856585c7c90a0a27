"""Which items of a labelled task choose epoch, learning rate and seed, and which are reported: never the same ones."""

import collections
import random
from typing import Any

from bothways.errors import InputError

Item = dict[str, Any]
Splits = dict[str, list[Item]]

MOST_HELD_OUT = 5000
"""Items held out of training at most: enough to tell two candidates apart by a point."""


def labels_of(item: Item, kind: str) -> list[str]:
    """Names that training has to show; none where labels are numbers, spans or choices."""
    if kind not in ("classify", "multilabel", "tag"):
        return []
    return list(item["label"]) if isinstance(item["label"], list | tuple) else [item["label"]]


def hold_out(items: list[Item], kind: str, count: int, seed: int) -> tuple[list[Item], list[Item]]:
    """(the rest, about `count` items drawn at random), each in the order that they came in.

    Questions on one document stay together, where there are ten documents or more. The last items of a label stay in
    the rest.
    """
    groups: dict[Any, list[int]] = collections.defaultdict(list)
    for i, item in enumerate(items):
        groups[item["text_b"] if kind == "span" else i].append(i)
    drawn = list(groups.values()) if len(groups) >= 10 else [[i] for i in range(len(items))]
    random.Random(seed).shuffle(drawn)
    left = collections.Counter(label for item in items for label in labels_of(item, kind))
    held: set[int] = set()
    for group in drawn:
        if len(held) >= count:
            break
        mine = collections.Counter(label for i in group for label in labels_of(items[i], kind))
        if all(left[label] > n for label, n in mine.items()):
            held.update(group)
            left.subtract(mine)
    return [x for i, x in enumerate(items) if i not in held], [x for i, x in enumerate(items) if i in held]


def with_held_out(splits: Splits, kind: str, seed: int = 0) -> tuple[Splits, str, str]:
    """Train, validation and test of what is there; what a choice is made on, and what is reported, in words.

    All three: as they are. Train and another: the other is reported, and a tenth of train chooses. Train alone: a tenth
    each.

    Raises:
      InputError: too few items to hold some out.
    """
    if set(splits) == {"train", "validation", "test"}:
        return splits, "validation", "test"
    train, count = splits["train"], min(MOST_HELD_OUT, max(1, len(splits["train"]) // 10))
    others = [split for split in ("test", "validation") if split in splits]
    if others:
        test, tested_on = splits[others[0]], others[0]
    else:
        train, test = hold_out(train, kind, count, seed + 1)
        tested_on = f"{len(test)} items held out of train"
    train, validation = hold_out(train, kind, count, seed)
    if not (train and validation and test):
        raise InputError(
            f"{len(splits['train'])} items to train on are too few to hold some out, on which epoch, learning rate and seed "
            "are chosen, with every label left in the rest; give more, or files called train, validation and test"
        )
    return (
        {"train": train, "validation": validation, "test": test},
        f"{len(validation)} {'other ' * (not others)}items held out of train",
        tested_on,
    )
