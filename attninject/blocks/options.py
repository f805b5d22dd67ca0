"""What a block's options may be, declared once per option.

`check_args` reads these declarations for a recipe, the blocks' constructors read them for Python
callers, so both say the same. A check is a small frozen object with one method, `fault`.
"""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol


class Check(Protocol):
    """One option's range: `text` names it, `accepts` tests a value."""

    @property
    def text(self) -> str:
        """What is expected, as words that follow "expected"."""
        ...

    def accepts(self, value: Any) -> bool:
        """Whether the value is of the right type and in range."""
        ...


Options = Mapping[str, Check]
"""Option name → what it may be; a block class's `options` table."""


def _is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Bool:
    """True or False, and nothing that merely looks like it."""

    text: str = "true or false"

    def accepts(self, value: Any) -> bool:
        """Whether the value is a bool."""
        return isinstance(value, bool)


@dataclass(frozen=True)
class Int:
    """A whole number from `min` to `max` (both included, None: no end)."""

    min: int | None = None
    max: int | None = None

    @property
    def text(self) -> str:
        """The range in words."""
        return "a whole number" + _range(self.min, self.max)

    def accepts(self, value: Any) -> bool:
        """Whether the value is an int within the range."""
        return _is_int(value) and _within(value, self.min, self.max)


@dataclass(frozen=True)
class Number:
    """A finite number from `min` to `max` (both included, None: no end)."""

    min: float | None = None
    max: float | None = None

    @property
    def text(self) -> str:
        """The range in words."""
        return "a number" + _range(self.min, self.max)

    def accepts(self, value: Any) -> bool:
        """Whether the value is a number within the range."""
        return _is_number(value) and _within(value, self.min, self.max)


@dataclass(frozen=True)
class Positive:
    """A finite number above 0."""

    text: str = "a number > 0"

    def accepts(self, value: Any) -> bool:
        """Whether the value is a number above 0."""
        return _is_number(value) and value > 0


@dataclass(frozen=True)
class Odd:
    """An odd whole number ≥ 1: a kernel size that keeps the input's."""

    text: str = "an odd whole number >= 1"

    def accepts(self, value: Any) -> bool:
        """Whether the value is an odd int above 0."""
        return _is_int(value) and value >= 1 and value % 2 == 1


@dataclass(frozen=True)
class Maybe:
    """None, or what another check accepts."""

    check: Check

    @property
    def text(self) -> str:
        """The other check's words."""
        return f"null or {self.check.text}"

    def accepts(self, value: Any) -> bool:
        """Whether the value is None or accepted by the other check."""
        return value is None or self.check.accepts(value)


@dataclass(frozen=True)
class Reduction:
    """A divisor of the channels (≥ 1) or a fraction of them (between 0 and 1)."""

    text: str = "a number >= 1 (width = channels / reduction) or a fraction of the channels between 0 and 1"

    def accepts(self, value: Any) -> bool:
        """Whether the value is a positive number."""
        return _is_number(value) and value > 0


@dataclass(frozen=True)
class Count:
    """How many positions: a number of them (≥ 1), or a fraction of them (between 0 and 1)."""

    text: str = "a whole number of positions >= 1 or a fraction of them between 0 and 1"

    def accepts(self, value: Any) -> bool:
        """Whether the value is a positive whole number or a fraction."""
        return (_is_int(value) and value >= 1) or (_is_number(value) and 0 < value < 1)


@dataclass(frozen=True)
class Branches:
    """At least `min` branches, each a pair of an odd kernel size and a dilation."""

    min: int = 2

    @property
    def text(self) -> str:
        """The form in words."""
        return f"a list of at least {self.min} pairs [odd kernel size, dilation >= 1], as [[3, 1], [3, 2]]"

    def accepts(self, value: Any) -> bool:
        """Whether the value is a list of such pairs."""
        return (
            isinstance(value, list | tuple)
            and len(value) >= self.min
            and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value)
            and all(_is_int(n) and n >= 1 for pair in value for n in pair)
            and all(kernel % 2 for kernel, _ in value)
        )


class OneOf:
    """One of a few words or numbers."""

    def __init__(self, *values: str | int) -> None:
        self.values = values

    @property
    def text(self) -> str:
        """The choices in words."""
        return "one of " + ", ".join(map(str, self.values))

    def accepts(self, value: Any) -> bool:
        """Whether the value is among the choices, and of their type."""
        return any(type(value) is type(v) and value == v for v in self.values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OneOf) and self.values == other.values

    def __hash__(self) -> int:
        return hash(self.values)

    def __repr__(self) -> str:
        return f"OneOf{self.values}"


BACKEND = OneOf("auto", "plain")
"""Option `backend` of every block with a lean form: chosen by size and circumstances, or the definition."""


def _range(low: float | None, high: float | None) -> str:
    if low is not None and high is not None:
        return f" from {low} to {high}"
    if low is not None:
        return f" >= {low}"
    return f" <= {high}" if high is not None else ""


def _within(value: float, low: float | None, high: float | None) -> bool:
    return (low is None or value >= low) and (high is None or value <= high)


def nearest(word: str, words: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest of `words`, or nothing where none is close."""
    by_lower = {w.lower(): w for w in words}
    close = [by_lower[c] for c in difflib.get_close_matches(word.lower(), by_lower, n=3, cutoff=0.55)]
    return "; did you mean " + " or ".join(repr(c) for c in close) + "?" if close else ""


RESERVED = {
    "channels": "is measured at the site",
    "dims": "follows from the layout at the site",
    "init": "is a field of the rule, beside args",
}


def faults(block: str, options: Options, args: Mapping[str, Any]) -> list[tuple[str | None, str]]:
    """Everything wrong with `args`, as (argument, sentence) pairs.

    >>> faults("se", {"bias": Bool()}, {"bias": 1})
    [('bias', "block 'se': bias: expected true or false, found 1")]
    """
    found: list[tuple[str | None, str]] = []
    for name, value in args.items():
        if name in options:
            check = options[name]
            if not check.accepts(value):
                found.append((name, f"block {block!r}: {name}: expected {check.text}, found {value!r}"))
        else:
            found.append((name, unknown(block, name, options)))
    return found


def unknown(block: str, name: Any, options: Iterable[str]) -> str:
    """The sentence on an argument that the block does not have."""
    if not isinstance(name, str):
        return f"block {block!r}: the name of an argument is a string, found {name!r}"
    if name in RESERVED:
        return f"block {block!r}: {name!r} is no argument of a block: it {RESERVED[name]}"
    known = sorted(options)
    takes = f"it takes {', '.join(known)}" if known else "it takes none"
    return f"block {block!r} has no argument {name!r}{nearest(name, known)} ({takes})"
