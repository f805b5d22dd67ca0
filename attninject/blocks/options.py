"""What a block's options may be: declared once, by the annotations of its constructor.

`declared` reads them, and whatever says something of an option has it from there: a recipe's check
(`registry.check_args`), the constructor's own, every message, `repr`, the catalogue. An annotation says what
is accepted in one of these ways:

| annotation | accepted |
|---|---|
| `bool` | True or False |
| `Literal["avg", "max"]`, `Literal[3, 5, 7]` | one of these |
| `Annotated[int, Odd()]` | what the check accepts, a class of this file or of the block's own |
| any of them `| None` | None besides |
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    Protocol,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    runtime_checkable,
)

from attninject import wording

Init = Literal["identity", "paper", "blend"]
"""How a block starts: the model's function unchanged, as published, or x + α(f(x) − x) with α = 0."""
INITS: tuple[Init, ...] = get_args(Init)
Backend = Literal["auto", "plain"]
"""Option `backend` of every block with a fast form: chosen by size and circumstances, or the definition."""
BACKENDS: tuple[Backend, ...] = get_args(Backend)


@runtime_checkable
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
"""Option name → what it may be; a block class's `options`."""


def _is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Anything:
    """Whatever the constructor takes: an option that is declared by none of the ways above."""

    text: str = "anything"

    def accepts(self, value: Any) -> bool:
        """True."""
        return True


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


# --- reading a constructor --------------------------------------------------------------------


RESERVED = {
    "channels": "is measured at the site",
    "dims": "follows from the layout at the site",
    "init": "is a field of the rule, beside args",
    "other_channels": "is measured at the second value, which `with` names",
}
"""What every block's constructor takes and no recipe gives, and why not."""


def declared(constructor: Callable[..., None], inherited: Options | None = None) -> dict[str, Check]:
    """The options of an `__init__`: its arguments behind self and the channels, but for those in `RESERVED`.

    Those that the class inherits are options too, and stay as they are where the annotation says nothing.

    >>> def __init__(self, channels: int, *, dims: int = 2, gate: bool = True, k: Annotated[int, Odd()] = 3): ...
    >>> declared(__init__)
    {'gate': Bool(text='true or false'), 'k': Odd(text='an odd whole number >= 1')}
    """
    try:
        hints = get_type_hints(constructor, include_extras=True)
    except NameError:  # a class from elsewhere, with annotations that only a type checker can follow
        hints = {}
    behind = list(inspect.signature(constructor).parameters.values())[2:]
    named = [p.name for p in behind if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    own = {name: check_of(hints.get(name)) for name in named if name not in RESERVED}
    said = {name: check for name, check in own.items() if check != Anything()}
    return {**own, **(inherited or {}), **said}


def check_of(annotation: Any) -> Check:
    """What an annotation accepts, by the table at the top of this file."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return next((part for part in parts[1:] if isinstance(part, Check)), check_of(parts[0]))
    if origin is Literal:
        return OneOf(*parts)
    if origin in (Union, UnionType) and len(parts) == 2 and type(None) in parts:
        return Maybe(check_of(parts[0] if parts[1] is type(None) else parts[1]))
    return Bool() if annotation is bool else Anything()


def given(scope: Mapping[str, Any]) -> dict[str, Any]:
    """What a constructor was called with, from its `locals()`: every argument by name, but not `self`.

    Called in the constructor's first line, where there are no other locals yet.
    """
    return {name: value for name, value in scope.items() if name not in ("self", "__class__")}


# --- faults -----------------------------------------------------------------------------------


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
    close = wording.nearest(word, words)
    return "; did you mean " + " or ".join(map(repr, close)) + "?" if close else ""


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
