"""Rows of sets of texts, for contrastive training."""

import hashlib

import numpy as np

from bothways.data.contrasts import framed
from bothways.data.examples import Example
from bothways.data.tokens import Tokens
from bothways.errors import InputError


class ContrastRows:
    """Sets of texts, each in rows of `length`: a source.

    {"tokens", "segments"} [n, N, T] int32, segments 0 at padding; {"ids"} [n, N, 2] int32, the same for two texts that the
    model cannot tell apart; {"score", "weight"} [n] float32, the weight 1.

    Raises:
      InputError: rows that hold no token of a text.
    """

    def __init__(self, tokens: Tokens, length: int, pad: int):
        self.tokens, self.length, self.pad = tokens, length, pad
        of = tokens.sets
        around = len(of.frame[0]) + len(of.frame[1])
        if length <= around:
            raise InputError(
                f"a text has {length} tokens, of which {around} open and close it; set --objective.text-length to more"
            )
        self.of, self.ends = of, np.append(tokens.starts[1:], len(tokens.ids))
        self.cut = int((self.ends - tokens.starts > length - around).sum())

    @property
    def note(self) -> str:
        """What is worth knowing of the rows, for a person."""
        cut = f", {self.cut:,} texts longer than {self.length} tokens cut at their ends" if self.cut else ""
        return f"{len(self):,} sets of {self.of.sides} texts{cut}"

    def __len__(self) -> int:
        return len(self.tokens.starts) // self.of.sides

    def __getitem__(self, indices: np.ndarray) -> Example:
        n, N = len(indices), self.of.sides
        tokens = np.full((n, N, self.length), self.pad, np.int32)
        segments, ids = np.zeros_like(tokens), np.zeros((n, N, 2), np.int32)
        for i, one in enumerate(indices):
            for side in range(N):
                at = int(one) * N + side
                text = self.tokens.ids[self.tokens.starts[at] : self.ends[at]]
                row = framed(self.of.frame, text, self.length)
                tokens[i, side, : len(row)], segments[i, side, : len(row)] = row, 1
                digest = hashlib.blake2b(np.array(row, np.int32).tobytes(), digest_size=8).digest()
                ids[i, side] = np.frombuffer(digest, np.int32)
        score = self.of.scores[indices].astype(np.float32)
        return {"tokens": tokens, "segments": segments, "ids": ids, "score": score, "weight": np.ones(n, np.float32)}
