"""Where a run's metrics go besides metrics.jsonl: one class and one line in TRACKERS for each service."""

import contextlib
import importlib.util
import json
from pathlib import Path
from typing import Protocol

from bothways.errors import InputError
from bothways.log import log


class Tracker(Protocol):
    def add(self, step: int, metrics: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN/events."""

    needs = "tensorboardX"

    def __init__(self, home: Path, start: int):
        from tensorboardX import SummaryWriter  # seconds, where it finds PyTorch

        self.writer = None
        try:
            self.writer = SummaryWriter(str(home / "events"), purge_step=start + 1 if start else None)
        except ImportError as e:  # a bucket whose client is not installed
            log(f"no TensorBoard events: {e}")

    def add(self, step: int, metrics: dict[str, float]) -> None:
        if self.writer:
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self.writer:
            self.writer.close()


class WandB:
    """A Weights & Biases run named after the run directory, which a resumed run goes on with. Project, account and mode
    are what WANDB_PROJECT, WANDB_API_KEY and WANDB_MODE say."""

    needs = "wandb"

    def __init__(self, home: Path, start: int):
        import wandb

        kept = home / "wandb.json"
        known = json.loads(kept.read_text())["id"] if kept.exists() else None
        self.run = wandb.init(
            id=known, resume="allow", name=home.name, dir=_folder(home), config=json.loads(_recipe(home))
        )
        kept.write_text(json.dumps({"id": self.run.id}))

    def add(self, step: int, metrics: dict[str, float]) -> None:
        self.run.log(metrics, step=step)

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """An MLflow run named after the run directory, which a resumed run goes on with. Server and experiment are what
    MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME say."""

    needs = "mlflow"

    def __init__(self, home: Path, start: int):
        import mlflow

        kept = home / "mlflow.json"
        known = json.loads(kept.read_text())["id"] if kept.exists() else None
        self.module, self.run = mlflow, mlflow.start_run(run_id=known, run_name=home.name)
        if known is None:
            mlflow.log_dict(json.loads(_recipe(home)), "recipe.json")
        kept.write_text(json.dumps({"id": self.run.info.run_id}))

    def add(self, step: int, metrics: dict[str, float]) -> None:
        self.module.log_metrics(metrics, step=step)

    def close(self) -> None:
        self.module.end_run()


class NoTracker:
    needs = ""

    def __init__(self, home: Path, start: int): ...

    def add(self, step: int, metrics: dict[str, float]) -> None: ...

    def close(self) -> None: ...


TRACKERS = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow, "none": NoTracker}


def check_tracker(name: str) -> None:
    """Before anything is prepared.

    Raises:
      InputError: the package of that tracker is not installed.
    """
    needs = TRACKERS[name].needs
    if needs and importlib.util.find_spec(needs) is None:
        raise InputError(
            f"train.tracker={name} needs {needs}, which is not installed: pip install {needs}, or --train.tracker tensorboard"
        )


def _recipe(home: Path) -> str:
    with contextlib.suppress(FileNotFoundError):  # a candidate of a grid has none of its own
        return (home / "recipe.json").read_text()
    return "{}"


def _folder(home: Path) -> str | None:
    """Where files on this machine go; None on a bucket: where the service puts them."""
    return None if "://" in str(home) else str(home)
