"""Launching: what is written is what the launchers take, every shell word is quoted, bad input is refused."""

import dataclasses
import io
import json
import re
import shlex
import subprocess
import tarfile
import tomllib

import pytest

import bothways
from bothways.config import MeshConfig, ObjectiveConfig
from bothways.configs import find
from bothways.errors import InputError
from bothways.launch.job import ROOT, GPUs, Job, code_archive, host_script
from bothways.launch.start import prepare, start
from bothways.recipes import Recipe
from tests.conftest import HANGS

GCP = {"bucket": "gs://some-bucket/runs", "project": "some-project", "zone": "us-west4-a"}


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    found = find("gpt2_small")
    data = dataclasses.replace(found.data, corpus="gs://some-bucket/text")
    return dataclasses.replace(found, data=data, mesh=MeshConfig(data=-1, fsdp=8))


def bash_accepts(script: str) -> bool:
    return subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


@pytest.mark.parametrize(
    ("on", "topology", "options"),
    [
        ("tpu", "v5e-16", {**GCP, "spot": True}),
        ("tpu", "v4:2x2x4", {**GCP, "slices": 2}),
        ("gke", "7x:2x2x4", {"bucket": GCP["bucket"]}),
        ("sky", "v6e-16", {**GCP, "spot": True}),
        ("sky", "h100:2x8", {"bucket": GCP["bucket"]}),
        ("slurm", "h100:2x8", {"bucket": "/shared/runs", "partition": "big"}),
    ],
)
def test_every_script_and_command_is_bash(recipe, on, topology, options):
    job, launch = prepare(recipe, on, topology, **options)
    scripts = [text for name, text in launch.files.items() if name.endswith(".sh")]
    manifests = [json.loads(text) for name, text in launch.files.items() if not name.endswith(".sh")]
    scripts += [m["run"] for m in manifests if "run" in m]
    scripts += [m["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]["command"][2]
                for m in manifests if m.get("kind") == "JobSet"]  # fmt: skip
    assert any(f"train recipe.json --workdir {job.workdir}" in script for script in scripts)
    assert all(bash_accepts(text) for text in [*scripts, *launch.commands, launch.stop])
    assert not bash_accepts("if true; then")


def test_a_word_with_a_space_stays_one_word(recipe):
    nasty = "gs://some-bucket/it's;rm"
    job, launch = prepare(recipe, "tpu", "v5e-16", **{**GCP, "bucket": nasty})
    upload = shlex.split(launch.commands[1])
    assert upload[-1] == f"{nasty}/gpt2-small/"
    line = next(line for line in launch.files["host.sh"].splitlines() if "bothways train" in line)
    assert shlex.split(line)[-2] == job.workdir


def run_host_script(tmp_path, recipe, body: str) -> tuple[int, list[str]]:
    """The host script with a bothways that does `body`; its exit code and the files it leaves."""
    bucket = str(tmp_path / "shared")
    job, launch = prepare(recipe, "slurm", "gpu:2x8", bucket=bucket)
    home = tmp_path / "shared" / job.name
    environment = home / f"env-{job.code_name}-gpu"
    (environment / "bin").mkdir(parents=True)
    (environment / "ready").touch()
    program = environment / "bin" / "bothways"
    program.write_text(f"#!/bin/bash\n{body}\n")
    program.chmod(0o755)
    script = launch.files["host.sh"].replace("sleep 30", "sleep 0")
    code = subprocess.run(["bash", "-c", script], capture_output=True).returncode
    return code, sorted(p.name for p in home.iterdir() if not p.name.startswith("env"))


@pytest.mark.parametrize(
    ("name", "on", "topology", "extras"),
    [
        ("shakespeare_gpt", "tpu", "v5e-8", "tpu,gcs,demo"),
        ("bible", "slurm", "h100:1x8", "gpu,demo"),
        ("shakespeare_gpt", "sky", "h100:1x8", "gpu,gcs,demo"),
    ],
)
def test_what_the_text_needs_is_installed(name, on, topology, extras):
    """Else a recipe passes every check here, and the first host finds that a package is missing."""
    where = {"bucket": "/shared"} if on == "slurm" else GCP
    files = prepare(dataclasses.replace(find(name), mesh=MeshConfig()), on, topology, **where)[1].files
    assert f'"bothways[{extras}] @ file:' in (files.get("host.sh") or json.loads(files["task.yaml"])["run"])
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras.split(",")) <= set(known)


