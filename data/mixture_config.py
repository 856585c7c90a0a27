"""The corpora of a mixture, as `data.mixture` writes them."""

import dataclasses
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from bothways.errors import InputError

if TYPE_CHECKING:
    from bothways.data.config import DataConfig

HOW = "write CORPUS=WEIGHT, or CORPUS=EPOCHSx; from a step on another one: CORPUS=0.6,20000:0.2"


@dataclasses.dataclass(frozen=True)
class Part:
    """A corpus of a mixture and its weight, step by step."""

    corpus: str
    weights: tuple[tuple[int, Fraction], ...] = ((0, Fraction(1)),)
    """(step, weight from that step on), by step; before the first, none."""
    in_epochs: bool = False
    """Weights are epochs: times the rows of the corpus."""
    text_field: str = ""
    """Empty: data.text_field."""

    def at(self, step: int) -> Fraction:
        return next((weight for first, weight in reversed(self.weights) if first <= step), Fraction(0))


def parse(entry: str) -> Part:
    """A Part of `CORPUS=WEIGHT[,STEP:WEIGHT]...[,FIELD]`. Raises InputError for anything else."""
    corpus, equals, rest = entry.rpartition("=")
    if not equals or not corpus.strip():
        raise InputError(f"data.mixture has {entry!r}; {HOW}")
    weights, epochs, field = [], [], ""
    for number, item in enumerate(rest.split(",")):
        step, colon, value = item.rpartition(":")
        if number and not colon and re.fullmatch(r"[A-Za-z_]\w*", item) and not field:
            field = item
            continue
        if (colon and not step.isdecimal()) or (number and not colon):
            raise InputError(f"data.mixture has {entry!r}, and {item!r} is no weight; {HOW}")
        weight = fraction(value.removesuffix("x"))
        if weight is None or weight < 0 or (weight == 0 and (not weights or int(step or 0) == 0)):
            raise InputError(
                f"data.mixture has {entry!r}: the weight {value!r} must be a positive, finite number"
                + (", or 0 from a later step on" if weight == 0 else "")
            )
        if weights and int(step) <= weights[-1][0]:
            raise InputError(
                f"data.mixture has {entry!r}: the phase from step {step} on is not after the one before it, from step "
                f"{weights[-1][0]} on; order them by step"
            )
        weights.append((int(step or 0), weight))
        epochs.append(value.endswith("x"))
    if len(set(epochs)) > 1:
        raise InputError(f"data.mixture has {entry!r}: weights and epochs (x) cannot be compared; give one or the other")
    return Part(corpus.strip(), tuple(weights), epochs[0], field)


def fraction(text: str) -> Fraction | None:
    """0.6, 3, 1e-3 or 1/3; None for anything else, and for what is not finite."""
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None


def parse_all(mixture: Sequence[str]) -> list[Part]:
    """The parts of a mixture.

    Raises:
      InputError: an entry that is none, a corpus that comes twice, weights beside epochs, or steps without any corpus.
    """
    parts = [parse(entry) for entry in mixture]
    twice = [part.corpus for i, part in enumerate(parts) if part.corpus in {p.corpus for p in parts[:i]}]
    if twice:
        raise InputError(f"data.mixture has {twice[0]} twice; give it one weight")
    if len({part.in_epochs for part in parts}) > 1:
        raise InputError(
            "data.mixture has weights and epochs (x), which cannot be compared; give one or the other to all"
        )
    for step in steps_of(parts) if parts else ():
        if not any(part.at(step) for part in parts):
            raise InputError(f"data.mixture has no corpus from step {step} on; give one a weight there")
    return parts


def weights_alone(mixture: Sequence[str]) -> tuple[str, ...]:
    """The weights of a mixture without its corpora, which may move; of one corpus they change nothing."""
    return tuple(entry.rpartition("=")[2] for entry in mixture) if len(mixture) > 1 else ()


def steps_of(parts: Sequence[Part]) -> list[int]:
    """The steps at which phases begin, 0 first."""
    return sorted({0} | {step for part in parts for step, _ in part.weights})


def names_of(parts: Sequence[Part]) -> list[str]:
    """A short name for each corpus: of a path or URL, its last folder or file; the whole where that is not told apart.

    >>> names_of([Part("gs://b/text/web"), Part("books/*.txt"), Part("c4/en")])
    ['web', 'books', 'c4/en']
    """
    short = [short_name(part.corpus) for part in parts]
    return [name if short.count(name) == 1 else part.corpus for name, part in zip(short, parts, strict=True)]


def short_name(corpus: str) -> str:
    looks_like_a_path = "://" in corpus or corpus[:1] in "./~" or any(c in corpus for c in "*?[") or "." in corpus
    if not looks_like_a_path:
        return corpus
    pieces = [p for p in PurePosixPath(corpus.partition("://")[2] or corpus).parts if not any(c in p for c in "*?[")]
    last = pieces[-1] if pieces else corpus
    return last.partition(".")[0] or last


# ---- one corpus of a mixture, alone and elsewhere --------------------------------------------------------------------


def parts_of(cfg: "DataConfig") -> list[Part]:
    """What a configuration names: its mixture, or one corpus. Raises InputError as parse_all does."""
    return parse_all(cfg.mixture) or [Part(cfg.corpus)]


def config_of(part: Part, cfg: "DataConfig") -> "DataConfig":
    """The configuration of one corpus of a mixture, alone."""
    return dataclasses.replace(cfg, corpus=part.corpus, mixture=(), text_field=part.text_field or cfg.text_field)


def folders(cfg: "DataConfig", to: str) -> dict[str, str]:
    """Where each corpus of a mixture is prepared, below a directory or URL; of one corpus, that itself."""
    parts = parts_of(cfg)
    if not cfg.mixture:
        return {cfg.corpus: to}
    named = [re.sub(r"[^A-Za-z0-9._-]+", "-", name) for name in names_of(parts)]
    return {part.corpus: f"{to.rstrip('/')}/{name}" for name, part in zip(named, parts, strict=True)}


def moved(mixture: Sequence[str], to: dict[str, str]) -> tuple[str, ...]:
    """The same weights of the same texts elsewhere.

    Args:
      to: corpora that moved -> where they are.
    """
    entries = [entry.rpartition("=") for entry in mixture]
    return tuple(f"{to.get(corpus, corpus)}={weight}" for corpus, _, weight in entries)
