"""A run on machines elsewhere: what travels there, and the script that each host runs."""

import dataclasses
import gzip
import hashlib
import io
import re
import shlex
import tarfile
from pathlib import Path

from bothways.chips import CHIPS, Topology
from bothways.data.config import DataConfig
from bothways.data.files import extras_for
from bothways.errors import InputError
from bothways.recipes import Recipe

ROOT = Path(__file__).parent.parent
RETRIES = 20
"""Times a host starts training again after it ended with an error, before it gives up."""


@dataclasses.dataclass(frozen=True)
class GPUs:
    """Machines with GPUs: `h100:4x8` is 4 nodes of 8, `a100-80gb:1x8` one."""

    kind: str
    nodes: int
    per_node: int

    @classmethod
    def parse(cls, text: str) -> "GPUs":
        """Raises InputError for what is not KIND:NODESxGPUS."""
        found = re.fullmatch(r"([a-z][\w-]*):(\d+)x(\d+)", text.lower())
        if not found or int(found[2]) * int(found[3]) < 1:
            raise InputError(
                f"topology {text!r}: GPUs are given as KIND:NODESxGPUS, such as h100:4x8 or gpu:2x4; "
                f"TPUs are {', '.join(CHIPS)}"
            )
        return cls(found[1], int(found[2]), int(found[3]))

    @property
    def devices_count(self) -> int:
        return self.nodes * self.per_node

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.nodes}x{self.per_node}"


@dataclasses.dataclass(frozen=True)
class Job:
    """One launch. What it leaves behind lies under `home`, and running it again goes on with what is there."""

    recipe: Recipe
    topology: Topology | GPUs
    name: str
    """Lower case, digits and dashes: every launcher takes it."""
    bucket: str
    """gs://BUCKET[/PATH]; for Slurm a directory that all nodes share."""
    spot: bool = False
    project: str = ""
    zone: str = ""
    partition: str = ""
    hours: int = 24
    code: bytes = b""
    text: DataConfig | None = None
    """Text of this machine, which is prepared here and sent along; the recipe names what becomes of it."""

    @property
    def home(self) -> str:
        return f"{self.bucket.rstrip('/')}/{self.name}"

    @property
    def workdir(self) -> str:
        return f"{self.home}/run"

    @property
    def code_name(self) -> str:
        """Names its content, so that a changed tree never meets an old one's file."""
        return f"bothways-{hashlib.sha256(self.code).hexdigest()[:12]}.tar.gz"


def job_name(recipe: Recipe, given: str) -> str:
    """A name for the job. Raises InputError if the given one is not of lower case, digits and dashes."""
    name = given or re.sub(r"[^a-z0-9]+", "-", recipe.name.lower()).strip("-")
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name):
        raise InputError(
            f"--job {name!r}: a job's name has at most 40 lower-case letters, digits and dashes, and begins with a letter"
        )
    return name


def check_bucket(bucket: str, engine: str) -> str:
    """The bucket, or InputError that says what one looks like."""
    if engine == "slurm":
        if not re.fullmatch(r"/\S*", bucket):
            raise InputError(
                f"--bucket {bucket!r}: with --on slurm give a directory that all nodes share, such as --bucket /shared/runs; "
                "code, environment, recipe and checkpoints go there"
            )
    elif not re.fullmatch(r"gs://[a-z0-9][a-z0-9._-]{1,61}[a-z0-9](/\S*)?", bucket):
        raise InputError(
            f"--bucket {bucket!r} is not a bucket: give gs://NAME or gs://NAME/PATH, to which the machines may write; "
            "code, recipe and checkpoints go there"
        )
    return bucket.rstrip("/")


