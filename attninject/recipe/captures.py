r"""What the wildcards of a glob stood for in a name that it matches: two patterns are aligned by it.

captures("enc.*.skip", "enc.2.skip")           ("2",)
captures("{enc,dec}.stage[1-4]", "dec.stage3")  ("dec", "3")
"""

from __future__ import annotations

import re

from attninject.errors import PatternError

from .patterns import Pattern, compile_pattern

MAX_STARS = (
    4  # a pattern may come from a stranger, and a match by groups takes time by the power of their number
)


def captures(text: str, name: str) -> tuple[str, ...] | None:
    """What each `*`, `**`, `?`, class and outermost pair of braces stood for, in order; None: the name does not match.

    Raises:
        PatternError: a regular expression, or a glob of too many stars.
    """
    return _captures(compile_pattern(text), name)


def _captures(pattern: Pattern, name: str) -> tuple[str, ...] | None:
    text = pattern.text
    if pattern.owner is not None and pattern.operation is not None:
        owner, _, operation = name.partition("::")
        sides = _captures(pattern.owner, owner), _captures(pattern.operation, operation)
        return None if sides[0] is None or sides[1] is None else sides[0] + sides[1]
    if not pattern.matches(name) or not text:
        return () if pattern.matches(name) else None
    if text.startswith("re:"):
        raise PatternError(
            f"`{text}` is a regular expression, and only the wildcards of a glob can be aligned"
        )
    if text.count("*") - text.count("**") > MAX_STARS:
        raise PatternError(f"`{text}` has more than {MAX_STARS} stars, too many to be aligned")
    found = re.fullmatch(_regex(f"{text}."), f"{name}." if name else "")
    return tuple(part.strip(".") for part in found.groups()) if found else ()


def _regex(text: str) -> str:
    """A glob that is known to be one, as a regular expression with groups; every segment of a name ends in a dot."""
    parts: list[str] = []
    depth = at = 0
    while at < len(text):
        char, width = text[at], 1
        if text.startswith("**", at):
            part, width = _group(r"(?:[^.]+\.)*", depth), 3  # it takes the dot behind it
        elif char in "*?":
            part = _group("[^.]*" if char == "*" else "[^.]", depth)
        elif char == "[":
            end = text.index("]", at + (3 if text.startswith("[!", at) else 2))
            part, width = _group(_class(text[at + 1 : end]), depth), end + 1 - at
        elif char in "{}":
            depth += 1 if char == "{" else -1
            part = ("(" if depth == 1 else "(?:") if char == "{" else ")"
        else:
            part = "|" if char == "," and depth else re.escape(char)
        parts.append(part)
        at += width
    return "".join(parts)


def _group(body: str, depth: int) -> str:
    return f"({body})" if depth == 0 else f"(?:{body})"


def _class(body: str) -> str:
    negated = body.startswith("!")
    chars = "".join(c if c == "-" else re.escape(c) for c in body.removeprefix("!"))
    return f"[^.{chars}]" if negated else f"[{chars}]"
