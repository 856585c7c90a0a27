"""The suite itself: what is left out is shown with its reason, and in CI parity may not be left out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize(("ci", "word"), [("true", "in CI this must run, and it was left out"), ("", "SKIPPED [1] ")])
def test_parity_without_its_packages(ci, word, tmp_path):
    """Skipped with the reason where a person runs the tests; failed in CI."""
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('torch')\n")
    env = os.environ | {"PYTHONPATH": str(tmp_path), "CI": ci}
    argv = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:schemathesis", "--collect-only"]
    done = subprocess.run(
        [*argv, str(HERE / "convert" / "test_parity.py")],
        env=env,
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode == 2) == bool(ci), done.stdout
    assert word in done.stdout
    assert "`parity` (torch, transformers) is not installed" in done.stdout
