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

MAX_REGEX_LENGTH = 200
MAX_GLOB_LENGTH = 1000
MAX_BRACE_DEPTH = 20
MAX_REGEX_STATES = 500
_CACHE_WEIGHT = 200_000  # automaton states remembered in one pattern's DFA before it starts afresh

_Test = Callable[[str], bool]
_Condition = Callable[["bool | None", "bool | None"], bool]


@dataclass(frozen=True)
class Pattern:
    """One compiled pattern; equal and hashed by its text. Made by `compile_pattern`.

    `owner` and `operation` are the two sides of `owner::operation`, both None in a plain pattern.
    """

    text: str
    owner: Pattern | None = field(default=None, compare=False, repr=False)
    operation: Pattern | None = field(default=None, compare=False, repr=False)
    _machine: _Machine | None = field(default=None, compare=False, repr=False)
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


# --- the automaton ----------------------------------------------------------------------------


class _State(dict[str, "_State"]):
    """A DFA state: a set of automaton threads, and a dictionary of the transitions seen so far."""

    __slots__ = ("_accepts", "machine", "previous", "threads")

    def __init__(self, machine: _Machine, threads: frozenset[int], previous: bool | None) -> None:
        self.machine, self.threads, self.previous = machine, threads, previous
        self._accepts: bool | None = None

    def __missing__(self, char: str) -> _State:
        state = self[char] = self.machine.step(self, char)
        return state

    @property
    def accepts(self) -> bool:
        if self._accepts is None:
            self._accepts = _Machine.ACCEPT in self.machine.closure(self, None)
        return self._accepts


class _Machine:
    """A Thompson automaton, built from its end backwards: every builder takes what comes after.

    A node tests one character, or passes freely to several others, or passes under a condition on
    the characters before and after (an anchor). `previous` and `following` are None at the ends of
    the name, else whether that character belongs to a word.
    """

    ACCEPT = 0

    def __init__(self, max_states: int) -> None:
        self.max_states = max_states
        self.tests: list[_Test | None] = [None]
        self.conditions: list[_Condition | None] = [None]
        self.outs: list[list[int]] = [[]]
        self.has_conditions = False

    def char(self, test: _Test, then: int) -> int:
        """One character that passes the test."""
        return self._add(test, None, [then])

    def split(self, branches: list[int]) -> int:
        """Any of the branches."""
        return self._add(None, None, branches)

    def when(self, condition: _Condition, then: int) -> int:
        """No character, but a condition on the two neighbours."""
        self.has_conditions = True
        return self._add(None, condition, [then])

    def _add(self, test: _Test | None, condition: _Condition | None, outs: list[int]) -> int:
        if len(self.outs) >= self.max_states:
            raise _Refused(f"it needs more than {self.max_states} states; use smaller counted repeats")
        self.tests.append(test)
        self.conditions.append(condition)
        self.outs.append(outs)
        return len(self.outs) - 1

    def begin(self, entry: int) -> _Machine:
        """Set the entry and start with an empty DFA."""
        self.entry = entry
        self.states: dict[tuple[frozenset[int], bool | None], _State] = {}
        self.weight = 0
        self.start = self._state(frozenset([entry]), None)
        return self

    def step(self, state: _State, char: str) -> _State:
        """The DFA state after one more character."""
        word = _is_word(char)
        tests, outs = self.tests, self.outs
        threads = {
            outs[node][0]
            for node in self.closure(state, word)
            if (test := tests[node]) is not None and test(char)
        }
        # Transitions live in the states, so a cleared table with a new start lets all the old ones go.
        if self.weight > _CACHE_WEIGHT:
            self.begin(self.entry)
        self.weight += 1
        return self._state(frozenset(threads), word if self.has_conditions else None)

    def _state(self, threads: frozenset[int], previous: bool | None) -> _State:
        key = (threads, previous)
        state = self.states.get(key)
        if state is None:
            state = self.states[key] = _State(self, threads, previous)
            self.weight += len(threads) + 1
        return state

    def closure(self, state: _State, following: bool | None) -> set[int]:
        """All nodes reached without consuming a character."""
        seen: set[int] = set()
        todo = list(state.threads)
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            if self.tests[node] is not None:
                continue
            condition = self.conditions[node]
            if condition is None or condition(state.previous, following):
                todo.extend(self.outs[node])
        return seen