def test_the_host_script_tries_again_after_a_crash(tmp_path, recipe):
    crash_twice = 'echo x >> tries; [ $(wc -l < tries) -ge 3 ] || exit 1; echo "$@" > asked'
    assert run_host_script(tmp_path, recipe, crash_twice) == (0, ["asked", "done", "tries"])
    asked = (tmp_path / "shared" / "gpt2-small" / "asked").read_text().split()
    assert asked == ["train", "recipe.json", "--workdir", str(tmp_path / "shared" / "gpt2-small" / "run")]


@pytest.mark.parametrize(("code", "left"), [(2, ["failed", "tries"]), (143, ["tries"])])
def test_bad_input_and_a_preemption_are_not_tried_again(tmp_path, recipe, code, left):
    assert run_host_script(tmp_path, recipe, f"echo x >> tries; exit {code}") == (code, left)
    assert (tmp_path / "shared" / "gpt2-small" / "tries").read_text() == "x\n"


def test_a_signal_reaches_the_training(tmp_path, recipe):
    """A preemption notice goes to the script; the run behind it saves and ends with 143, and so does the script."""
    saves = "trap 'touch saved; exit 143' TERM; kill -TERM $PPID; while :; do sleep 0.05; done"
    code, left = run_host_script(tmp_path, recipe, saves)
    assert code == 143
    assert left == ["saved"]


def test_queued_resource_names_the_slice(recipe):
    watch = prepare(recipe, "tpu", "v5p:2x2x4", slices=2, **GCP)[1].files["watch.sh"]
    create = next(line for line in watch.splitlines() if " create " in line)
    words = shlex.split(create.strip().removeprefix('"")').removesuffix(";;"))
    for flag, value in {"--accelerator-type": "v5p-32", "--node-count": "2", "--zone": "us-west4-a"}.items():
        assert words[words.index(flag) + 1] == value
    assert "--spot" not in words
    assert "--spot" in prepare(recipe, "tpu", "v5p-32", spot=True, **GCP)[1].files["watch.sh"]


def test_jobset_has_a_pod_for_every_host(recipe):
    text = prepare(recipe, "gke", "v5e:4x4", slices=2, bucket=GCP["bucket"], spot=True)[1].files["jobset.json"]
    spec = json.loads(text)["spec"]["replicatedJobs"][0]
    pod = spec["template"]["spec"]["template"]["spec"]
    assert (spec["replicas"], spec["template"]["spec"]["parallelism"]) == (2, 4)
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}


def test_jobset_template_is_a_valid_job(recipe):
    """Against Kubernetes' own schema of a Job; the JobSet around it is a custom resource that no package describes."""
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    manifest = json.loads(prepare(recipe, "gke", "v4:2x2x4", bucket=GCP["bucket"])[1].files["jobset.json"])
    template = manifest["spec"]["replicatedJobs"][0]["template"]
    inner = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **template}
    validate.validate(inner, validate.latest_version(), strict=True)
    inner["spec"]["parallelism"] = "four"
    with pytest.raises(validate.ValidationError):
        validate.validate(inner, validate.latest_version(), strict=True)


@pytest.mark.parametrize("topology", ["v5e-16", "h100:2x8"])
def test_task_is_one_that_skypilot_reads(recipe, topology):
    sky = pytest.importorskip("sky", reason="pip install 'skypilot[gcp]'")
    text = prepare(recipe, "sky", topology, spot=True, **GCP)[1].files["task.yaml"]
    task = sky.Task.from_yaml_config(json.loads(text))
    assert task.num_nodes == (2 if ":" in topology else 1)
    assert all(r.use_spot and r.zone == "us-west4-a" for r in task.resources)


def test_the_code_that_travels_is_this_tree():
    data = code_archive()
    assert data == code_archive()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        names = set(tar.getnames())
    assert {"bothways/pyproject.toml", "bothways/bothways/cli.py", "bothways/launch/job.py"} <= names
    assert not any("tests/" in name or "__pycache__" in name for name in names)


