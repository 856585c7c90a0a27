"""What installing claims, and that the library works beside files that have its folders' names."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import bothways
from tests.conftest import QUICK

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this tree, built from a copy, since building leaves files behind."""
    home = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in tracked.stdout.split():
        source, target = ROOT / name, home / "tree" / name
        if source.is_file() and name.split("/")[0] not in ("tests", "docs", "benchmarks"):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    argv = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(home),
        str(home / "tree"),
    ]
    subprocess.run(argv, check=True, capture_output=True)
    return next(home.glob("*.whl"))


def test_a_wheel_claims_one_name_and_holds_every_module(wheel):
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        (top,) = [n for n in names if n.endswith("top_level.txt")]
        assert z.read(top).decode().split() == ["bothways"]
        assert any(n.endswith("licenses/LICENSE") for n in names)
    modules = {n for n in names if n.endswith(".py")}
    folders = {p.parent.name for p in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks", "bothways"}
    wanted = {f"bothways/{p.relative_to(ROOT)}" for f in folders for p in (ROOT / f).rglob("*.py")}
    wanted |= {str(p.relative_to(ROOT)) for p in (ROOT / "bothways").rglob("*.py")}
    assert modules == wanted
    assert bothways.__version__ in wheel.name


STATE = """
import logging, os, signal, sys, threading, warnings
import flax, jax, optax, orbax.checkpoint, tensorflow_datasets as tfds
from tensorflow_datasets.core.download import downloader
from tensorflow_datasets.core.utils import tqdm_utils

loggers = [logging.getLogger(), logging.getLogger("absl"), logging.getLogger("urllib3"), logging.getLogger("jax")]

def state():
    mask = os.umask(0o022)
    os.umask(mask)
    return {
        "hooks": (sys.excepthook, sys.unraisablehook, threading.excepthook, sys.stdout, sys.stderr),
        "levels": [logger.level for logger in loggers],
        "filters": list(warnings.filters),
        "environment": dict(os.environ),
        "jax": dict(jax.config.values),
        "signals": [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)],
        "files": (mask, os.getcwd()),
        "tfds": (downloader.MAX_RETRIES, tqdm_utils._active),
    }

before = state()
import bothways
for name in bothways.__all__:
    getattr(bothways, name)
run = bothways.load("run")
print(run.sample(["the"], max_tokens=3)[0].tokens)
from bothways.data import corpora
with corpora.quiet_tfds():
    assert downloader.MAX_RETRIES == 1
print([name for name, value in state().items() if value != before[name]])
"""


def test_a_script_named_train_beside_a_model_and_a_data_package(tiny_recipe, one_device, tmp_path):
    """The most likely script there is: train.py, with model.py and data/ of its own beside it.

    What is the process's own, bothways leaves as it was: only the command line changes hooks, levels and platforms.
    """
    tiny_recipe.fit(tmp_path / "run")
    (tmp_path / "model.py").write_text("raise ImportError('a module of the user, which bothways must not import')")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").write_text("raise ImportError('this too')")
    (tmp_path / "train.py").write_text(STATE)
    env = os.environ | {"XLA_FLAGS": QUICK}
    done = subprocess.run(
        [sys.executable, "train.py"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.splitlines()) == (0, ["3", "[]"]), done.stderr


def test_every_public_name_is_there_and_importing_is_light():
    assert all(getattr(bothways, name) is not None for name in bothways.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        bothways.trian  # noqa: B018
    code = "import sys, bothways, bothways.cli; print([m for m in ('jax', 'flax', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_version_is_printed(capfd):
    assert bothways.main(["--version"]) == 0
    assert capfd.readouterr().out == f"bothways {bothways.__version__}\n"


def test_the_api_reference_is_built(tmp_path):
    pytest.importorskip("pdoc", reason="the API reference needs pdoc: pip install '.[docs]'")
    argv = [sys.executable, str(ROOT / "docs" / "api.py"), str(tmp_path), "bothways"]
    subprocess.run(argv, check=True, capture_output=True)
    page = (tmp_path / "bothways.html").read_text()
    assert all(f'id="{name}"' in page for name in ("load", "recipe", "Recipe", "InputError"))