class _Refused(Exception):
    """Why a text is no pattern of ours; `_compile_side` adds which text."""


def _is_word(char: str) -> bool:
    return char == "_" or char.isalnum()


def _compile_side(text: str) -> Pattern:
    try:
        if text.startswith("re:"):
            return Pattern(text, _machine=_regex_machine(text[3:]))
        return Pattern(text, _machine=_glob_machine(text), _closing=".")
    except _Refused as refused:
        raise PatternError(f"pattern {_short(text)}: {refused}") from None


def _root_only() -> Pattern:
    return Pattern("", _machine=_Machine(1).begin(_Machine.ACCEPT), _closing=".")


# --- globs ------------------------------------------------------------------------------------

_STAR, _DEEP, _DOT = "*", "**", "."
_Token = str | _Test | list["list[_Token]"]  # a wildcard or dot, one character, or alternatives
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
        return _not_dot if char == "?" else char.__eq__

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

    def _class_test(self, body: str, negated: bool, start: int) -> _Test:
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

    def _fault(self, problem: str, at: int | None = None) -> _Refused:
        return _Refused(f"{problem} (at character {(self.at if at is None else at) + 1})")


def _not_dot(char: str) -> bool:
    return char != "."


# Where a token finds itself: at the start of a segment, inside one, or behind a `**`, which has
# already taken the dot that follows it. An entry is a node, or the reason why no such text may come.
_START, _INSIDE, _BEHIND = range(3)
_Entry = int | str
_Entries = tuple[_Entry, _Entry, _Entry]

_EMPTY_SEGMENT = "it has an empty segment; names have no two dots in a row, and none at either end"
_GLUED = "`**` must be a whole segment; write *, or put a dot between: **.x"


def _glob_machine(text: str) -> _Machine:
    if not text:
        raise _Refused("it is empty; the model itself and everything in it is **")
    if len(text) > MAX_GLOB_LENGTH:
        raise _Refused(f"it has {len(text)} characters, at most {MAX_GLOB_LENGTH} are allowed; use a list")
    machine = _Machine(max_states=4 * MAX_GLOB_LENGTH)
    tokens = _GlobParser(text).sequence()
    closing_dot = machine.char(_DOT.__eq__, _Machine.ACCEPT)
    entry = _glob_sequence(machine, tokens, (_EMPTY_SEGMENT, closing_dot, _Machine.ACCEPT))[_START]
    if isinstance(entry, str):
        raise _Refused(entry)
    return machine.begin(entry)


def _glob_sequence(machine: _Machine, tokens: list[_Token], then: _Entries) -> _Entries:
    """Entries of a token sequence, one per position in a segment, given those of what follows."""
    for token in reversed(tokens):
        then = _glob_token(machine, token, then)
    return then


def _glob_token(machine: _Machine, token: _Token, then: _Entries) -> _Entries:
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
        assert callable(token)
        here = _char(machine, token, then[_INSIDE])
    return here, here, _GLUED


def _char(machine: _Machine, test: _Test, then: _Entry) -> _Entry:
    return then if isinstance(then, str) else machine.char(test, then)


def _any_of(machine: _Machine, entries: list[_Entry]) -> _Entry:
    nodes = []
    for entry in entries:
        if isinstance(entry, str):
            return entry
        nodes.append(entry)
    return machine.split(nodes)


