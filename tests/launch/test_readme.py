"""launch/README.md from zero: every command of it is run, or is one of those that need another's machines.

A model of one small layer stands in for GPT-2 small; `prepare` runs in one process. Left out is `plan`, which tests/plan holds.
"""

import dataclasses
import json
import re
import shlex
import subprocess

import pytest

import bothways
from bothways.config import MeshConfig
from bothways.launch.job import ROOT
from tests.launch.test_rehearsal import RECIPE, lines

ELSEWHERE = ("pip", "kubectl", "sky", "squeue", "gcloud container", "bothways plan")
"""How commands begin that are not run here."""


def commands(section: str) -> list[str]:
    """The lines of a section that are indented as code, those that end in a backslash joined with the next."""
    text = (ROOT / "launch" / "README.md").read_text().split(f"\n## {section}")[1].split("\n## ")[0]
    code = re.findall(r"\n\n((?: {4,}\S.*\n)+)", text)
    return [line.strip() for block in code for line in re.sub(r"\\\n\s+", "", block).splitlines()]


def test_from_zero_with_ones_own_text(cloud, capfd):
    train = dataclasses.replace(RECIPE.train, steps=3, batch_size=16)
    model = dataclasses.replace(RECIPE.model, context_length=64)
    recipe = dataclasses.replace(RECIPE, name="gpt2_small", model=model, train=train, mesh=MeshConfig())
    (cloud.home / "small.json").write_text(recipe.to_json())
    (cloud.home / "books").mkdir()
    import zstandard

    for name, count in (("a", 90), ("b", 60)):
        (cloud.home / "books" / f"{name}.jsonl.zst").write_bytes(zstandard.compress(lines(count).encode()))
    run, printed = [], {}
    for line in commands("GPT-2 small on v5e-16"):
        run.append(line.split()[0])
        if line.startswith(ELSEWHERE):
            continue
        line = line.replace("BUCKET", "our-bucket").replace("PROJECT", "p").replace("gpt2_small", "small.json")
        line = line.replace("--workers 8", "--workers 1")
        if line.startswith("bothways "):
            assert bothways.main(shlex.split(line)[1:]) == 0, line
        else:
            done = subprocess.run(["bash", "-o", "pipefail", "-c", line], text=True, stderr=subprocess.STDOUT)
            assert done.returncode == 0, line
        printed[line] = capfd.readouterr().out
    assert run.count("bothways") == 5
    shown = {
        key: next(text for line, text in printed.items() if key in line)
        for key in ("--dry-run", "metrics", "ssh", "sample")
    }
    assert "startup-script=host.sh" in shown["--dry-run"]
    assert [json.loads(line)["step"] for line in shown["metrics"].splitlines()][-1] == 3
    assert "3 steps in" in shown["ssh"]
    assert shown["sample"].startswith("The meaning of life is")
    assert not list(cloud.home.glob("gpt2-small/state"))  # the slice is given back


@pytest.mark.parametrize("section", ["On GKE", "On Slurm", "With SkyPilot"])
def test_the_other_launchers_commands_are_accepted(section, capfd):
    ours = []
    for line in commands(section):
        if line.startswith("bothways launch"):
            ours.append(line.replace("BUCKET", "our-bucket"))
            assert bothways.main([*shlex.split(ours[-1])[1:], "--dry-run"]) == 0, ours[-1]
        else:
            assert line.startswith(ELSEWHERE), line
    assert len(ours) == 1
    assert "train recipe.json" in capfd.readouterr().out
