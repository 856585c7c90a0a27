"""Write a launch's files, and run its commands."""

import dataclasses
import shutil
import subprocess
from pathlib import Path

from bothways.chips import Topology
from bothways.data.files import looks_like_files
from bothways.errors import InputError
from bothways.launch.engines import ENGINES, Launch
from bothways.launch.job import GPUs, Job, check_bucket, code_archive, job_name
from bothways.recipes import Recipe

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
      InputError: a topology, a bucket or a name that cannot be; or a recipe that cannot run on so many devices, or whose
        files stay here.
    """
    where = GPUs.parse(topology) if on == "slurm" or is_gpu(topology) else Topology.parse(topology, slices)
    if slices > 1 and isinstance(where, GPUs):
        raise InputError(f"--slices {slices} is for TPUs; more GPUs are more nodes: --topology {where.kind}:NODESxGPUS")
    recipe.check(where.devices_count)
    if left := files_left_here(recipe, shared=on == "slurm"):
        how = (
            "give absolute paths that all nodes see"
            if on == "slurm"
            else "name a dataset of TFDS, a tokenizer that is learnt there, a run on a bucket; or train there by hand"
        )
        raise InputError(f"only the source tree and the recipe travel, and not {', '.join(left)}: {how}")
    job = Job(recipe, where, job_name(recipe, name), check_bucket(bucket, on), code=code_archive(), **options)
    return job, ENGINES[on](job)


def files_left_here(recipe: Recipe, *, shared: bool) -> list[str]:
    """The fields that name files which the machines elsewhere do not see, with their values.

    Args:
      shared: the machines have a disk in common with this one; an absolute path may be there.
    """
    data, start = recipe.data, recipe.train.init_from
    found = {
        "data.corpus": data.corpus if looks_like_files(data.corpus) else "",
        "data.validation": data.validation,
        "data.tokenizer": data.tokenizer if data.tokenizer.endswith((".model", ".json")) else "",
        "train.init_from": "" if "://" in start else start,
    }
    return [f"{k}={v}" for k, v in found.items() if v and not (shared and Path(v).expanduser().is_absolute())]


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
                raise InputError(
                    f"`{command}` ended with {code} in {folder}; put right what it says and run launch again"
                )
    known = {"recipe.json": job.recipe.to_json(), **launch.files}
    topology = job.topology.name
    return Launched(
        job.recipe.name, on, topology, job.name, job.workdir, known, launch.commands, launch.stop, not dry_run
    )
