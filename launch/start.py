"""Write a launch's files, and run its commands."""

import dataclasses
import shutil
import subprocess
from pathlib import Path

from common.errors import InputError
from common.recipe import Recipe
from launch.engines import ENGINES, Launch
from launch.job import GPUs, Job, check_bucket, code_archive, job_name
from train.chips import Topology

WHERE = {
    "gcloud": "https://cloud.google.com/sdk/docs/install, then `gcloud auth login`",
    "kubectl": "`gcloud components install kubectl`, then `gcloud container clusters get-credentials CLUSTER`",
    "sky": "pip install 'skypilot[gcp]', then `sky check`",
    "sbatch": "Slurm's own; run this on a login node of the cluster",
}


@dataclasses.dataclass(frozen=True)
class Launched:
    recipe: str
    on: str
    topology: str
    name: str
    workdir: str
    """Where the run directory will be."""
    files: dict[str, str]
    commands: tuple[str, ...]
    stop: str
    started: bool


def prepare(
    recipe: Recipe, on: str, topology: str, *, bucket: str = "", slices: int = 1, name: str = "", **options: object
) -> tuple[Job, Launch]:
    """A job and what starts it; nothing is written or run.

    Raises:
      InputError: a topology, a bucket or a name that cannot be; or a recipe that cannot run on so many devices.
    """
    where = GPUs.parse(topology) if on == "slurm" or is_gpu(topology) else Topology.parse(topology, slices)
    recipe.check(where.devices_count)
    job = Job(recipe, where, job_name(recipe, name), check_bucket(bucket, on), code=code_archive(), **options)
    return job, ENGINES[on](job)


def is_gpu(topology: str) -> bool:
    kind = topology.lower().split(":")[0]
    return ":" in topology and kind.startswith(("gpu", "a1", "b1", "b2", "h1", "h2", "l4", "l40", "gb"))


def start(on: str, job: Job, launch: Launch, folder: Path, *, dry_run: bool) -> Launched:
    """Write the files into `folder` and run the commands there; with dry_run neither.

    Raises:
      InputError: a program that the commands call is not here, or a command failed.
    """
    if not dry_run:
        for program in launch.needs:
            if shutil.which(program) is None:
                raise InputError(f"--on {on} calls {program}, which is not here: {WHERE[program]}; or see --dry-run")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / job.code_name).write_bytes(job.code)
        (folder / "recipe.json").write_text(job.recipe.to_json())
        for name, text in launch.files.items():
            (folder / name).write_text(text)
        for command in launch.commands:
            code = subprocess.run(["bash", "-c", command], cwd=folder).returncode
            if code:
                raise InputError(f"`{command}` ended with {code} in {folder}; put right what it says and run launch again")
    known = {"recipe.json": job.recipe.to_json(), **launch.files}
    topology = job.topology.name
    return Launched(
        job.recipe.name, on, topology, job.name, job.workdir, known, launch.commands, launch.stop, not dry_run
    )
