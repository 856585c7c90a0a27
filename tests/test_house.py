"""The house rules of the project, read off its source."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("model", "data", "train", "sample", "serve", "convert", "compare", "plan", "launch", "configs")
# What every folder may take from the package `bothways` itself: recipe, run directory, errors, sharding.
SHARED = {
    f"bothways.{name}"
    for name in (
        "bases checkpoints chips compiler config embedding errors files flops formats locks log one_by_one platform recipes registry rundir sharding"
    ).split()
}
# What each folder may import besides. Imports go down only.
MAY_IMPORT = {
    "model": {"bothways.model"},
    "data": {"bothways.data", "bothways.errors", "bothways.locks", "bothways.platform"},
    "bothways": {"bothways.model", "bothways.data", *SHARED},
    "train": {"bothways.train", "bothways.model", "bothways.data", *SHARED},
    "sample": {"bothways.sample", "bothways.model", "bothways.data", *SHARED},
    "serve": {"bothways.serve", "bothways.sample", "bothways.model", "bothways.data", *SHARED},
    "convert": {"bothways.convert", "bothways.model", "bothways.data", *SHARED},
    "configs": {"bothways.configs", "bothways.model.config", "bothways.data.config", *SHARED},
    "plan": {"bothways.plan", "bothways.train", "bothways.sample", "bothways.model", "bothways.data", *SHARED},
    "launch": {"bothways.launch", "bothways.data", *SHARED},
    "compare": {f"bothways.{p}" for p in ("compare", "configs", "train", "sample", "model", "data")} | SHARED,
}
# The front door: the public functions and the command line stand above everything and nothing imports them.
FRONT_DOOR = ("__init__.py", "__main__.py", "cli.py")
ONE_WAY_UP = {("recipes.py", "bothways.train.loop")}  # Recipe.fit, which calls the loop when it is asked to


def sources() -> list[Path]:
    return [p for folder in ("bothways", *PACKAGES, "benchmarks") for p in sorted((ROOT / folder).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """Modules of ours that a file imports; `from a import b` counts as a.b where that is a module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    return {name for name in found if name.split(".")[0] == "bothways"}


def allowed(name: str, may: set[str]) -> bool:
    return any(name == m or name.startswith(f"{m}.") for m in may)


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_go_down_only(folder):
    for path in (ROOT / folder).rglob("*.py"):
        if folder == "bothways" and (path.name in FRONT_DOOR or path.parent.name == "commands"):
            continue
        for name in imports(path):
            upward = any(path.name == file and name.startswith(module) for file, module in ONE_WAY_UP)
            assert upward or allowed(name, MAY_IMPORT[folder]), f"{path.relative_to(ROOT)} imports {name}"


def test_every_package_has_a_rule_and_is_installed_under_one_name():
    import tomllib

    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {p.parent.name for p in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"}
    assert folders == set(MAY_IMPORT)
    assert {p.split(".")[0] for p in tools["packages"]} == {"bothways"}
    assert {f"bothways.{p}" for p in folders - {"bothways"}} | {
        "bothways",
        "bothways.commands",
        "bothways.train.objectives",
    } == set(tools["packages"])


def test_no_file_holds_two_ideas():
    for path in [*sources(), *(ROOT / "tests").rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 400, path


def test_every_module_says_what_it_is_for():
    for path in sources():
        assert ast.get_docstring(ast.parse(path.read_text())), path


WORDS = re.compile(r"surest|likeliest|learnt|chips that are not|devices that are not here", re.IGNORECASE)
"""Of CONTRIBUTING.md's list, the words that are never right in any other sense."""


def test_one_word_for_one_thing():
    written = [*ROOT.glob("*/**/*.py"), *ROOT.glob("docs/*.md"), ROOT / "README.md", *ROOT.glob("*/README.md")]
    for path in written:
        if path != Path(__file__) and not any(part.startswith(".") for part in path.relative_to(ROOT).parts):
            found = WORDS.search(path.read_text())
            assert not found, (
                f"{path.relative_to(ROOT)} writes {found.group()}: CONTRIBUTING.md, Words, has the field's word"
            )


def test_the_docs_name_what_is_there():
    """`folder/file.py: name, other` in a page means that the file has those names, and a path that it exists."""
    for page in [*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "launch/README.md"]:
        text = page.read_text()
        for path in re.findall(r"`((?:[a-z_]+/)+\w+\.py)\b", text):
            assert (ROOT / path).exists(), f"{page.name} names {path}"
        for path, names in re.findall(r"`((?:[a-z_]+/)+\w+\.py): ([\w., ]+)`", text):
            source = (ROOT / path).read_text()
            for name in re.split(r"[., ]+", names):
                assert re.search(rf"\b{name}\b", source), f"{page.name} names {name} of {path}"
