"""Builds the API reference, a static site, from the docstrings.

python docs/api.py [FOLDER [MODULE ...]]    # by default every module, into site/
"""

import sys
import tomllib
import warnings
from pathlib import Path

import pdoc

ROOT = Path(__file__).parent.parent


def modules() -> list[str]:
    """Every module of every package in pyproject.toml; pdoc does not follow the mapped folders by itself. Modelling files
    are for whoever gets an export, and need torch."""
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = []
    for package in tools["packages"]:
        home = ROOT / tools["package-dir"].get(package, package.replace(".", "/"))
        stems = [p.stem for p in sorted(home.glob("*.py")) if not p.stem.startswith(("__", "modeling_"))]
        found += [package, *(f"{package}.{stem}" for stem in stems)]
    return found


if __name__ == "__main__":
    folder, *names = sys.argv[1:] or ["site"]
    warnings.filterwarnings(
        "ignore", message="Error parsing type annotation"
    )  # optax's types name what they do not import
    pdoc.render.configure(docformat="google", footer_text="bothways")
    pdoc.pdoc(*(names or modules()), output_directory=Path(folder))
