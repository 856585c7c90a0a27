"""How a run makes vectors of texts: embedding.json in a run directory, of runs that were trained for it."""

import dataclasses
import json
from pathlib import Path
from typing import Literal

from bothways.formats import FORMAT, version_of

FILE = "embedding.json"


@dataclasses.dataclass(frozen=True)
class EmbeddingInfo:
    pool: Literal["mean", "cls", "last"] = "mean"
    """The mean over all tokens, the first token's features, or the last one's."""
    normalize: bool = False
    """Vectors are scaled to length 1."""
    length: int = 0
    """Tokens of a text that are read, those that open and close it counted; the rest is left out. 0: all, and a text that is
    longer than the context is refused."""
    prompts: dict[str, str] = dataclasses.field(default_factory=dict)
    """Name -> what is put before a text, such as "query" -> "query: "."""
    similarity: str = "cosine"
    """How sentence-transformers compares two vectors, by its name; kept for an export."""
    default_prompt: str = ""
    """The name of the prompt where none is chosen."""


def read_embedding(home: Path | None) -> EmbeddingInfo | None:
    """What a run says of its vectors; None where it says nothing, or is in memory only."""
    if home is None or not (home / FILE).exists():
        return None
    found = json.loads((home / FILE).read_text())
    version_of(found, str(home / FILE))
    found.pop("format", None)
    return EmbeddingInfo(**found)


def write_embedding(home: Path, info: EmbeddingInfo) -> None:
    (home / FILE).write_text(json.dumps({"format": FORMAT, **dataclasses.asdict(info)}, indent=2))
