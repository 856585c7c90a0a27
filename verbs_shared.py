"""What the verbs of the command line share: a run that can be asked, and how results are shown."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.config import MeshConfig

ONE = MeshConfig(data=1)

if TYPE_CHECKING:
    from sample.ask import Model
    from sample.embed import Embedder
    from sample.predict import TaskPredictor


def load(home: str | Path, mesh: MeshConfig = ONE) -> "Model | Embedder | TaskPredictor":
    """A trained run, ready to be asked: `sample` and `score`; `fill` and `embed` where its family can.

    Args:
      mesh: how to spread its parameters over this host's devices; with all axes 1 they lie on the first device, or,
        where that cannot hold them, on all.
    """
    from common.rundir import directory, load_run
    from sample.ask import ask
    from train.sharding import shardings_for_reading

    return ask(load_run(directory(home), say, lambda shapes: shardings_for_reading(shapes, mesh), narrow=True))


def say(message: str) -> None:
    print(message, file=sys.stderr)


def emit(value: Any, as_json: bool, shown: str) -> None:
    value = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
    print(json.dumps(value, ensure_ascii=False) if as_json else shown, flush=True)
