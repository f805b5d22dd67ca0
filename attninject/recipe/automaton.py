"""The automaton behind patterns: a Thompson automaton, run through a lazily built DFA, or with groups.

Nothing here backtracks: whatever the pattern, the time is at most (length of the name) × (number of states).
"""

from __future__ import annotations

from collections.abc import Callable

Test = Callable[[str], bool]
Condition = Callable[["bool | None", "bool | None"], bool]

CACHE_WEIGHT = 200_000
"""Automaton states remembered in one pattern's DFA before it starts afresh."""


class Refused(Exception):
    """Why a text is no pattern of ours; who knows the text adds it."""


def is_word(char: str) -> bool:
    """Whether a character belongs to a word, for anchors."""
    return char == "_" or char.isalnum()


class _State(dict[str, "_State"]):
    """A DFA state: a set of automaton threads, and a dictionary of the transitions seen so far."""

    __slots__ = ("_accepts", "machine", "previous", "threads")

    def __init__(self, machine: Machine, threads: frozenset[int], previous: bool | None) -> None:
        self.machine, self.threads, self.previous = machine, threads, previous
        self._accepts: bool | None = None

    def __missing__(self, char: str) -> _State:
        state = self[char] = self.machine.step(self, char)
        return state

    @property
    def accepts(self) -> bool:
        if self._accepts is None:
            self._accepts = Machine.ACCEPT in self.machine.closure(self, None)
        return self._accepts


class Machine:
    """A Thompson automaton, built from its end backwards: every builder takes what comes after.

    A node tests one character, or passes freely to several others, or passes under a condition on
    the characters before and after (an anchor). `previous` and `following` are None at the ends of
    the name, else whether that character belongs to a word.
    """

    ACCEPT = 0

    def __init__(self, max_states: int, with_groups: bool = False) -> None:
        """`with_groups`: it is to be run by `groups`; without, a mark is nothing."""
        self.max_states, self.with_groups = max_states, with_groups
        self.tests: list[Test | None] = [None]
        self.conditions: list[Condition | None] = [None]
        self.outs: list[list[int]] = [[]]
        self.has_conditions = False
        self.marks: dict[int, int] = {}  # node -> 2n where group n begins, 2n + 1 where it ends

    def char(self, test: Test, then: int) -> int:
        """One character that passes the test."""
        return self._add(test, None, [then])

    def split(self, branches: list[int]) -> int:
        """Any of the branches."""
        return self._add(None, None, branches)

    def when(self, condition: Condition, then: int) -> int:
        """No character, but a condition on the two neighbours."""
        self.has_conditions = True
        return self._add(None, condition, [then])

    def mark(self, number: int, then: int) -> int:
        """No character: the place where a group begins or ends."""
        if not self.with_groups:
            return then
        node = self.split([then])
        self.marks[node] = number
        return node

    def _add(self, test: Test | None, condition: Condition | None, outs: list[int]) -> int:
        if len(self.outs) >= self.max_states:
            raise Refused(f"it needs more than {self.max_states} states; use smaller counted repeats")
        self.tests.append(test)
        self.conditions.append(condition)
        self.outs.append(outs)
        return len(self.outs) - 1

    def begin(self, entry: int) -> Machine:
        """Set the entry and start with an empty DFA."""
        self.entry = entry
        self.states: dict[tuple[frozenset[int], bool | None], _State] = {}
        self.weight = 0
        self.start = self._state(frozenset([entry]), None)
        return self

    def step(self, state: _State, char: str) -> _State:
        """The DFA state after one more character."""
        word = is_word(char)
        tests, outs = self.tests, self.outs
        threads = {
            outs[node][0]
            for node in self.closure(state, word)
            if (test := tests[node]) is not None and test(char)
        }
        # Transitions live in the states, so a cleared table with a new start lets all the old ones go.
        if self.weight > CACHE_WEIGHT:
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

    # --- with groups -------------------------------------------------------------------------------

    def groups(self, text: str) -> tuple[str, ...] | None:
        """What each group of a text stood for, "" where it took no part; None: the text is not accepted.

        Of several ways through, the one whose first branches come first, as a backtracking matcher finds it.
        """
        words = [None, *map(is_word, text), None]
        threads: list[tuple[int, dict[int, int]]] = [(self.entry, {})]  # the first branches first
        for at, char in enumerate(text):
            found = self._followed(threads, at, words)
            threads = [
                (self.outs[node][0], spans)
                for node, spans in found.items()
                if (test := self.tests[node]) is not None and test(char)
            ]
        spans = self._followed(threads, len(text), words).get(self.ACCEPT)
        if spans is None:
            return None
        numbers = range(max(self.marks.values(), default=-1) // 2 + 1)
        return tuple(text[spans.get(2 * n, 0) : spans.get(2 * n + 1, 0)] for n in numbers)

    def _followed(
        self, threads: list[tuple[int, dict[int, int]]], at: int, words: list[bool | None]
    ) -> dict[int, dict[int, int]]:
        """All nodes reached before the character `at`, in the order of their branches, and where groups then are."""
        seen: dict[int, dict[int, int]] = {}
        todo = threads[::-1]
        while todo:
            node, spans = todo.pop()
            if node in seen:
                continue
            seen[node] = spans
            condition = self.conditions[node]
            if self.tests[node] is None and (condition is None or condition(words[at], words[at + 1])):
                spans = {**spans, self.marks[node]: at} if node in self.marks else spans
                todo += [(out, spans) for out in reversed(self.outs[node])]
        return seen
