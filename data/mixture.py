"""What a run reads: one corpus, or several in the proportions of `data.mixture`."""

import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from fractions import Fraction
from typing import Any, TypeVar

import numpy as np

from bothways.data import corpora, mixture_config, tokens
from bothways.data import tokenizer as tokenizers
from bothways.data.config import VOCABULARY_FILES, DataConfig
from bothways.data.corpora import Corpus
from bothways.data.examples import Example
from bothways.data.mixture_config import Part
from bothways.data.pipeline import ExampleFn, RowSource, blocks_of, order
from bothways.data.rng import ExampleRng
from bothways.data.schedule import Schedule
from bothways.data.tokenizer import Tokenizer
from bothways.data.tokens import Tokens
from bothways.errors import InputError

Source = tuple[RowSource, ExampleFn]
A, B = TypeVar("A"), TypeVar("B")


@dataclasses.dataclass(frozen=True)
class Text:
    """The corpora of a run and how much of each is read. One corpus alone is a mixture of one."""

    parts: tuple[Part, ...]
    corpora: tuple[Corpus, ...]

    @property
    def names(self) -> list[str]:
        return mixture_config.names_of(self.parts)

    @property
    def fingerprint(self) -> str:
        """Of all their texts, in their order."""
        if len(self.corpora) == 1:
            return self.corpora[0].fingerprint
        return hashlib.sha256(" ".join(corpus.fingerprint for corpus in self.corpora).encode()).hexdigest()[:16]

    @property
    def earlier(self) -> tuple[str, ...]:
        return self.corpora[0].earlier if len(self.corpora) == 1 else ()

    def prepare(self, split: str, tokenizer: Tokenizer, cache: str) -> list[Tokens]:
        """The tokens of a split of each corpus. Raises InputError as tokens.prepare does."""
        return self.each(lambda corpus: tokens.prepare(corpus, split, tokenizer, cache), self.corpora)

    def each(self, make: Callable[[A], B], of: Sequence[A]) -> list[B]:
        """What is made of each corpus. An InputError says which of several it was."""
        made = []
        for name, one in zip(self.names, of, strict=True):
            try:
                made.append(make(one))
            except InputError as e:
                if len(self.corpora) == 1:
                    raise
                raise InputError(f"data.mixture, {name}: {e}") from e
        return made

    def documents(self, split: str) -> Iterator[tuple[str, str]]:
        """(name, text) of the documents of a split, corpus by corpus."""
        return itertools.chain.from_iterable(corpus.documents(split) for corpus in self.corpora)

    def schedule(self, rows: Sequence[int], first_example: Callable[[int], int]) -> Schedule:
        """Which corpus each example of the run comes from.

        Args:
          rows: how many each corpus has, by which epochs are counted.
          first_example: a step -> the number of its first example.
        """
        steps = mixture_config.steps_of(self.parts)
        return Schedule([(first_example(step), self.weights(step, rows)) for step in steps])

    def weights(self, step: int, sizes: Sequence[int]) -> list[Fraction]:
        """Of each corpus at a step; of epochs by these sizes."""
        return [p.at(step) * (size if p.in_epochs else 1) for p, size in zip(self.parts, sizes, strict=True)]

    def shares(self, sizes: Sequence[int], last: bool = False) -> list[float]:
        """Of each corpus in a whole of 1: the mean over the phases, or of the last phase."""
        steps = mixture_config.steps_of(self.parts)[-1 if last else 0 :]
        weights = [self.weights(step, sizes) for step in steps]
        return [float(sum(w[i] / sum(w) for w in weights) / len(weights)) for i in range(len(self.parts))]


def load(cfg: DataConfig, *, copied: bool = True, only: Collection[str] | None = None) -> Text:
    """The text that a configuration names.

    Args:
      copied: as for corpora.load.
      only: these corpora of a mixture.

    Raises:
      InputError: as corpora.load does; two corpora with the same text.
    """
    found = [part for part in mixture_config.parts_of(cfg) if only is None or part.corpus in only]
    loaded = [corpora.load(mixture_config.config_of(part, cfg), copied=copied) for part in found]
    for i, corpus in enumerate(loaded):
        for part, other in zip(found, loaded[:i], strict=False):
            if other.fingerprint == corpus.fingerprint:
                raise InputError(f"data.mixture: {part.corpus} and {found[i].corpus} hold the same text; name it once")
    return Text(tuple(found), tuple(loaded))


