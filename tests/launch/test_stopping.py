"""What a launch prints while it runs, and how it is watched and stopped."""

import dataclasses
import json
import subprocess

import pytest

import bothways
from bothways.config import MeshConfig
from bothways.configs import find
from bothways.launch.start import prepare, start
from tests.conftest import HANGS

GCP = {"bucket": "gs://some-bucket", "project": "some-project", "zone": "us-west4-a"}
GCLOUD = """#!/bin/bash
case "$*" in
  *" cp "*) echo "Copying $4" ;;
  *" ls "*/done) [ -e "$STATE/done" ] ;;
  *" ls "*) false ;;
  *describe*) [ -e "$STATE/asked" ] && touch "$STATE/done" && echo ACTIVE ;;
  *create*) cat host.sh > "$STATE/asked"; echo Created ;;
esac
"""
"""A slice that is done as soon as its host script was read."""


@pytest.fixture
def state(tmp_path, monkeypatch):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in {"gcloud": GCLOUD, "sleep": "#!/bin/bash\n"}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tmp_path / "state").mkdir()
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    monkeypatch.setenv("STATE", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "state"


def test_watching_goes_on_from_any_directory(state, tmp_path):
    recipe = find("gpt2_small")
    recipe = dataclasses.replace(
        recipe, data=dataclasses.replace(recipe.data, corpus="shakespeare"), mesh=MeshConfig(data=16)
    )
    job, launch = prepare(recipe, "tpu", "v5e-16", **GCP)
    start("tpu", job, dataclasses.replace(launch, commands=(), needs=()), tmp_path / "launches" / "a", dry_run=False)
    done = subprocess.run(["bash", "launches/a/watch.sh"], capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    assert (state / "asked").read_text() == launch.files["host.sh"]


def test_how_to_stop_is_logged_before_the_commands_and_json_alone_is_printed(state, capfd):
    argv = ["launch", "gpt2_small", "--on", "tpu", "--topology", "v5e-16", "--data.corpus", "shakespeare", "--json"]
    argv += [word for name, value in GCP.items() for word in (f"--{name}", value)]
    assert bothways.main([*argv, "--mesh.data", "16"]) == 0
    shown = capfd.readouterr()
    assert json.loads(shown.out)["started"]
    lines = shown.err.splitlines()
    stop = next(i for i, line in enumerate(lines) if line.startswith("# to stop: gcloud compute tpus"))
    assert "queued-resources delete gpt2-small" in lines[stop]
    assert stop < next(i for i, line in enumerate(lines) if line.startswith("Copying"))
