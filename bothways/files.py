"""Small files of a run: written whole or not at all, and read with an error that names them."""

import json
from pathlib import Path
from typing import Any

from bothways.errors import InputError


def write_whole(path: Path, content: str | bytes) -> None:
    """A file that is there as it was, or as it shall be: never half, however the process ends."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      InputError: it holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:  # no JSON, or no UTF-8
        raise InputError(f"{path} is not JSON ({e}); put back a copy of it") from e
    if not isinstance(found, dict):
        raise InputError(f"{path} holds {json.dumps(found)[:60]}, and not a JSON object; put back a copy of it")
    return found
