"""`bothways launch`: starts a recipe on a slice or a cluster."""

import dataclasses
from pathlib import Path
from typing import Literal

from bothways.commands.shared import emit, parse_recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """Start a recipe on other machines through an existing launcher; it resumes by itself when it is preempted."""

    on: Literal["tpu", "gke", "sky", "slurm"]
    """tpu: a queued resource of Cloud TPU; gke: a JobSet; sky: a managed job of SkyPilot; slurm: sbatch."""
    topology: str
    """TPUs (tpu, gke, sky), such as v5e-256 or v5p:4x4x8; GPUs (sky, slurm), such as h100:4x8, 4 nodes of 8, or a100-80gb:1x8."""
    bucket: str = ""
    """gs://BUCKET[/PATH], or for slurm a shared directory: code, recipe and run directory go into its folder NAME."""
    slices: int = 1
    """Number of TPU slices."""
    job: str = ""
    """NAME of the job; by default that of the recipe. The same name resumes the same run."""
    spot: bool = False
    """Use cheaper machines that may be preempted."""
    project: str = ""
    """Google Cloud project (tpu)."""
    zone: str = ""
    """Google Cloud zone (tpu, sky)."""
    partition: str = ""
    """Slurm partition."""
    hours: int = 24
    """Slurm time limit, after which the job goes back into the queue."""
    dry_run: bool = False
    """Print files and commands; write and run nothing."""
    json: bool = False
    """Print one JSON object."""


def launch(argv: list[str]) -> None:
    """Start a recipe on a slice or a cluster."""
    example = (
        "bothways launch gpt2_small --on tpu --topology v5e-16 --bucket gs://NAME --project P --zone Z "
        "--data.corpus 'books/*.txt' [--dry-run]"
    )
    recipe, o = parse_recipe("launch", argv, LaunchOptions, example)
    from bothways.launch.start import prepare, start

    names = ("bucket", "slices", "spot", "project", "zone", "partition", "hours")
    job, ready = prepare(recipe, o.on, o.topology, name=o.job, **{name: getattr(o, name) for name in names})
    folder = Path("launches") / job.name
    done = start(o.on, job, ready, folder, dry_run=o.dry_run)
    if o.dry_run and not o.json:
        for name, text in done.files.items():
            print(f"# ---- {folder}/{name}\n{text.rstrip()}\n")
        print(f"# ---- in {folder}, which also holds {job.code_name}, this tree")
        print("\n".join(done.commands))
    emit(done, o.json, f"# the run: {done.workdir}\n# to stop: {done.stop}")
