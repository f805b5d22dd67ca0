"""Nodes that know where they stand, and the report that collects every fault found at them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attninject.errors import Fault, RecipeError
from attninject.wording import clipped, quoted

BAD: Any = object()
"""The value of what has been reported already."""


class Report:
    """Collects faults; `within` adds to the label in front of the messages, not to the list."""

    def __init__(
        self,
        file: str | None = None,
        label: str = "",
        faults: dict[Fault, None] | None = None,
        error: type[RecipeError] = RecipeError,
    ) -> None:
        self.file, self.label, self.error = file, label, error
        self.faults: dict[Fault, None] = {} if faults is None else faults  # ordered, without duplicates

    def within(self, part: str) -> Report:
        """The same report for a part of the text."""
        return Report(self.file, f"{self.label}, {part}" if self.label else part, self.faults, self.error)

    def add(self, node: Node, message: str) -> Any:
        """Record a fault at the node; returns `BAD` for the caller to hand on."""
        text = f"{self.label}: {message}" if self.label else message
        self.faults[Fault(text, self.file, node.line, node.column)] = None
        return BAD

    def expected(self, node: Node, what: str, hint: str = "") -> Any:
        """Record that the node is of the wrong kind; silent about what was reported before."""
        if node.value is not BAD:
            self.add(node, f"expected {what}, found {describe(node)}{hint}")
        return BAD

    def raise_if_any(self) -> None:
        """Raise the report's error with all faults, in the order of the text."""
        if self.faults:
            raise self.error(sorted(self.faults, key=lambda fault: (fault.line or 0, fault.column or 0)))


@dataclass(frozen=True, eq=False)
class Node:
    """A value and where it stands. Lists hold nodes, dicts hold (key node, value node) by key."""

    value: Any
    line: int | None = None
    column: int | None = None
    text: str | None = None  # a plain YAML scalar as it was typed
    size: int = 1  # values in it, aliases expanded
    height: int = 0  # levels of lists and mappings in it


def describe(node: Node) -> str:
    """What a node holds, in words for a message."""
    value, typed = node.value, quoted(node.text or "")
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        plain = str(value).lower()
        if node.text in (None, plain):
            return f"the boolean {plain}"
        return f"{typed}, which YAML reads as the boolean {plain} (put it in quotes if you mean the word)"
    if isinstance(value, int | float):
        return f"the number {clipped(node.text or repr(value))}"
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, list | dict):
        return ("an empty " if not value else "a ") + ("list" if isinstance(value, list) else "mapping")
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
