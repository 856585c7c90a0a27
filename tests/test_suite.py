"""The suite itself: what is left out is shown with its reason, and in CI parity may not be left out."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
COLLECTS = """
import os, sys
import pytest
import tests.conftest

for ci in ("true", ""):  # each in a process of its own, which has all imports
    print(ci or "alone", flush=True)
    child = os.fork()
    if not child:
        os.environ["CI"] = ci
        sys.exit(pytest.main(sys.argv[1:]))
    print("code", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_parity_without_its_packages(tmp_path):
    """Skipped with the reason where a person runs the tests; failed in CI."""
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('torch')\n")
    argv = ["-p", "no:cacheprovider", "-p", "no:schemathesis", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    argv += ["--collect-only", str(HERE / "convert" / "test_parity.py")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COLLECTS, *argv],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    in_ci, alone = done.stdout.removeprefix("true\n").split("alone\n")
    assert "code 2\n" in in_ci, done.stdout + done.stderr
    assert "in CI this must run, and it was left out" in in_ci
    assert "code 2\n" not in alone, done.stdout + done.stderr
    assert "SKIPPED [1] " in alone
    for said in (in_ci, alone):
        assert "`parity` (torch, transformers) is not installed" in said
