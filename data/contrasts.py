"""Sets of texts to be told apart: one to search with, one that belongs to it, and some that do not, as documents of a corpus."""

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from bothways.data import files
from bothways.data.config import DataConfig
from bothways.data.tokenizer import Tokenizer
from bothways.errors import InputError


def read(paths: Sequence[files.AnyPath], cfg: DataConfig) -> Iterator[tuple[str, str]]:
    """(name, document) of the sets in tables.

    Raises:
      InputError: other files, a field that is not there, an empty text, or a score that is no number.
    """
    for path in paths:
        if files.kind(path) not in files.TABLES:
            raise InputError(f"{path}: sets of texts come from {', '.join(files.TABLES)} files")
        for number, record in files.records(path):
            yield f"{path.name}:{number}", of_record(record, cfg, path, number)


def of_record(record: dict[str, Any], cfg: DataConfig, path: Any, number: int) -> str:
    """The document of a record. Raises InputError as `read` does."""
    texts = []
    for field in cfg.text_fields:
        text = files.text_of(record, field, "--data.text-fields", path, number)
        if not text.strip():
            raise InputError(f"{path}, line {number}: the text under {field!r} is empty; leave the record out")
        texts.append(text)
    if not cfg.score_field:
        return document(texts)
    if cfg.score_field not in record:
        raise InputError(
            f"{path}, line {number}: no score under {cfg.score_field!r}; the fields are {', '.join(map(str, record))}; "
            "choose one with --data.score-field"
        )
    given = record[cfg.score_field]
    try:
        score = math.nan if isinstance(given, bool) else float(given)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise InputError(
            f"{path}, line {number}: the score under {cfg.score_field!r} is {str(given)[:60]!r}; it must be a number"
        )
    return document(texts, score)


def document(texts: Sequence[str], score: float = 0.0) -> str:
    """A set as it is kept in a corpus."""
    return json.dumps({"texts": list(texts), "score": score}, ensure_ascii=False)


def plain_text(of: str) -> str:
    """The texts of a document, one a line: what a vocabulary is trained on."""
    return "\n".join(json.loads(of)["texts"])


def encoded(
    documents: Iterable[tuple[str, str]], tokenizer: Tokenizer, prompts: tuple[str, str]
) -> Iterator[tuple[list[list[int]], float, int]]:
    """Sets (name, document) one by one: ids of each text behind its prompt, the score, bytes of the texts.

    Args:
      prompts: what is put before the first text of a set, and before all others.

    Raises:
      InputError: a text without tokens, with the name of its set.
    """
    for name, of in documents:
        given = json.loads(of)
        texts = [prompts[min(i, 1)] + text for i, text in enumerate(given["texts"])]
        ids = tokenizer.encode_many(texts)
        if not all(ids):
            raise InputError(f"{name}: a text without tokens: {texts[ids.index([])][:60]!r}; leave it out")
        yield ids, given["score"], sum(len(text.encode()) for text in given["texts"])


def framed(frame: tuple[list[int], list[int]], ids: Sequence[int], length: int) -> list[int]:
    """Tokens of a text between those that open and close it, of a long one the first: `length` at most in all."""
    before, behind = frame
    return [*before, *ids[: length - len(before) - len(behind)], *behind]


@dataclasses.dataclass(frozen=True)
class Sets:
    """What is known of the sets in a text's tokens: which texts are of one, and how they are wrapped."""

    sides: int
    """Texts of a set."""
    frame: tuple[list[int], list[int]]
    """Tokens before and behind each."""
    scores: np.ndarray
    """[sets] float32; 0 where there are none."""
