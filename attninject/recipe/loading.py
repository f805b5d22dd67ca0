"""The ways in: a shipped name, a path, a text, a dict or keyword arguments become a `Recipe`."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack, cast

from attninject.errors import Fault, RecipeError
from attninject.wording import did_you_mean, quoted

from .checks import plain_value
from .fields import recipe_from, rule_from
from .report import BAD, Report
from .rules import Recipe, RecipeFields, Rule, RuleFields, explains_fields, tree_of, written
from .yaml_text import read_file, read_yaml

RecipeLike = Recipe | Rule | str | os.PathLike[str] | RecipeFields | RuleFields | Mapping[str, Any]
"""What stands for a recipe: itself, one rule, a shipped name, a path, or a dict (of a recipe or of one rule)."""


def load_recipe(source: RecipeLike) -> Recipe:
    """A recipe from a shipped name, a path, a dict (a whole recipe or a single rule), or itself.

    A string is a path if it ends in .yaml or .yml, holds a separator, or names an existing file.

    Raises:
        RecipeError: every fault of the file or dict, each with its place.
    """
    if isinstance(source, Recipe):
        return source
    if isinstance(source, Rule):
        return Recipe(source.child_name, (source,))
    if isinstance(source, Mapping):
        return _recipe_from_mapping(source)
    if isinstance(source, str) and "\n" in source:
        raise RecipeError([Fault("a text of several lines is no path; read it with parse_recipe(text)")])
    if isinstance(source, str) and not _looks_like_path(source):
        return _shipped(source)
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        if isinstance(path, str):
            return parse_recipe(read_file(path, recipe_names()), path)
    found = type(source).__name__
    raise RecipeError([Fault(f"expected a recipe's name, a path, a dict or a Recipe, found {found}")])


def parse_recipe(text: str | bytes, file: str = "<string>") -> Recipe:
    """A recipe from YAML text; `file` is what the faults call it.

    Raises:
        RecipeError: every fault of the text, each with line and column.
    """
    report = Report(file)
    root = read_yaml(text, report)
    recipe = None if root is None else recipe_from(root, report, default_name=Path(file).stem.strip("<>"))
    report.raise_if_any()
    assert recipe is not None
    return recipe


@explains_fields
def rule_from_fields(**rule: Unpack[RuleFields]) -> Rule:
    """A rule from keyword arguments: `rule_from_fields(block="se", after="layer[1-4].*.bn3")`.

    Args:
        **rule: the fields, of which None means "not given":

    Raises:
        RecipeError: all that is wrong with the fields.
    """
    if all(value is None for value in rule.values()):
        text = "nothing to inject: give a recipe, or block= with one of after=, before=, place= and replace="
        raise RecipeError([Fault(text)])
    report = Report()
    made = rule_from(tree_of({written(name): value for name, value in rule.items()}, report), report)
    report.raise_if_any()
    assert made is not None
    return made


def parse_value(text: str) -> Any:
    """One block argument from a command line, read as in a recipe: `8`, `true`, `[1, 2]`, `1e-5`."""
    report = Report("<value>")
    node = read_yaml(text, report, "value", "a value")
    value = BAD if node is None else plain_value(node, report)
    report.raise_if_any()
    return value


def recipe_names() -> list[str]:
    """The sorted names of the recipes shipped with the package."""
    folder = _shipped_folder()
    return sorted(path.stem for path in folder.glob("*.yaml")) if folder else []


def _shipped_folder() -> Path | None:
    """`_recipes` in an installed wheel, `recipes` beside the package in a checkout."""
    package = Path(__file__).parents[1]
    if (package / "_recipes").is_dir():
        return package / "_recipes"
    checkout = package.parent
    beside = (checkout / "recipes").is_dir() and (checkout / "pyproject.toml").is_file()
    return checkout / "recipes" if beside else None


def _shipped(name: str) -> Recipe:
    names, folder = recipe_names(), _shipped_folder()
    if folder is None or name not in names:
        hint = did_you_mean(name, names) or f"; the shipped recipes are {', '.join(names)}"
        raise RecipeError([Fault(f"no shipped recipe {quoted(name)}{hint}")])
    path = str(folder / f"{name}.yaml")
    return _parsed(read_file(path), path)


_parsed = functools.lru_cache(parse_recipe)  # a recipe is immutable, so that one serves all plans


def _looks_like_path(text: str) -> bool:
    separators = os.sep + (os.altsep or "") + "/"
    return (
        text.endswith((".yaml", ".yml")) or any(char in text for char in separators) or os.path.isfile(text)
    )


def _recipe_from_mapping(source: Mapping[str, Any]) -> Recipe:
    if "rules" not in source and "block" in source:
        fields = {str(key): value for key, value in source.items()}
        return load_recipe(rule_from_fields(**cast(RuleFields, fields)))
    report = Report()
    recipe = recipe_from(tree_of(source, report), report, default_name="recipe")
    report.raise_if_any()
    assert recipe is not None
    return recipe
