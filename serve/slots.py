"""Continuous batching: a fixed number of slots decode together, and each is refilled as soon as its row has ended.

A pool is one KV cache of B slots by S positions and the programs of serve/programs.py, which never change shape: prompts are
read in pieces, those that begin at the same time and are about as long together, and `step` gives every live slot a few
tokens. A row's numbers are computed by the same programs whoever its neighbours are, so what it generates does not depend
on them. Pieces begin at multiples of their size, so a prompt whose first pieces come from the prefix cache gets the numbers
that it would get without.
"""

import collections
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from bothways.sample.sampling_params import SamplingParams
from bothways.serve.prefix import PrefixCache
from bothways.serve.programs import CHUNK, Programs, Slots, State

SHORT_TURN = 0.004
"""Seconds. Where a token for every slot takes longer, the queue is looked at after each: a slot whose row has ended would stand
empty for the rest of a chunk."""
PATIENCE = 8
"""Times that shorter prompts go before a longer one."""
PREFILL_DELAY = 4
"""Steps that a prompt's first piece waits, while every slot is taken, for others of its length to be prefilled in the same pass: a
pass over four short prompts takes hardly longer than over one, and decoding stands still meanwhile."""


@dataclasses.dataclass(eq=False)
class Generation:
    """One text being generated for a client.

    `emit` is called, on the engine's thread, with (new tokens, their log-probabilities, alternatives, stop) after every
    step; stop is empty while it goes on, then eos or max_tokens. Returning True ends the row: the caller has found a stop
    string, or the client has gone.
    """

    ids: list[int]
    key: np.ndarray
    method: SamplingParams
    max_tokens: int
    emit: Callable[[list[int], list[float], list[list[tuple[int, float]]], str], bool]
    eos: int = -1
    """The token that ends it; -1: none does."""
    source: list[int] = dataclasses.field(default_factory=list)
    tops: int = 0
    gone: Callable[[], bool] = lambda: False
    """Whether nobody waits for it any more: its slot is freed before the next step."""
    read: int = 0
    """Tokens of `ids` that are in the cache."""
    count: int = 0
    cached: int = 0
    """Tokens of `ids` that came from the prefix cache."""
    passed: int = 0
    """Steps, and with them prefills of others, that came before its next piece was read."""

    @property
    def size(self) -> int:
        """Positions that it needs."""
        return max(len(self.ids) + self.max_tokens, len(self.source))