def _any_characters(machine: _Machine, then: _Entry) -> _Entry:
    if isinstance(then, str):
        return then
    loop = machine.split([then])
    machine.outs[loop].append(machine.char(_not_dot, loop))
    return loop


def _any_segments(machine: _Machine, then: _Entry) -> _Entry:
    """Zero or more segments, each closed by its dot."""
    if isinstance(then, str):
        return then
    between = machine.split([then])
    within = machine.split([machine.char(_DOT.__eq__, between)])
    machine.outs[within].append(machine.char(_not_dot, within))
    machine.outs[between].append(within)
    return between


# --- regular expressions ----------------------------------------------------------------------

_CATEGORIES: dict[Any, _Test] = {
    sre.CATEGORY_DIGIT: str.isdecimal,
    sre.CATEGORY_NOT_DIGIT: lambda char: not char.isdecimal(),
    sre.CATEGORY_SPACE: str.isspace,
    sre.CATEGORY_NOT_SPACE: lambda char: not char.isspace(),
    sre.CATEGORY_WORD: _is_word,
    sre.CATEGORY_NOT_WORD: lambda char: not _is_word(char),
}
_ANCHORS: dict[Any, _Condition] = {
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


def _regex_machine(text: str) -> _Machine:
    if len(text) > MAX_REGEX_LENGTH:
        raise _Refused(
            f"a regular expression of {len(text)} characters, at most {MAX_REGEX_LENGTH} are allowed"
        )
    machine = _Machine(MAX_REGEX_STATES)
    return machine.begin(_regex_sequence(machine, _parse_regex(text), _Machine.ACCEPT))


def _parse_regex(text: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of syntax that may change in a later Python
            tree = sre.parse(text)
    except re.error as error:
        raise _Refused(f"no regular expression: {error}") from None
    except (OverflowError, RecursionError):
        raise _Refused("no regular expression: a repeat is too large or groups are too deep") from None
    if tree.state.flags != re.UNICODE:
        raise _Refused("flags such as (?i) are not supported; write [Aa] for either case")
    return tree


def _regex_sequence(machine: _Machine, tree: Any, then: int) -> int:
    for operation, argument in reversed(list(tree)):
        then = _regex_node(machine, operation, argument, then)
    return then


def _regex_node(machine: _Machine, operation: Any, argument: Any, then: int) -> int:
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
            raise _Refused("flags such as (?i:) are not supported; write [Aa] for either case")
        return _regex_sequence(machine, argument[3], then)
    if operation in (sre.MAX_REPEAT, sre.MIN_REPEAT):  # the same language: the match is a full one
        least, most, body = argument
        return _regex_repeat(machine, least, most, body, then)
    if operation is sre.AT and argument in _ANCHORS:
        return machine.when(_ANCHORS[argument], then)
    raise _Refused(_REFUSED.get(str(operation), f"{operation} is not supported"))


def _regex_repeat(machine: _Machine, least: Any, most: Any, body: Any, then: int) -> int:
    """`body{least,most}`: optional copies, or a loop, behind the copies that must be there."""
    if most is sre.MAXREPEAT:
        loop = machine.split([then])
        machine.outs[loop].append(_regex_sequence(machine, body, loop))
        entry = loop
    else:
        entry = then
        for _ in range(most - least):
            entry = machine.split([then, _regex_sequence(machine, body, entry)])
    for _ in range(least):
        entry = machine.split([_regex_sequence(machine, body, entry)])
    return entry


def _regex_class(items: list[tuple[Any, Any]]) -> _Test:
    negated = items[0][0] is sre.NEGATE
    tests = [_regex_class_item(*item) for item in items[negated:]]
    return lambda char: any(test(char) for test in tests) is not negated


def _regex_class_item(operation: Any, argument: Any) -> _Test:
    if operation is sre.LITERAL:
        return chr(argument).__eq__
    if operation is sre.RANGE:
        low, high = argument
        return lambda char: low <= ord(char) <= high
    return _CATEGORIES[argument]