def test_the_recipe_that_travels_is_the_recipe(recipe, tmp_path):
    job, launch = prepare(recipe, "gke", "v5e-16", bucket=GCP["bucket"])
    output = start("gke", job, launch, tmp_path / "x", dry_run=True)
    assert not output.started
    assert not (tmp_path / "x").exists()
    path = tmp_path / "recipe.json"
    path.write_text(output.files["recipe.json"])
    assert find(str(path)) == recipe


def test_commands_run_in_order_where_the_files_lie(recipe, tmp_path):
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, corpus="shakespeare"))
    job, launch = prepare(recipe, "gke", "v5e-16", bucket=GCP["bucket"])
    runs = dataclasses.replace(launch, commands=("ls > seen", "cat recipe.json > second"), needs=("bash",))
    assert start("gke", job, runs, tmp_path / "x", dry_run=False).started
    assert {job.code_name, "jobset.json", "recipe.json"} <= set((tmp_path / "x" / "seen").read_text().split())
    assert Recipe.from_json((tmp_path / "x" / "second").read_text()) == recipe
    with pytest.raises(InputError, match="ended with 7"):
        start("gke", job, dataclasses.replace(runs, commands=("exit 7",)), tmp_path / "x", dry_run=False)


@pytest.mark.parametrize(
    ("on", "topology", "options", "said"),
    [
        ("tpu", "v5e-16", {}, "gs://NAME"),
        ("tpu", "v5e-16", {"bucket": "/not/a/bucket"}, "is not a bucket"),
        ("tpu", "v5e-16", {"bucket": "gs://some-bucket"}, "--project and --zone"),
        ("tpu", "v5e-17", GCP, "no slice of 17 chips"),
        ("tpu", "h100:2x8", GCP, "no TPU"),
        ("tpu", "7x:2x2x4", GCP, "--on gke"),
        ("slurm", "v5e-16", {"bucket": "/shared"}, "KIND:NODESxGPUS"),
        ("slurm", "h100:2x8", {"bucket": "gs://some-bucket"}, "all nodes share"),
        ("sky", "v5e-16", {**GCP, "slices": 2}, "one slice"),
        ("gke", "v5e-16", {"bucket": "gs://some-bucket", "name": "No_Good"}, "lower-case"),
        ("gke", "v5e:2x2", {"bucket": "gs://some-bucket"}, "multiply"),
        ("slurm", "h100:2x8", {"bucket": "/shared", "slices": 2}, "h100:NODESxGPUS"),
        ("sky", "h100:2x8", {**GCP, "slices": 2}, "--slices 2 is for TPUs"),
    ],
)
def test_bad_input_says_what_to_change(recipe, on, topology, options, said):
    with pytest.raises(InputError, match=said):
        prepare(recipe, on, topology, **options)


@pytest.mark.parametrize(
    ("section", "field", "here"),
    [
        ("data", "validation", "held.jsonl"),
        ("data", "tokenizer", "vocabulary/tokenizer.json"),
        ("train", "init_from", "runs/gpt2"),
    ],
)
def test_files_that_do_not_travel_are_refused(recipe, section, field, here):
    """Where machines share a disk with this one, those that lie on it may be named."""

    def launched(on, value):
        changed = dataclasses.replace(getattr(recipe, section), **{field: value})
        where = {"slurm": ("h100:2x8", "/shared"), "gke": ("v5e-16", "gs://some-bucket")}[on]
        return prepare(dataclasses.replace(recipe, **{section: changed}), on, where[0], bucket=where[1])

    for on, value in (("gke", here), ("gke", f"/shared/{here}"), ("slurm", here)):
        with pytest.raises(InputError, match="only the source tree and the recipe travel") as refused:
            launched(on, value)
        assert f"{section}.{field}={value}:" in str(refused.value)
    launched("slurm", f"/shared/{here}")
    launched("gke", "gs://some-bucket/runs/gpt2" if field == "init_from" else getattr(recipe.data, field))


