"""What a run shows of itself: a progress bar, metrics.jsonl, a tracker, a plot."""

import io
import json
import math
import time
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bothways import rundir
from bothways.files import write_whole
from bothways.log import console, log
from bothways.train.trackers import TRACKERS, Tracker

UPLOAD_EVERY = 30
"""Seconds between two writings of metrics.jsonl to a bucket, whose files cannot be added to."""


class Reporter:
    """Writes metrics of a run, from one process; the others hold one that is silent.

    Args:
      home: the run directory.
      steps: where the run ends.
      start: where it starts or resumes; later lines of an earlier attempt are dropped.
      active: whether this process writes.
      tracker: a name in trackers.TRACKERS.
    """

    def __init__(self, home: Path, steps: int, start: int, active: bool, tracker: str = "tensorboard"):
        self.active, self.home, self.start, self.tracker = active, home, start, tracker
        self.path = home / "metrics.jsonl"
        if not active:
            return
        self._drop_lines_after(start)
        self.bucket = rundir.on_bucket(home)
        self.lines = (
            io.StringIO(self.path.read_text() if self.path.exists() else "") if self.bucket else self.path.open("a")
        )
        self.lines.seek(0, io.SEEK_END)
        self.uploaded = time.monotonic()
        self.events: Tracker | None = None
        columns = [
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
        ]
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.progress.add_task("training", total=steps, completed=start, shown="compiling")
        self.progress.start()

    def _drop_lines_after(self, step: int) -> None:
        if not self.path.exists():
            return
        text, kept = self.path.read_bytes().decode(errors="replace"), []
        for line in text.splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (json.JSONDecodeError, KeyError, TypeError):
                continue  # the line that a kill cut short
        if (left := "".join(line + "\n" for line in kept)) != text:
            write_whole(self.path, left)  # on a full disk the curves so far stay

    def log(self, step: int, metrics: dict[str, float], shown: str) -> None:
        """One line of metrics, and what the progress bar says beside it."""
        if not self.active:
            return
        known = {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # JSON has no NaN
        self.lines.write(json.dumps({"step": step, **known}) + "\n")
        self.lines.flush()
        if time.monotonic() - self.uploaded > UPLOAD_EVERY:
            self.upload()
        self.progress.update(self.task, completed=step, shown=shown)
        if not console.is_terminal:
            log(f"step {step}: {shown}")
        if self.events is None:
            self.events = TRACKERS[self.tracker](self.home, self.start)
        self.events.add(step, metrics)

    def upload(self) -> None:
        """Bring metrics.jsonl up to date on a bucket."""
        if self.active and self.bucket:
            self.path.write_text(self.lines.getvalue())
            self.uploaded = time.monotonic()

    def note(self, message: str) -> None:
        if self.active:
            log(message)

    def advance(self, step: int) -> None:
        if self.active:
            self.progress.update(self.task, completed=step)

    def close(self) -> None:
        if self.active:
            self.progress.stop()
            self.upload()
            self.lines.close()
            if self.events:
                self.events.close()

    def plot(self) -> None:
        """loss.png: training loss by step, held-out bits per byte or loss beside it."""
        if not self.active:
            return
        import matplotlib

        matplotlib.use("agg")
        import matplotlib.pyplot as plt

        rows = [json.loads(line) for line in self.path.read_text().splitlines()]
        key = "eval_bits_per_byte" if any("eval_bits_per_byte" in r for r in rows) else "eval_loss"
        train, held = ([(r["step"], r[name]) for r in rows if r.get(name) is not None] for name in ("loss", key))
        if not train:
            return
        figure, left = plt.subplots(figsize=(8, 4.5), layout="constrained")
        left.plot(*zip(*train, strict=True), color="tab:blue", alpha=0.35, linewidth=1)
        window = max(1, len(train) // 50)
        smooth = [
            sum(v for _, v in train[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(train))
        ]
        left.plot([s for s, _ in train], smooth, color="tab:blue", label="training loss")
        left.set(xlabel="step", ylabel="training loss, nats per token", title=self.home.name)
        left.grid(alpha=0.3)
        handles, labels = left.get_legend_handles_labels()
        if held:
            right = left.twinx()
            label = "held-out " + key.removeprefix("eval_").replace("_", " ")
            right.plot(*zip(*held, strict=True), color="tab:orange", marker="o", markersize=3, label=label)
            for name in sorted({name for r in rows for name in r if name.startswith(f"{key}/")}):
                of = [(r["step"], r[name]) for r in rows if r.get(name) is not None]
                right.plot(*zip(*of, strict=True), linewidth=1, linestyle="--", label=name.removeprefix("eval_"))
            right.set_ylabel(f"{label} (last {held[-1][1]:.3f})")
            more = right.get_legend_handles_labels()
            handles, labels = handles + more[0], labels + more[1]
        left.legend(handles, labels)
        out = io.BytesIO()
        figure.savefig(out, dpi=120, format="png")
        plt.close(figure)
        write_whole(self.home / "loss.png", out.getvalue())
