"""The public names themselves: what there is, its signature, and the tree of errors."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attninject as ai

from .registry import case


def _signatures(of: Any) -> Iterator[str]:
    for name in of.__all__:
        found = getattr(of, name)
        if inspect.isfunction(found):
            yield f"{name}{inspect.signature(found)}"
        elif inspect.isclass(found):
            members = [m for m in vars(found) if not m.startswith("_")]
            yield f"class {name}: {', '.join(members)}"
        else:
            yield name


@case("names: attninject")
def _(folder: Path) -> str:
    return "\n".join(_signatures(ai))


@case("names: attninject.training")
def _(folder: Path) -> str:
    return "\n".join(_signatures(ai.training))


@case("names: errors")
def _(folder: Path) -> str:
    def below(error: type) -> Iterator[str]:
        bases = ", ".join(b.__name__ for b in error.__bases__)
        yield f"{error.__name__}({bases}): {(error.__doc__ or '').splitlines()[0]}"
        for other in error.__subclasses__():
            if other.__module__.partition(".")[0] == "attninject" and not other.__name__.startswith("_"):
                yield from below(other)

    return "\n".join(below(ai.AttnInjectError))


@case("names: a name that there is not")
def _(folder: Path) -> Any:
    return ai.injekt


@case("names: a name that there is not in training")
def _(folder: Path) -> Any:
    return ai.training.tune


@case("names: shipped recipes")
def _(folder: Path) -> str:
    return "\n".join(f"{name}: {ai.load_recipe(name).to_dict()}" for name in ai.list_recipes())
