r"""The pattern language over dotted module names: globs, and full-match regular expressions after `re:`.

    layer[1-4].*.bn3        `*` stays within one segment
    **.attn                 `**`, a whole segment of its own, stands for zero or more segments
    {layer3,layer4}.{0,1}   alternatives, nested if need be; they may hold dots and wildcards
    blocks.?.norm[!1]       one character; a class; its complement
    re:layer[12]\.\d+\.bn3  a regular expression for the whole name
    layer1.*::add           an operation in the forward of the modules on the left

The empty name is the model itself; of the globs, those made of `**` alone match it.

A pattern comes from a recipe, and a recipe may come from a stranger, so matching must not run away.
Globs and regular expressions alike become a Thompson automaton, run through a lazily built DFA: the
time is at most (length of the name) × (number of states), whatever the pattern, and one dictionary
look-up per character once the DFA is warm. Braces are never expanded. What no automaton can do
(lookaround, backreferences) is refused.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from re import _parser as sre  # type: ignore[attr-defined]
from typing import Any

from attninject.errors import PatternError

from .automaton import Condition, Machine, Refused, Test, is_word

MAX_REGEX_LENGTH = 200
MAX_GLOB_LENGTH = 1000
MAX_BRACE_DEPTH = 20
MAX_REGEX_STATES = 500
_WITH_GROUPS = 8  # so many times the states are allowed where they say what groups stood for


@dataclass(frozen=True)
class Pattern:
    """One compiled pattern; equal and hashed by its text. Made by `compile_pattern`.

    `owner` and `operation` are the two sides of `owner::operation`, both None in a plain pattern.
    """

    text: str
    owner: Pattern | None = field(default=None, compare=False, repr=False)
    operation: Pattern | None = field(default=None, compare=False, repr=False)
    _machine: Machine | None = field(default=None, compare=False, repr=False)
    _closing: str = field(default="", compare=False, repr=False)

    def matches(self, name: str) -> bool:
        """Whether the whole dotted module name matches; never true of `owner::operation`."""
        if self._machine is None:
            return False
        state = self._machine.start
        # A glob sees every segment closed by a dot, so that the root has none and `**` needs no special case.
        for char in name + self._closing if name else name:
            state = state[char]
        return state.accepts

    def match_operation(self, owner: str, operation: str) -> bool:
        """Whether `owner::operation` names this operation (`add_1`) of this owner (`layer1.0`)."""
        if self.owner is None or self.operation is None:
            return False
        return self.owner.matches(owner) and self.operation.matches(operation)

    def captures(self, name: str) -> tuple[str, ...] | None:
        r"""What its wildcards, or the groups of a regular expression, stood for in a name; None: it does not match.

        Of a glob each `*`, `**`, `?`, class and outermost pair of braces, in order. Dots at the ends do not count.

            enc.*.skip in enc.2.skip                    ("2",)
            {enc,dec}.stage[1-4] in dec.stage3          ("dec", "3")
            re:(enc|dec)\.(?:stage)?(\d) in dec.stage3  ("dec", "3")

        Raises:
            PatternError: there are groups in too many counted repeats.
        """
        if self.owner is not None and self.operation is not None:
            owner, _, operation = name.partition("::")
            left, right = self.owner.captures(owner), self.operation.captures(operation)
            return None if left is None or right is None else left + right
        if not self.matches(name) or not self.text:
            return () if self.matches(name) else None
        found = _with_groups(self.text).groups(name + self._closing if name else name)
        return tuple(part.strip(".") for part in found or ())

    def __str__(self) -> str:
        return self.text

    def __reduce__(self) -> tuple[Callable[[str], Pattern], tuple[str]]:
        return compile_pattern, (self.text,)


@lru_cache(maxsize=1024)
def compile_pattern(text: str) -> Pattern:
    """Compile one pattern, or raise `PatternError` with the place and the fix."""
    if not isinstance(text, str):
        raise PatternError(f"a pattern is a string, found {type(text).__name__}: {text!r}")
    prefix = "re:" if text.startswith("re:") else ""
    owner, colons, operation = text[len(prefix) :].partition("::")
    if not colons:
        return _compile_side(text)
    if not operation:
        raise PatternError(f"pattern {_short(text)}: no operation after `::`; write for example {owner}::add")
    left = _compile_side(prefix + owner) if prefix or owner else _root_only()
    return Pattern(text, left, _compile_side(operation))


def _short(text: str) -> str:
    return f"`{text}`" if len(text) <= 60 else f"`{text[:57]}...`"


def _compile_side(text: str) -> Pattern:
    return Pattern(text, _machine=_machine(text), _closing="" if text.startswith("re:") else ".")


def _machine(text: str, with_groups: bool = False) -> Machine:
    factor = _WITH_GROUPS if with_groups else 1
    try:
        if text.startswith("re:"):
            return _regex_machine(text[3:], Machine(factor * MAX_REGEX_STATES, with_groups))
        return _glob_machine(text, Machine(factor * 4 * MAX_GLOB_LENGTH, with_groups))
    except Refused as refused:
        raise PatternError(f"pattern {_short(text)}: {refused}") from None


@lru_cache(maxsize=1024)
def _with_groups(text: str) -> Machine:
    return _machine(text, with_groups=True)


def _root_only() -> Pattern:
    return Pattern("", _machine=Machine(1).begin(Machine.ACCEPT), _closing=".")


# --- globs ------------------------------------------------------------------------------------

_STAR, _DEEP, _DOT = "*", "**", "."
_Token = str | Test | list["list[_Token]"]  # a star, a dot or another character; one of several; alternatives
_GLOB_HINTS = {
    "\\": "a glob has no escapes; a class does it, as in [*]",
    "(": "parentheses belong to regular expressions: put re: in front, or write {a,b}",
    ")": "parentheses belong to regular expressions: put re: in front, or write {a,b}",
    "|": "`|` belongs to regular expressions: put re: in front, or write {a,b}",
    "^": "`^` belongs to regular expressions; a glob always matches the whole name",
    "$": "`$` belongs to regular expressions; a glob always matches the whole name",
    "]": "`]` without `[`",
    "}": "`}` without `{`",
}


class _GlobParser:
    """Text to a list of tokens, alternatives nested."""

    def __init__(self, text: str) -> None:
        self.text, self.at, self.depth = text, 0, 0

    def sequence(self) -> list[_Token]:
        """Tokens up to the end, or inside braces to the next `,` or `}`."""
        tokens: list[_Token] = []
        while self.at < len(self.text):
            char = self.text[self.at]
            if self.depth and char in ",}":
                break
            tokens.append(self._token(char))
        return tokens

    def _token(self, char: str) -> _Token:
        if char == "*":
            return self._stars()
        if char == "[":
            return self._class()
        if char == "{":
            return self._alternatives()
        if char in _GLOB_HINTS:
            raise self._fault(_GLOB_HINTS[char])
        self.at += 1
        if char == ".":
            return _DOT
        return _not_dot if char == "?" else char

    def _stars(self) -> _Token:
        start = self.at
        while self.text[self.at : self.at + 1] == "*":
            self.at += 1
        if self.at - start > 2:
            raise self._fault("more than two stars in a row; use * or **", start)
        return _STAR if self.at - start == 1 else _DEEP

    def _class(self) -> _Token:
        start = self.at
        negated = self.text.startswith("!", start + 1)
        first = start + 2 if negated else start + 1
        end = self.text.find("]", first + 1)  # a `]` right at the front stands for itself
        if end < 0:
            raise self._fault("`[` is never closed", start)
        body = self.text[first:end]
        if "." in body:
            raise self._fault("a class stays within a segment, so the dot cannot be in it", start)
        if body.startswith("^"):
            raise self._fault("write [!...] for the complement of a class", start)
        self.at = end + 1
        return self._class_test(body, negated, start)

    def _class_test(self, body: str, negated: bool, start: int) -> Test:
        singles, ranges, i = set(), [], 0
        while i < len(body):
            if body[i + 1 : i + 2] == "-" and i + 2 < len(body):
                low, high = body[i], body[i + 2]
                if low > high:
                    raise self._fault(f"the range {low}-{high} is empty; write {high}-{low}", start)
                ranges.append((low, high))
                i += 3
            else:
                singles.add(body[i])
                i += 1

        def test(char: str) -> bool:
            inside = char in singles or any(low <= char <= high for low, high in ranges)
            return char != "." and inside is not negated

        return test

    def _alternatives(self) -> _Token:
        start = self.at
        if self.depth == MAX_BRACE_DEPTH:
            raise self._fault(f"braces nested more than {MAX_BRACE_DEPTH} deep")
        if self.text.startswith("{}", start):
            raise self._fault("empty braces")
        self.depth += 1
        branches = []
        while self.at < len(self.text) and (self.at == start or self.text[self.at] == ","):
            self.at += 1
            branches.append(self.sequence())
        if self.at == len(self.text):
            raise self._fault("`{` is never closed", start)
        self.at += 1
        self.depth -= 1
        return branches

    def _fault(self, problem: str, at: int | None = None) -> Refused:
        return Refused(f"{problem} (at character {(self.at if at is None else at) + 1})")


def _not_dot(char: str) -> bool:
    return char != "."


# Where a token finds itself: at the start of a segment, inside one, or behind a `**`, which has
# already taken the dot that follows it. An entry is a node, or the reason why no such text may come.
_START, _INSIDE, _BEHIND = range(3)
_Entry = int | str
_Entries = tuple[_Entry, _Entry, _Entry]

_EMPTY_SEGMENT = "it has an empty segment; names have no two dots in a row, and none at either end"
_GLUED = "`**` must be a whole segment; write *, or put a dot between: **.x"


def _glob_machine(text: str, machine: Machine) -> Machine:
    if not text:
        raise Refused("it is empty; the model itself and everything in it is **")
    if len(text) > MAX_GLOB_LENGTH:
        raise Refused(f"it has {len(text)} characters, at most {MAX_GLOB_LENGTH} are allowed; use a list")
    tokens = _GlobParser(text).sequence()
    closing_dot = machine.char(_DOT.__eq__, Machine.ACCEPT)
    then: _Entries = (_EMPTY_SEGMENT, closing_dot, Machine.ACCEPT)
    number = sum(map(_is_wildcard, tokens))
    for token in reversed(tokens):
        if not _is_wildcard(token):
            then = _glob_token(machine, token, then)
            continue
        number -= 1
        then = _glob_token(machine, token, _marked(machine, 2 * number + 1, then))
        then = _marked(machine, 2 * number, then)
    entry = then[_START]
    if isinstance(entry, str):
        raise Refused(entry)
    return machine.begin(entry)


def _is_wildcard(token: _Token) -> bool:
    return not isinstance(token, str) or token in (_STAR, _DEEP)


def _marked(machine: Machine, number: int, entries: _Entries) -> _Entries:
    start, inside, behind = (e if isinstance(e, str) else machine.mark(number, e) for e in entries)
    return start, inside, behind


def _glob_sequence(machine: Machine, tokens: list[_Token], then: _Entries) -> _Entries:
    """Entries of a token sequence, one per position in a segment, given those of what follows."""
    for token in reversed(tokens):
        then = _glob_token(machine, token, then)
    return then


def _glob_token(machine: Machine, token: _Token, then: _Entries) -> _Entries:
    if isinstance(token, list):
        branches = [_glob_sequence(machine, branch, then) for branch in token]
        start, inside, behind = (_any_of(machine, [b[where] for b in branches]) for where in range(3))
        return start, inside, behind
    if token == _DOT:
        return _EMPTY_SEGMENT, _char(machine, _DOT.__eq__, then[_START]), then[_START]
    if token == _DEEP:
        return _any_segments(machine, then[_BEHIND]), _GLUED, _GLUED
    if token == _STAR:
        here = _any_characters(machine, then[_INSIDE])
    else:
        here = _char(machine, token.__eq__ if isinstance(token, str) else token, then[_INSIDE])
    return here, here, _GLUED


def _char(machine: Machine, test: Test, then: _Entry) -> _Entry:
    return then if isinstance(then, str) else machine.char(test, then)


def _any_of(machine: Machine, entries: list[_Entry]) -> _Entry:
    nodes = []
    for entry in entries:
        if isinstance(entry, str):
            return entry
        nodes.append(entry)
    return machine.split(nodes)


def _any_characters(machine: Machine, then: _Entry) -> _Entry:
    if isinstance(then, str):
        return then
    loop = machine.split([])
    machine.outs[loop] += [machine.char(_not_dot, loop), then]  # as many as can be, as `groups` has it
    return loop


def _any_segments(machine: Machine, then: _Entry) -> _Entry:
    """Zero or more segments, each closed by its dot."""
    if isinstance(then, str):
        return then
    between = machine.split([])
    within = machine.split([machine.char(_DOT.__eq__, between)])
    machine.outs[within].append(machine.char(_not_dot, within))
    machine.outs[between] += [within, then]
    return between


# --- regular expressions ----------------------------------------------------------------------

_CATEGORIES: dict[Any, Test] = {
    sre.CATEGORY_DIGIT: str.isdecimal,
    sre.CATEGORY_NOT_DIGIT: lambda char: not char.isdecimal(),
    sre.CATEGORY_SPACE: str.isspace,
    sre.CATEGORY_NOT_SPACE: lambda char: not char.isspace(),
    sre.CATEGORY_WORD: is_word,
    sre.CATEGORY_NOT_WORD: lambda char: not is_word(char),
}
_ANCHORS: dict[Any, Condition] = {
    sre.AT_BEGINNING: lambda previous, following: previous is None,
    sre.AT_BEGINNING_STRING: lambda previous, following: previous is None,
    sre.AT_END: lambda previous, following: following is None,
    sre.AT_END_STRING: lambda previous, following: following is None,
    sre.AT_BOUNDARY: lambda previous, following: bool(previous) is not bool(following),
    sre.AT_NON_BOUNDARY: lambda previous, following: bool(previous) is bool(following),
}
_REFUSED = {
    "ASSERT": "lookahead and lookbehind are not supported; use `exclude:` for what must not match",
    "ASSERT_NOT": "lookahead and lookbehind are not supported; use `exclude:` for what must not match",
    "FAILURE": "lookahead and lookbehind are not supported; use `exclude:` for what must not match",
    "GROUPREF": "backreferences are not supported",
    "GROUPREF_EXISTS": "conditional groups are not supported",
    "ATOMIC_GROUP": "atomic groups are not supported, and not needed: nothing here backtracks",
    "POSSESSIVE_REPEAT": "possessive repeats are not supported, and not needed: nothing here backtracks",
}


def _regex_machine(text: str, machine: Machine) -> Machine:
    if len(text) > MAX_REGEX_LENGTH:
        raise Refused(
            f"a regular expression of {len(text)} characters, at most {MAX_REGEX_LENGTH} are allowed"
        )
    return machine.begin(_regex_sequence(machine, _parse_regex(text), Machine.ACCEPT))


def _parse_regex(text: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of syntax that may change in a later Python
            tree = sre.parse(text)
    except re.error as error:
        raise Refused(f"no regular expression: {error}") from None
    except (OverflowError, RecursionError):
        raise Refused("no regular expression: a repeat is too large or groups are too deep") from None
    if tree.state.flags != re.UNICODE:
        raise Refused("flags such as (?i) are not supported; write [Aa] for either case")
    return tree


def _regex_sequence(machine: Machine, tree: Any, then: int) -> int:
    for operation, argument in reversed(list(tree)):
        then = _regex_node(machine, operation, argument, then)
    return then


def _regex_node(machine: Machine, operation: Any, argument: Any, then: int) -> int:
    if operation is sre.LITERAL:
        return machine.char(chr(argument).__eq__, then)
    if operation is sre.NOT_LITERAL:
        return machine.char(chr(argument).__ne__, then)
    if operation is sre.ANY:
        return machine.char("\n".__ne__, then)
    if operation is sre.IN:
        return machine.char(_regex_class(argument), then)
    if operation is sre.BRANCH:
        return machine.split([_regex_sequence(machine, branch, then) for branch in argument[1]])
    if operation is sre.SUBPATTERN:
        if argument[1] or argument[2]:
            raise Refused("flags such as (?i:) are not supported; write [Aa] for either case")
        if argument[0] is None:  # (?:…)
            return _regex_sequence(machine, argument[3], then)
        number = 2 * (argument[0] - 1)
        return machine.mark(number, _regex_sequence(machine, argument[3], machine.mark(number + 1, then)))
    if operation in (sre.MAX_REPEAT, sre.MIN_REPEAT):
        least, most, body = argument
        return _regex_repeat(machine, least, most, body, then, least_first=operation is sre.MIN_REPEAT)
    if operation is sre.AT and argument in _ANCHORS:
        return machine.when(_ANCHORS[argument], then)
    raise Refused(_REFUSED.get(str(operation), f"{operation} is not supported"))


def _regex_repeat(machine: Machine, least: Any, most: Any, body: Any, then: int, *, least_first: bool) -> int:
    """`body{least,most}`: optional copies, or a loop, behind the copies that must be there."""
    step = -1 if least_first else 1  # one copy more, or none
    if most is sre.MAXREPEAT:
        entry = machine.split([])
        machine.outs[entry] += [_regex_sequence(machine, body, entry), then][::step]
    else:
        entry = then
        for _ in range(most - least):
            entry = machine.split([_regex_sequence(machine, body, entry), then][::step])
    for _ in range(least):
        entry = machine.split([_regex_sequence(machine, body, entry)])
    return entry


def _regex_class(items: list[tuple[Any, Any]]) -> Test:
    negated = items[0][0] is sre.NEGATE
    tests = [_regex_class_item(*item) for item in items[negated:]]
    return lambda char: any(test(char) for test in tests) is not negated


def _regex_class_item(operation: Any, argument: Any) -> Test:
    if operation is sre.LITERAL:
        return chr(argument).__eq__
    if operation is sre.RANGE:
        low, high = argument
        return lambda char: low <= ord(char) <= high
    return _CATEGORIES[argument]