class Pool:
    """The rows of some `programs`, of one model.

    Args:
      prefixes: where pieces are kept; None where rows have sources, whose targets begin with nothing in common.
    """

    def __init__(self, programs: Programs, params: Any, *, prefixes: PrefixCache | None = None):
        self.programs, self.params, self.prefixes = programs, params, prefixes
        self.slots, self.size, self.piece = programs.slots, programs.size, programs.piece
        self.rows: list[Generation | None] = [None] * self.slots
        self.state: State | None = None
        self._turn = 0.0
        """Seconds that the last token of all slots took."""

    @property
    def bytes(self) -> int:
        return self.programs.bytes

    def warm(self) -> None:
        """Run every program once, so that none is compiled while a client waits."""
        emit = lambda *_: False  # noqa: E731
        programs = self.programs
        for length in programs.lengths:
            for cached in (0, self.piece):
                ids = [0] * (cached + min(length, self.size - cached - 2))
                key = np.zeros(programs.key_words, np.uint32)
                generation = Generation(ids, key, SamplingParams.make(), 1, emit, read=cached)
                generation.source = [0] if programs.has_source else []
                if cached < len(ids):
                    self.add(generation)
                while self.busy:
                    self.prefill(1)
                    self.step(1)
        if self.prefixes is not None:
            kept = programs.take(self.state, 0, 0)
            self.state = programs.put(self.state, 0, 0, kept)

    # ---- rows -------------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> int:
        return sum(row is not None for row in self.rows)

    @property
    def free(self) -> int:
        return self.slots - self.busy

    def add(self, generation: Generation) -> None:
        """Give a free slot to a row; nothing is computed yet but what comes from the prefix cache."""
        slot = self.rows.index(None)
        if self.state is None:
            self.state = self.programs.empty(self.params)
        if generation.source:
            tokens, segments = np.zeros((1, self.size), np.int32), np.zeros((1, self.size), np.int32)
            tokens[0, : len(generation.source)], segments[0, : len(generation.source)] = generation.source, 1
            self.state = self.programs.enter(self.params, self.state, slot, tokens, segments)
        ids, piece = generation.ids, self.piece
        # The last token is always read, since what follows it is wanted.
        while self.prefixes is not None and generation.read + piece < len(ids):
            kept = self.prefixes.get(ids[: generation.read + piece])
            if kept is None:
                break
            self.state = self.programs.put(self.state, slot, generation.read, kept)
            generation.read += piece
        generation.cached = generation.read
        self.rows[slot] = generation

    def reset(self) -> list[Generation]:
        """After an error: the rows that are lost with the state, and every slot free."""
        lost = [row for row in self.rows if row is not None]
        self.rows, self.state = [None] * self.slots, None
        return lost

    def prefill(self, budget: int) -> int:
        """Read pieces of prompts, the row with the least to read first, until about `budget` tokens are read. Rows that
        nobody waits for leave their slots before. Where all slots are taken, first pieces wait up to PREFILL_DELAY.

        Returns:
          how many were read.
        """
        self.rows = [None if row is not None and row.gone() else row for row in self.rows]
        done, chosen = 0, set()
        while done < budget and (ready := self._ready(unread := self._unread())):
            row = self.rows[ready[0]]
            length, slots = self._length(row), ready[:1]
            if row.read == 0 and (most := self.programs.together(length)):
                slots = [i for i in unread if self.rows[i].read == 0 and self._length(self.rows[i]) == length][:most]
                self._begin(slots, length, most)
            else:
                self._go_on(slots[0], length)
            chosen.update(slots)
            done += length * len(slots)
        for i in self._unread():
            self.rows[i].passed += i not in chosen
        return done

    @property
    def reading(self) -> bool:
        """Whether a prompt is not read to its end."""
        return any(row is not None and row.read < len(row.ids) for row in self.rows)

    def _unread(self) -> list[int]:
        """Slots whose prompts are not read to their end, in the order in which they should be."""
        waiting = [(r.passed < PATIENCE, len(r.ids) - r.read, i) for i, r in enumerate(self.rows) if r is not None]
        return [i for _, left, i in sorted(waiting) if left]

    def _ready(self, unread: list[int]) -> list[int]:
        """Those of the slots whose next piece is prefilled now, and not delayed to share a pass."""
        if self.free or len(unread) == self.busy:  # nobody waits for a slot, or nothing is decoded meanwhile
            return unread
        first = collections.Counter(self._length(self.rows[i]) for i in unread if self.rows[i].read == 0)

        def ready(row: Generation) -> bool:
            length = self._length(row)
            return row.read > 0 or row.passed >= PREFILL_DELAY or first[length] >= self.programs.together(length)

        return [i for i in unread if ready(self.rows[i])]

    def _length(self, row: Generation) -> int:
        """Of the next piece of a prompt, as compiled."""
        left = min(len(row.ids) - row.read, self.piece)
        return next(n for n in self.programs.lengths if n >= left)

    def _begin(self, slots: list[int], length: int, most: int) -> None:
        """The first pieces of the prompts in these slots, at most `most`, together."""
        tokens, counts, at = np.zeros((most, length), np.int32), np.zeros(most, np.int32), np.zeros(most, np.int32)
        for n, slot in enumerate(slots):
            ids = self.rows[slot].ids[:length]
            tokens[n, : len(ids)], counts[n], at[n] = ids, len(ids), slot
        self.state = self.programs.begin_rows(self.params, self.state, at, tokens, counts)
        for slot, count in zip(slots, counts.tolist(), strict=False):
            self._have_read(slot, count)

    def _go_on(self, slot: int, length: int) -> None:
        """The next piece of one prompt."""
        row = self.rows[slot]
        ids = row.ids[row.read : row.read + min(length, self.piece)]
        tokens = np.zeros((1, length), np.int32)
        tokens[0, : len(ids)] = ids
        start, count = np.int32(row.read), np.int32(len(ids))
        self.state = self.programs.go_on(self.params, self.state, slot, start, tokens, count)
        self._have_read(slot, len(ids))

    def _have_read(self, slot: int, count: int) -> None:
        row = self.rows[slot]
        if self.prefixes is not None and count == self.piece:
            piece = self.programs.take(self.state, slot, row.read)
            self.prefixes.put(row.ids[: row.read + count], piece)
        row.read += count

    def _wishes(self) -> Slots:
        wishes = self.programs.wishes()
        for i, row in enumerate(self.rows):
            if row is None:
                continue
            wishes.held[i] = True
            if row.read < len(row.ids):
                continue
            wishes.live[i] = True
            wishes.key[i], wishes.count[i], wishes.limit[i] = row.key, row.count, row.max_tokens
            for name in ("temperature", "top_k", "top_p", "min_p", "greedy", "filtered"):
                getattr(wishes, name)[i] = getattr(row.method, name)
            wishes.eos[i], wishes.tops[i] = row.eos, row.tops > 0
        return wishes

    def step(self, most: int = CHUNK) -> int:
        """At most so many tokens for every row whose prompt is read, one where others wait to be read or one takes long;
        rows that end leave their slots.

        Returns:
          tokens generated.
        """
        wishes = self._wishes()
        if not wishes.live.any():
            return 0
        most = min(most, CHUNK) if self._turn < SHORT_TURN and not self.reading else 1
        began = time.monotonic()
        self.state, out = self.programs.step(self.params, self.state, wishes, np.int32(most))
        tokens, logprobs, ids, values, counts = jax.device_get(out)
        self._turn = (time.monotonic() - began) / most
        total = 0
        for i in np.flatnonzero(wishes.live):
            row = self.rows[i]
            new = int(counts[i]) - row.count
            row.count += new
            total += new
            said = tokens[i, :new].tolist()
            stop = "eos" if said and said[-1] == row.eos else "max_tokens" if row.count >= row.max_tokens else ""
            tops = [
                list(zip(ids[i, j, : row.tops].tolist(), values[i, j, : row.tops].tolist(), strict=True))
                for j in range(new if row.tops else 0)
            ]
            if row.emit(said, logprobs[i, :new].tolist(), tops, stop) or stop:
                self.rows[i] = None
        return total
