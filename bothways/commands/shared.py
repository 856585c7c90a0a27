"""What the commands share: opening a run, reading lines, and how results are shown."""

import dataclasses
import errno
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro

from bothways.config import MeshConfig
from bothways.configs import find
from bothways.errors import InputError
from bothways.recipes import Recipe

if TYPE_CHECKING:
    from bothways.convert.run import Converted

ONE = MeshConfig(data=1)


def which(step: str) -> Any:
    """The checkpoint that --step names, as `bothways.load` takes it.

    Raises:
      InputError: neither a number nor one of the names.
    """
    if step in ("newest", "best"):
        return step
    if not step.isdecimal():
        raise InputError(f"--step is {step!r}; it must be newest, best, or the step of a checkpoint that is kept")
    return int(step)


def jsonable(value: Any, name: str = "", undefined: Sequence[str] = ()) -> Any:
    """The value in the types that JSON has: plain numbers, lists and objects.

    Args:
      name: the field that holds the value.
      undefined: fields in which a number that is not finite means "no value" and becomes null.

    Raises:
      InputError: any other number that is not finite.
    """
    if isinstance(value, dict):
        return {str(k): jsonable(v, f"{name}.{k}" if name else str(k), undefined) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v, name, undefined) for v in value]
    if isinstance(value, np.ndarray | np.generic):
        return jsonable(value.tolist(), name, undefined)
    if isinstance(value, float) and not math.isfinite(value):
        if name in undefined:
            return None
        raise InputError(
            f"{name} is {value}, which is no result: the weights of this run, or what was computed from them, are not "
            "finite; use an earlier checkpoint, or train with a lower learning rate"
        )
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def emit(value: Any, as_json: bool, shown: str, undefined: Sequence[str] = ()) -> None:
    """Print one result on standard output: as a JSON object, or as text.

    Args:
      undefined: as `jsonable`.

    Raises:
      InputError: a result that is not finite, or a standard output that cannot be written.
    """
    value = jsonable(dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value, "", undefined)
    try:
        print(json.dumps(value, ensure_ascii=False, allow_nan=False) if as_json else shown, flush=True)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF):
            raise
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (else Python tries once more at its end)
        raise InputError(f"standard output cannot be written: {e.strerror}; write to another file or disk") from e


def checked_text(texts: Sequence[str], what: str) -> None:
    """Raises InputError for an argument whose bytes are not UTF-8; Python holds such bytes as lone surrogates."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise InputError(
                f"{what} {text!r} is not UTF-8 (character {e.start + 1}); convert it, or check the locale"
            ) from e


def capability(model: Any, verb: str, why: str) -> Callable[..., Any]:
    """The method of that name. Raises InputError, with the reason, if this run has none."""
    if getattr(model, "task", None) is not None:
        raise InputError(
            f"{model.run.home} is fine-tuned for {model.task.name}, and can `predict`; use the run it came from"
        )
    if not hasattr(model, verb) and model.recipe.objective.kind == "contrastive":
        raise InputError(f"{model.run.home} was trained to make vectors: it can embed and search, but not {verb}")
    if not hasattr(model, verb) and not model.recipe.model.masked_head:
        raise InputError(
            f"{model.run.home} is a body without a masked-token head: it can embed and be fine-tuned, but not {verb}; "
            "`bothways train` gives it a head and trains both"
        )
    if not hasattr(model, verb):
        raise InputError(f"a {model.recipe.family} run cannot {verb}: it {why}")
    return getattr(model, verb)


def read_lines(file: Path | None, columns: tuple[str, ...] = ("text",)) -> list[str]:
    """Texts, one per line; from a .csv, .tsv or .jsonl file the texts in those `columns` that exist, separated by tabs.
    No file, or `-`, is standard input; a file may be a pipe.

    Line ends may be those of any system, and a byte order mark is not part of the text.

    Raises:
      InputError: no such file, not UTF-8, an empty line, a table without the first column.
    """
    from bothways.data import files

    file = None if file == Path("-") else file
    if file is not None and not file.exists():
        raise InputError(f"no file {file}")
    if file is not None and file.is_dir():
        raise InputError(f"{file} is a directory; give a file, with a text on each line")
    if file is not None and files.kind(file) in files.TABLES:
        return [files.line_of(record, columns, file, number) for number, record in files.records(file)]
    if file is None and sys.stdin is None:
        raise InputError("standard input is closed; name a file, or give texts on standard input")
    try:
        text = files.read_utf8(file) if file is not None else sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise InputError(f"standard input is not UTF-8 (offset {e.start})") from e
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    lines = lines[:-1] if lines[-1] == "" else lines
    empty = [i for i, line in enumerate(lines, 1) if not line]
    if not lines or empty:
        raise InputError(f"line {empty[0]} is empty; every line is a text" if lines else "no text: the input is empty")
    return lines


def one_text(recipe: Recipe, argv: Sequence[str]) -> Recipe:
    """The recipe without its mixture if the arguments name a corpus, and without its corpus if they name a mixture."""

    def names(field: str) -> bool:
        return any(arg.partition("=")[0].replace("_", "-") == f"--data.{field}" for arg in argv)

    if names("corpus") == names("mixture"):
        return recipe
    data = dataclasses.replace(recipe.data, **({"mixture": ()} if names("corpus") else {"corpus": ""}))
    return dataclasses.replace(recipe, data=data)


def parse_recipe(verb: str, argv: list[str], options: type, example: str) -> tuple[Recipe, Any]:
    """The recipe with the fields that were set, and the command's own options."""
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        raise InputError(f"{verb} wants a recipe first: {example}")
    if argv[0] in ("-h", "--help"):
        print(f"usage: bothways {verb} RECIPE ... [--SECTION.FIELD VALUE ...]\n\n{options.__doc__}\n\n{example}")
        raise SystemExit(0)
    base = one_text(find(argv[0]), argv)
    fields: list[Any] = [("recipe", Annotated[Recipe, tyro.conf.arg(name="")], dataclasses.field(default=base))]
    arguments = dataclasses.make_dataclass(
        "Arguments", fields, bases=(options,), frozen=True, kw_only=True, namespace={"__doc__": options.__doc__}
    )
    given = tyro.cli(arguments, prog=f"bothways {verb} {argv[0]}", args=argv[1:])
    return given.recipe, given


def show_converted(result: "Converted", as_json: bool) -> None:
    checked = "" if result.max_difference is None else f"; logits differ by at most {result.max_difference:.2g}"
    emit(result, as_json, f"{result.run}: {result.family}, {result.parameters:,} parameters{checked}")
