"""Checks that a recipe and an experiment file share: a node in, its value or `BAD` out."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from attninject.wording import did_you_mean, quoted

from .frozen import FrozenDict
from .report import BAD, Node, Report

Checker = Callable[[Node, Report], Any]
"""A node to its value; what is wrong goes to the report, and `BAD` comes back."""


def choice(what: str, options: Collection[str]) -> Checker:
    """One of some words."""

    def check(node: Node, report: Report) -> Any:
        if isinstance(node.value, str) and node.value in options:
            return node.value
        hint = did_you_mean(node.value, options) if isinstance(node.value, str) else ""
        return report.expected(node, f"{what} ({', '.join(options)})", hint)

    return check


def integer(what: str, minimum: int | None = None) -> Checker:
    """A whole number below 2**31."""

    def check(node: Node, report: Report) -> Any:
        value = node.value
        if isinstance(value, int) and not isinstance(value, bool) and (minimum is None or value >= minimum):
            return value if abs(value) < 1 << 31 else report.expected(node, f"{what} below 2**31")
        return report.expected(node, what)

    return check


def boolean(node: Node, report: Report) -> Any:
    """True or false."""
    return node.value if isinstance(node.value, bool) else report.expected(node, "true or false")


def words(node: Node, report: Report) -> Any:
    """A text that is not empty."""
    good = isinstance(node.value, str) and node.value.strip()
    return node.value if good else report.expected(node, "a text")


def some(check: Checker, what: str) -> Checker:
    """One value or a list of them, to a tuple."""

    def check_all(node: Node, report: Report) -> Any:
        if not isinstance(node.value, list):
            value = check(node, report)
            return BAD if value is BAD else (value,)
        if not node.value:
            return report.expected(node, f"{what} or a list of them")
        values = [check(item, report) for item in node.value]
        return BAD if any(value is BAD for value in values) else tuple(values)

    return check_all


def distinct(check: Checker) -> Checker:
    """The same, without duplicates."""

    def check_distinct(node: Node, report: Report) -> Any:
        values = check(node, report)
        if values is not BAD and len(set(values)) < len(values):
            return report.add(node, f"the same number twice in {list(values)}")
        return values

    return check_distinct


def plain_value(node: Node, report: Report) -> Any:
    """Any value made of numbers, texts, booleans, null, lists and mappings."""
    value = node.value
    if isinstance(value, list):
        items = [plain_value(item, report) for item in value]
        return BAD if any(item is BAD for item in items) else tuple(items)
    if isinstance(value, dict):
        found = {key: plain_value(item, report) for key, (_, item) in value.items()}
        return BAD if any(item is BAD for item in found.values()) else FrozenDict(found)
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int | float):
        good = abs(value) < 1 << 63 if isinstance(value, int) else math.isfinite(value)
        return value if good else report.expected(node, "a finite number of ordinary size")
    return report.expected(node, "a number, a text, true or false, a list or a mapping")


def checked_fields(
    node: Node, checkers: Mapping[str, Checker], kind: str, report: Report, besides: str = ""
) -> dict[str, Any]:
    """The checked values of a mapping's known keys; unknown keys are reported, with what else they may have meant."""
    values = {}
    for key, (key_node, value) in node.value.items():
        if value.value is None and value.line is None:
            continue  # Python's None is "not given"; in a file an empty field is a slip
        if key in checkers:
            values[key] = checkers[key](value, report.within(key))
        else:
            hint = did_you_mean(key, checkers) or f"; known are {', '.join(checkers)}{besides}"
            report.add(key_node, f"unknown {kind} {quoted(key)}{hint}")
    return values