def code_archive(root: Path = ROOT) -> bytes:
    """The tree as a source archive that pip installs: the same tree gives the same bytes.

    Raises:
      InputError: this is an installed package and not a clone.
    """
    if not (root / "pyproject.toml").is_file():
        raise InputError("launch sends the source tree along, and this is an installed package; run it in a clone")
    packages = [p.parent for p in root.glob("*/__init__.py") if p.parent.name != "tests"]
    files = [root / "pyproject.toml", root / "README.md", *root.glob("*.py")]
    files += [f for p in packages for f in p.rglob("*") if f.is_file() and "__pycache__" not in f.parts]
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as tar:
        for file in sorted(files):
            info = tarfile.TarInfo(f"bothways/{file.relative_to(root)}")
            data = file.read_bytes()
            info.size, info.mode = len(data), 0o644
            tar.addfile(info, io.BytesIO(data))
    return gzip.compress(plain.getvalue(), mtime=0)


def host_script(job: Job, chips: str, *, fetch: bool = True) -> str:
    """What every host runs, and runs again after a restart: environment, code, recipe, training.

    It ends with 0 when the run is complete, with 2 when the input is bad or 3 when the loss diverged, which no retry
    heals, and with 143 after a preemption notice, the checkpoint saved. Any other end is tried again, from the last checkpoint. A file `done` or
    `failed` beside the run directory says that nothing is to be started again.

    Args:
      chips: tpu or gpu: which of bothways' extras to install, beside those that the recipe's text and a bucket need.
      fetch: get code and recipe from the bucket; else they lie in a directory that all nodes share.
    """
    q = shlex.quote
    extras = ",".join(
        (chips, *(("gcs",) if fetch or "://" in job.recipe.train.init_from else ()), *extras_for(job.recipe.data))
    )
    env = f"env-{job.code_name}-{extras.replace(',', '-')}"
    here = '"${HOME:-/root}/bothways-launch"' if fetch else q(job.home)  # a startup script may have no HOME
    get = f"gcloud storage cp {q(job.home)}/{job.code_name} {q(job.home)}/recipe.json ." if fetch else ""
    mark = f"gcloud storage cp recipe.json {q(job.home)}/" if fetch else f"touch {q(job.home)}/"

    def over(mark: str) -> str:
        """Whether a mark is there; a launcher that starts this again for ever must find that nothing is left to do."""
        return f"gcloud storage ls {q(job.home)}/{mark} >/dev/null 2>&1" if fetch else f"[ -e {q(job.home)}/{mark} ]"

    lines = [
        "#!/bin/bash",
        "set -uo pipefail",
        f"mkdir -p {here} && cd {here} || exit 1",
        get,
        f"if [ ! -e {env}/ready ]; then",
        "  command -v uv >/dev/null || python3 -m pip install --quiet --user --break-system-packages uv \\",
        "    || python3 -m pip install --quiet --user uv || exit 1",
        '  export PATH="${HOME:-/root}/.local/bin:$PATH"',
        f"  uv venv --quiet --clear --python 3.12 {env} || exit 1",
        f"  uv pip install --quiet --python {env}/bin/python "
        f'"bothways[{extras}] @ file://$PWD/{job.code_name}" || exit 1',
        f"  touch {env}/ready",
        "fi" if fetch else 'fi\n[ -n "${ONLY_ENVIRONMENT:-}" ] && exit 0',
        *(f"{over(mark)} && exit {code}" for mark, code in (("done", 0), ("failed", 2))),
        "tries=0 code=1",
        f"while [ $tries -lt {RETRIES} ]; do",
        f"  {env}/bin/bothways train recipe.json --workdir {q(job.workdir)} &",
        "  child=$!",
        "  trap 'kill -TERM $child' TERM  # a preemption notice: the run saves and ends with 143",
        "  wait $child; code=$?",
        "  if kill -0 $child 2>/dev/null; then wait $child; code=$?; fi  # the wait above ended at the signal",
        "  trap - TERM",
        "  case $code in",
        f"    0) {mark}done; exit 0 ;;",
        f"    2|3) {mark}failed; exit $code ;;  # bad input, or the loss diverged: the same would happen again",
        "    143) exit 143 ;;",
        "  esac",
        "  tries=$((tries + 1))",
        '  echo "training ended with $code; attempt $tries follows from the last checkpoint" >&2',
        "  sleep 30",
        "done",
        f"{mark}failed; exit $code",
    ]
    return "\n".join(line for line in lines if line) + "\n"
