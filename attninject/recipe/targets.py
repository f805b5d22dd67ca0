"""What chooses modules in Python and is no text: a class, a function, a regular expression that `re:` cannot hold.

A plan has the names that were found in its place, so that plans and deltas can be written and read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from attninject.errors import PatternError
from attninject.wording import listed

from .patterns import compile_pattern

TargetLike = str | type[Any] | re.Pattern[str] | Callable[[str, Any], Any]
"""A pattern, or in Python a class, a compiled regular expression for whole names, a function (name, module) → bool."""

_Rule = TypeVar("_Rule", bound=Any)


@dataclass(frozen=True)
class Target:
    """A class, a function or a regular expression in a pattern's place."""

    chooser: type[Any] | re.Pattern[str] | Callable[[str, Any], Any]

    def chooses(self, name: str, module: object) -> bool:
        """Whether it means this module, whose name is relative to the root."""
        if isinstance(self.chooser, type):
            return isinstance(module, self.chooser)
        if isinstance(self.chooser, re.Pattern):
            return self.chooser.fullmatch(name) is not None
        return bool(self.chooser(name, module))

    def __str__(self) -> str:
        if isinstance(self.chooser, type):
            return f"class {self.chooser.__name__}"
        if isinstance(self.chooser, re.Pattern):
            return repr(self.chooser)
        return f"function {getattr(self.chooser, '__name__', type(self.chooser).__name__)}"


def target(value: object) -> str | Target | None:
    """What stands in a rule for a value that is no pattern's text; None of one that chooses nothing.

    A regular expression is text where `re:` can say the same.
    """
    if isinstance(value, re.Pattern) and isinstance(value.pattern, str):
        if value.flags == re.UNICODE:
            with suppress(PatternError):
                return compile_pattern(f"re:{value.pattern}").text
        return Target(value)
    return Target(value) if callable(value) else None


def targets_of(rule: Any) -> Iterator[tuple[str, Target]]:
    """What is no text among the patterns of a `Rule`: field and target."""
    for key in ("after", "before", "replace", "exclude"):
        yield from ((key, item) for item in getattr(rule, key) or () if isinstance(item, Target))


def named(rule: _Rule, modules: Mapping[str, object]) -> _Rule:
    """The same rule with the names of what its targets choose; a target that chooses nothing stays, unless to exclude.

    `modules`: name → module, below the root.
    """
    made: dict[str, Any] = {}
    for key in dict(targets_of(rule)):
        found: dict[str | Target, None] = {}
        for item in getattr(rule, key):
            if isinstance(item, Target):
                names = [name for name, module in modules.items() if name and item.chooses(name, module)]
                found.update(dict.fromkeys(names))
                if not names and key != "exclude":
                    found[item] = None
            else:
                found[item] = None
        made[key] = tuple(found)
    return replace(rule, **made) if made else rule


def as_ending(text: str, names: Iterable[str]) -> str:
    """What a message adds where a pattern that matches no name is the ending of some: the pattern that says so."""
    longer = f"**.{text}"
    with suppress(PatternError):
        pattern = compile_pattern(longer)
        if found := [name for name in names if pattern.matches(name)]:
            return f"; {longer!r} matches {listed(found)}"
    return ""
