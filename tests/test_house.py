"""The house rules of the project, read off its source."""

import ast
import dataclasses
import functools
from pathlib import Path

import pytest

from common.config import FinetuneConfig, MeshConfig, ObjectiveConfig, OptimizerConfig, TrainConfig
from data.config import DataConfig

ROOT = Path(__file__).parent.parent
FOLDERS = ("common", "model", "data", "train", "sample", "convert", "compare", "configs", "launch", "plan", "benchmarks")
# What each folder may import. `common` holds recipe and run directory: it stands between the families and the verbs.
MAY_IMPORT = {
    "model": {"model"},
    "data": {"data", "common.errors"},
    "common": {"common", "model", "data"},
    "train": {"train", "common", "model", "data"},
    "sample": {"sample", "common", "model", "data"},
    "compare": {"compare", "configs", "train", "sample", "common", "model", "data"},
    "convert": {"convert", "common", "model", "data"},
    "configs": {"configs", "common", "model", "data"},
    "launch": {"launch", "train.chips", "data.files", "common"},
    "plan": {"plan", "train", "sample", "common", "model", "data"},
    "benchmarks": {"benchmarks", "bothways", "compare", "convert", "configs", "plan", "train", "sample", "common", "model", "data"},
}
SOURCES = [p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.py"))] + [
    ROOT / "bothways.py",
    ROOT / "verbs.py",
    ROOT / "verbs_scale.py",
    ROOT / "verbs_shared.py",
    ROOT / "verbs_train.py",
]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    return {name for name in found if name.split(".")[0] in (*FOLDERS, "bothways")}


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_go_down_only(folder):
    for path in (ROOT / folder).rglob("*.py"):
        found = imports(path)
        for name in found:
            parts = name.split(".")
            prefixes = {".".join(parts[: i + 1]) for i in range(len(parts))}
            named = name in FOLDERS and any(n.startswith(name + ".") for n in found)
            assert prefixes & MAY_IMPORT[folder] or named, f"{path.relative_to(ROOT)} imports {name}"


def test_no_file_holds_two_ideas():
    for path in [*SOURCES, *(ROOT / "tests").rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 400, path


def test_every_module_says_what_it_is_for():
    for path in SOURCES:
        assert ast.get_docstring(ast.parse(path.read_text())), path


@functools.cache
def read_outside_checks() -> set[str]:
    """Every attribute and string of the sources; not those that only `problems` and `check` look at."""
    read = set()
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                node.body = [n for n in node.body if getattr(n, "name", "") not in ("problems", "check")]
        read |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        read |= {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return read


@pytest.mark.parametrize(
    "config", [DataConfig, ObjectiveConfig, OptimizerConfig, TrainConfig, MeshConfig, FinetuneConfig]
)
def test_every_field_is_read_outside_its_own_checks(config):
    """A field that only its checks look at does nothing."""
    for field in dataclasses.fields(config):
        assert field.name in read_outside_checks(), f"{config.__name__}.{field.name} is read by nothing"