def test_text_of_this_machine_is_prepared_here_and_sent_along(recipe, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("To be, or not to be.\n" * 400)
    data = dataclasses.replace(recipe.data, corpus=str(tmp_path / "a.txt"), tokenizer="char", cache=str(tmp_path / "c"))
    job, launch = prepare(dataclasses.replace(recipe, data=data), "tpu", "v5e-16", **GCP)
    assert job.recipe.data.corpus == f"{job.home}/text"
    assert f"cp --recursive text {job.home}/ &&" in launch.commands[1]
    programs = dataclasses.replace(launch, commands=(), needs=())
    start("tpu", job, programs, tmp_path / "out", dry_run=False)
    assert json.loads((tmp_path / "out" / "text" / "manifest.json").read_text())["splits"]["train"]["documents"] == 1
    monkeypatch.setattr("bothways.launch.start.MOST_SENT", 8000)
    with pytest.raises(InputError, match="bothways prepare RECIPE --to"):
        prepare(dataclasses.replace(recipe, data=data), "tpu", "v5e-16", **GCP)
    with pytest.raises(InputError, match="no file matches"):
        prepare(dataclasses.replace(recipe, data=dataclasses.replace(data, corpus="books/*.txt")), "gke", "v5e-16", **GCP)


def test_conversations_of_this_machine_are_not_sent_along(recipe, tmp_path):
    """They are not prepared: the message names the field before anything is started."""
    (tmp_path / "talks.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 40)
    there = {"corpus": "gs://some-bucket/talks.jsonl", "messages_field": "messages"}
    for field, value in (("corpus", f"{tmp_path}/talks.jsonl"), ("chat_template", "talk.jinja")):
        data = dataclasses.replace(recipe.data, **there | {field: value})
        chat = dataclasses.replace(recipe, objective=ObjectiveConfig(kind="chat"), data=data)
        with pytest.raises(InputError, match=f"and not data.{field}={value}: put it on the bucket"):
            prepare(chat, "tpu", "v5e-16", **GCP)


def test_the_files_of_a_mixture_are_sent_along_beside_what_is_prepared(recipe, tmp_path):
    (tmp_path / "a.txt").write_text("To be, or not to be.\n" * 400)
    (tmp_path / "b.txt").write_text("That is the question.\n" * 400)
    cfg = dataclasses.replace(recipe.data, tokenizer="char", cache=str(tmp_path / "c"))
    here = f"{tmp_path}/a.txt"

    def sent(*others, **fields):
        data = dataclasses.replace(cfg, corpus="", mixture=(f"{here}=0.7", *others), **fields)
        return prepare(dataclasses.replace(recipe, data=data), "tpu", "v5e-16", **GCP)

    job, launch = sent(f"{tmp_path}/b.txt=0.1,9:0.3")
    assert job.recipe.data.mixture == (f"{job.home}/text/a=0.7", f"{job.home}/text/b=0.1,9:0.3")
    start("tpu", job, dataclasses.replace(launch, commands=(), needs=()), tmp_path / "out", dry_run=False)
    text = tmp_path / "out" / "text"
    made = [json.loads((text / name / "manifest.json").read_text())["tokenizer"]["fingerprint"] for name in "ab"]
    assert made[0] == made[1]
    with pytest.raises(InputError, match="beside shakespeare, whose text is elsewhere"):
        sent("shakespeare=2")
    job, _ = sent("shakespeare=2", tokenizer=str(text / "a" / "tokenizer.model"))
    assert job.recipe.data.mixture == (f"{job.home}/text/a=0.7", "shakespeare=2")
    assert job.recipe.data.tokenizer == f"{job.home}/text/a/tokenizer.model"
    (tmp_path / "mine.spm").write_bytes((text / "a" / "tokenizer.model").read_bytes())
    job, launch = sent(tokenizer=str(tmp_path / "mine.spm"))
    start("tpu", job, dataclasses.replace(launch, commands=(), needs=()), tmp_path / "spm", dry_run=False)
    assert (tmp_path / "spm" / job.recipe.data.tokenizer.removeprefix(f"{job.home}/")).is_file()
    with pytest.raises(InputError, match="data.mixture=" + str(text / "b")):  # prepared, and not where the machines are
        sent(f"{text}/b=1")


def test_text_on_a_bucket_is_named_as_it_is(recipe):
    job, launch = prepare(recipe, "tpu", "v5e-16", **GCP)
    assert job.recipe.data.corpus == "gs://some-bucket/text"
    assert "--recursive" not in launch.commands[1]


@pytest.mark.parametrize(
    "corpus", ["c4/en", "wikipedia", "hf:allenai/c4:en", "gs://some-bucket/raw/*.jsonl.zst", "https://some.host/a.txt"]
)
@pytest.mark.parametrize(("on", "topology"), [("tpu", "v5e-16"), ("slurm", "h100:2x8")])
def test_what_each_host_would_prepare_for_itself_is_refused(recipe, on, topology, corpus):
    where = {"bucket": "/shared"} if on == "slurm" else GCP
    data = dataclasses.replace(recipe.data, corpus=corpus)
    with pytest.raises(InputError, match="not prepared; every host would fetch it") as refused:
        prepare(dataclasses.replace(recipe, data=data), on, topology, **where)
    command = re.search(r"`(bothways prepare .*?)`", str(refused.value))[1]
    assert shlex.split(command)[3:] == ["--data.corpus", corpus, "--to", f"{where['bucket']}/text", "--workers", "N"]
    mixed = dataclasses.replace(recipe.data, corpus="", mixture=("gs://some-bucket/text=0.9", f"{corpus}=0.1"))
    with pytest.raises(InputError, match="launch with the --data.mixture that it prints"):
        prepare(dataclasses.replace(recipe, data=mixed), on, topology, **where)


def test_conversations_are_read_as_they_are(recipe):
    """`prepare` takes none, so they may lie on the bucket as they were written."""
    data = dataclasses.replace(recipe.data, corpus="gs://some-bucket/chats.jsonl", messages_field="messages")
    chat = dataclasses.replace(recipe, data=data, objective=ObjectiveConfig(kind="chat"))
    assert prepare(chat, "tpu", "v5e-16", **GCP)[0].recipe.data == data


def test_a_folder_on_the_bucket_without_prepared_text_is_refused_before_anything_is_sent(recipe, tmp_path):
    data = dataclasses.replace(recipe.data, corpus="memory://raw")
    job, launch = prepare(dataclasses.replace(recipe, data=data), "tpu", "v5e-16", **GCP)
    sent = tmp_path / "sent"
    launch = dataclasses.replace(launch, commands=(f"touch {sent}",), needs=())
    with pytest.raises(InputError, match="memory://raw: not prepared"):
        start("tpu", job, launch, tmp_path / "x", dry_run=False)
    assert not sent.exists()
    assert not (tmp_path / "x").exists()


def test_a_missing_launcher_is_named(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    job, launch = prepare(recipe, "tpu", "v5e-16", **GCP)
    with pytest.raises(InputError, match="calls gcloud, which is not here"):
        start("tpu", job, launch, tmp_path / "x", dry_run=False)
    assert not (tmp_path / "x").exists()


def test_the_command_line_prints_what_it_would_do(capfd):
    argv = ["launch", "gpt2_small", "--on", "slurm", "--topology", "h100:2x8", "--bucket", "/shared"]
    argv += ["--dry-run", "--data.corpus", "/shared/text"]
    assert bothways.main([*argv, "--json", "--mesh.fsdp", "8"]) == 0
    output = json.loads(capfd.readouterr().out)
    assert (output["started"], output["workdir"]) == (False, "/shared/gpt2-small/run")
    assert json.loads(output["files"]["recipe.json"])["mesh"]["fsdp"] == 8
    assert bothways.main([*argv, "--train.stepz", "3"]) == 2
    capfd.readouterr()
    assert bothways.main(argv) == 0
    shown = capfd.readouterr().out
    assert "sbatch --chdir=/shared/gpt2-small" in shown
    assert bash_accepts(shown.split("# ---- in ")[1].split("\n", 1)[1])


@pytest.mark.parametrize("code", [2, 3])
def test_what_no_retry_heals_is_not_tried_again(tmp_path, code):
    """The script itself, with a `bothways` that ends so: bad input, or a loss that diverged."""
    runs = tmp_path / "runs.txt"
    job = Job(find("gpt2_small"), GPUs.parse("h100:1x1"), "j", str(tmp_path), code=b"x")
    script = host_script(job, "gpu", fetch=False)
    env = tmp_path / "j" / f"env-{job.code_name}-gpu"
    (env / "bin").mkdir(parents=True)
    (env / "ready").touch()
    program = env / "bin" / "bothways"
    program.write_text(f"#!/bin/bash\necho run >> {runs}\nexit {code}\n")
    program.chmod(0o755)
    for _ in range(2):  # a launcher that starts it again finds the mark
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False, timeout=HANGS)
        assert done.returncode in (2, code), done.stderr
    assert runs.read_text() == "run\n"
    assert (tmp_path / "j" / "failed").exists()
