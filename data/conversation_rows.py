"""Conversations packed into rows, and what of them is predicted."""

import numpy as np

from bothways.data.examples import Example, causal, stacked
from bothways.data.pairs import packing
from bothways.data.rng import ExampleRng
from bothways.data.tokenizer import Vocabulary
from bothways.data.tokens import Tokens
from bothways.errors import InputError


class PackedConversations:
    """Conversations, several to a row: a source of {"tokens", "segments", "scored"}, each [n, length] int32.

    Segments number the conversations of a row from 1, so that none sees another; 0 is padding, which counts for nothing.
    One that is longer is cut at its end; where no part of an answer is left then, it is left out.

    Raises:
      InputError: nothing is left.
    """

    def __init__(self, tokens: Tokens, length: int, vocabulary: Vocabulary):
        self.tokens, self.length, self.pad = tokens, length, vocabulary.pad
        self.bounds = np.append(tokens.starts, len(tokens.ids))  # of every conversation
        sizes = np.diff(self.bounds)
        # The first token that counts: nothing predicts the first of a conversation.
        at = np.flatnonzero(tokens.scored)
        inside = np.searchsorted(at, tokens.starts + 1)
        first = np.append(at, len(tokens.ids))[inside] - tokens.starts
        fitting = np.flatnonzero(first < np.minimum(sizes, length))
        if not len(fitting):
            raise InputError(
                f"none of the {len(sizes)} conversations has part of an answer within model.context_length={length - 1} "
                f"tokens; set --model.context-length {int(first.min()) + 1} or more"
            )
        self.cut, self.left_out = int((sizes[fitting] > length).sum()), len(sizes) - len(fitting)
        lengths = np.minimum(sizes[fitting], length)
        self.order, self.first = packing(tokens.home, lengths[:, None], length)
        self.order = fitting[self.order]
        self.padding = 1 - lengths.sum() / (length * len(self))

    @property
    def note(self) -> str:
        """What is worth knowing of the rows, for a person."""
        cut = f", {self.cut} longer than a row cut at the end" if self.cut else ""
        left_out = f", {self.left_out} whose answers begin beyond it left out" if self.left_out else ""
        return f"{len(self.order):,} conversations in {len(self):,} rows, {self.padding:.1%} padding{cut}{left_out}"

    def __len__(self) -> int:
        return len(self.first) - 1

    def __getitem__(self, indices: np.ndarray) -> Example:
        return stacked([self._row(index) for index in indices])

    def _row(self, index: int) -> Example:
        row = {name: np.zeros(self.length, np.int32) for name in ("tokens", "segments", "scored")}
        row["tokens"][:] = self.pad
        at = 0
        for number, one in enumerate(self.order[self.first[index] : self.first[index + 1]], 1):
            begin = self.bounds[one]
            size = min(int(self.bounds[one + 1] - begin), self.length)
            row["tokens"][at : at + size] = self.tokens.ids[begin : begin + size]
            row["segments"][at : at + size] = number
            row["scored"][at : at + size] = self.tokens.scored[begin : begin + size]
            at += size
        return row


def answered(rows: Example, draws: ExampleRng) -> Example:
    """Next-token prediction of answers: rows [n, T + 1] into inputs and targets [n, T], as `examples.causal`; what is no
    part of an answer has weight 0."""
    example = causal(rows, draws)
    return example | {"weights": example["weights"] * rows["scored"][:, 1:].astype(np.float32)}


def conversation_rows(tokens: Tokens, length: int, vocabulary: Vocabulary) -> PackedConversations | None:
    """The packed conversations of a text that holds them; None of plain text."""
    return None if tokens.scored is None else PackedConversations(tokens, length, vocabulary)