def obtain_tokenizer(cfg: DataConfig, text: Text) -> Tokenizer:
    """The one vocabulary of all corpora: of its file, else that of the prepared ones, else trained on a sample of all in
    which each has its share.

    Raises:
      InputError: a corpus was prepared with another vocabulary; or as tokens.obtain_tokenizer does.
    """
    stores = [corpus.store for corpus in text.corpora if corpus.store]
    if len(text.corpora) == 1 or stores or cfg.tokenizer.endswith(VOCABULARY_FILES):
        first = next((corpus for corpus in text.corpora if corpus.store), text.corpora[0])
        tokenizer = tokens.obtain_tokenizer(cfg, first)
        for store in stores:
            store.check_tokenizer(tokenizer)
        return tokenizer

    def train() -> Tokenizer:
        sizes = [tokens.training_bytes(corpus) for corpus in text.corpora]
        budgets = [share * tokenizers.TRAINING_BYTES for share in text.shares(sizes)]
        lines = itertools.chain.from_iterable(
            tokenizers.lines(tokens.training_texts(corpus), min(1.0, budget / max(1, size)), int(budget))
            for corpus, budget, size in zip(text.corpora, budgets, sizes, strict=True)
        )
        return tokenizers.train_on(lines, cfg.tokenizer, cfg.vocab_size)

    wanted = " ".join([text.fingerprint, *cfg.mixture])
    return tokens.with_template(cfg, tokens.kept_tokenizer(cfg, wanted, train))


# ---- rows ------------------------------------------------------------------------------------------------------------


class MixedRows:
    """Rows of several sources by a schedule: a source that says itself which row each example reads.

    Each source keeps its own order, in which each of its rows comes once an epoch of it.
    """

    def __init__(self, sources: Sequence[Source], schedule: Schedule):
        self.sources, self.schedule = sources, schedule
        self.block_rows = max(blocks_of(rows) for rows, _ in sources)

    def __len__(self) -> int:
        return sum(len(rows) for rows, _ in self.sources)

    @property
    def note(self) -> str:
        return "; ".join(note for rows, _ in self.sources if (note := getattr(rows, "note", "")))

    def shown(self, names: Sequence[str], examples: int) -> str:
        """The share of each corpus in the first so many examples of a run, and how often its rows come."""
        counts = self.schedule.counts(examples)
        shown = [
            f"{name} {count / max(1, examples):.1%} ({count / len(rows):.2f} epochs)"
            for name, count, (rows, _) in zip(names, counts, self.sources, strict=True)
        ]
        return f"mixture of {examples:,} rows: {', '.join(shown)}"

    def order_of(self, numbers: np.ndarray, seed: int) -> np.ndarray:
        """[n, 2] the source that each example reads, and the row there."""
        which, number = self.schedule(numbers)
        row = np.empty_like(number)
        for i in np.unique(which):
            row[which == i] = order(self.sources[i][0], number[which == i], seed)
        return np.stack([which, row], axis=1)

    def __getitem__(self, indices: np.ndarray) -> Example:
        return {"source": indices[:, 0], "row": indices[:, 1]}


def mixed_examples(rows: Example, draws: ExampleRng, sources: Sequence[Source]) -> Example:
    """The examples of each source, made by its own function, in the order in which they were wanted."""
    made: dict[str, Any] = {}
    for i in np.unique(rows["source"]):
        at = np.flatnonzero(rows["source"] == i)
        source, example = sources[i]
        for name, values in example(source[rows["row"][at]], ExampleRng(draws.seed, draws.numbers[at])).items():
            made.setdefault(name, np.empty((len(rows["row"]), *values.shape[1:]), values.dtype))[at] = values
    return made


def source_of(sources: Sequence[Source], text: Text, first_example: Callable[[int], int]) -> Source:
    """One source of all: of one corpus its own; of several, by their weights.

    Args:
      first_example: a step -> the number of its first example.
    """
    if len(sources) == 1:
        return sources[0]
    schedule = text.schedule([len(rows) for rows, _ in sources], first_example)
    return MixedRows(sources, schedule), functools.partial(mixed_examples, sources=sources)


# ---- held-out figures --------------------------------------------------------------------------------------------------


def averaged(figures: dict[str, dict[str, float]], shares: Sequence[float]) -> dict[str, float]:
    """Figures of the whole and of each corpus: {"loss"} of each name -> {"loss", "loss/NAME", ...}.

    The whole is the mean of the corpora by their shares; an interval has only each corpus.
    """
    if len(figures) == 1:
        return next(iter(figures.values()))
    each = {f"{key}/{name}": value for name, found in figures.items() for key, value in found.items()}
    keys = [key for key in next(iter(figures.values())) if not key.endswith(("_low", "_high"))]
    return {
        key: math.fsum(share * found[key] for share, found in zip(shares, figures.values(), strict=True)) for key in keys
    } | each
