"""Recipes: a module here holds `recipes`, a dict from name to Recipe. And how one is found by its name."""

import dataclasses
import difflib
import importlib
import importlib.util
import pkgutil
from pathlib import Path

from bothways.errors import InputError
from bothways.files import read_json
from bothways.recipes import Recipe


def names() -> dict[str, Recipe]:
    """Every recipe in configs/, by name. A module there holds `recipes`, a dict."""
    found: dict[str, Recipe] = {}
    for module in pkgutil.iter_modules(__path__):
        recipes = importlib.import_module(f"bothways.configs.{module.name}").recipes
        found.update({name: dataclasses.replace(recipe, name=name) for name, recipe in recipes.items()})
    return found


def find(name: str) -> Recipe:
    """The recipe of this name in configs/, or the one in this Python file, or a run's recipe.json.

    Raises:
      InputError: there is none; says which names come near.
    """
    if name.endswith(".py"):
        return _from_file(Path(name))
    if name.endswith(".json"):
        if not Path(name).is_file():
            raise InputError(f"no recipe file {name}")
        return Recipe.from_values(read_json(Path(name)), f"{name}: recipe")
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(sorted(known))}"
        raise InputError(f"no recipe {name!r} in configs/; {hint} A path to a Python file works too.")
    return known[name]


def _from_file(path: Path) -> Recipe:
    if not path.is_file():
        raise InputError(f"no recipe file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        raise InputError(f"the recipe file {path} fails: {type(e).__name__}: {e}") from e
    recipes = getattr(module, "recipes", None)
    if not isinstance(recipes, dict) or not recipes:
        raise InputError(f"{path} defines no `recipes`: a dict from name to Recipe, as in configs/shakespeare.py")
    if len(recipes) > 1 and path.stem not in recipes:
        raise InputError(f"{path} holds {len(recipes)} recipes and none is called {path.stem}")
    name = path.stem if path.stem in recipes else next(iter(recipes))
    return dataclasses.replace(recipes[name], name=name)
