"""Text from a stranger, read with care: YAML or Python values become nodes that know where they stand.

`read_yaml` folds a YAML text event by event into a tree of `Node`s with line and column, capped in size, depth
and number of values before anything is built; `from_python` makes the same tree of a dict. Nothing is imported,
evaluated or fetched. PyYAML's events, not ruamel.yaml: they take half the time, can be counted before anything is built,
and comments, which ruamel keeps, are never written back.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import yaml

from attninject.errors import Fault, RecipeError
from attninject.wording import clipped, did_you_mean, quoted

from .report import BAD, Node, Report

MAX_BYTES = 1 << 20
MAX_DEPTH = 20
MAX_VALUES = 10_000


def read_file(path: str, also: Iterable[str] = (), error: type[RecipeError] = RecipeError) -> bytes:
    """The bytes of a file, at most one more than `MAX_BYTES`; `also`: names that may have been meant."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise error([Fault("no regular file", path)])
        with open(path, "rb") as stream:
            return stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        folder = Path(path).parent
        beside = [item.name for item in folder.glob("*.y*ml")] if folder.is_dir() else []
        hint = did_you_mean(Path(path).name, [*beside, *also])
        raise error([Fault(f"no such file{hint}", path)]) from None
    except (OSError, ValueError) as reason:  # ValueError: a NUL in the path
        raise error([Fault(f"cannot be read: {reason}", path)]) from None


# --- reading YAML -----------------------------------------------------------------------------


def read_yaml(
    text: str | bytes, report: Report, kind: str = "recipe", form: str = "a mapping with `rules:`"
) -> Node | None:
    """The tree of one YAML document, or None when reading had to stop; never raises.

    `kind` and `form` say what the document should be, for the messages.
    """
    start = Node(None)
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            return _stop(report, start, f"not UTF-8: {error.reason} at byte {error.start}")
    if len(text) > MAX_BYTES or len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        return _stop(report, start, f"larger than 1 MiB ({MAX_BYTES} bytes), the most that is read")
    builder, loader = _TreeBuilder(report, kind), None
    try:
        loader = yaml.SafeLoader(text)
        while loader.check_event():
            builder.take(cast(Any, loader).get_event(), loader)  # PyYAML's stubs leave it untyped
    except _Stop:
        return None
    except yaml.reader.ReaderError as error:
        at = _node_at(text, error.position)
        return _stop(report, at, f"no YAML: the character U+{error.character:04X} is not allowed")
    except yaml.MarkedYAMLError as error:
        if wide := re.search("^[ -]*\u00a0", text, re.MULTILINE):
            at = _node_at(text, wide.end() - 1)
            return _stop(report, at, "no YAML: a no-break space (U+00A0) stands here; type a plain one")
        return _stop(report, _marked(error.problem_mark), f"no YAML: {_syntax_message(error)}")
    except Exception as error:  # PyYAML lets builtin errors escape, as on "\UFFFFFFFF"
        at = start if loader is None else _marked(loader.get_mark())
        return _stop(report, at, f"no YAML: {type(error).__name__}: {clipped(str(error))}")
    if builder.root is None:
        return _stop(report, Node(None, 1, 1), f"empty; expected {form}")
    return builder.root


def _stop(report: Report, node: Node, message: str) -> Node | None:
    report.add(node, message)
    return None


def _node_at(text: str, position: int) -> Node:
    before = text[:position]
    return Node(None, before.count("\n") + 1, position - (before.rfind("\n") + 1) + 1)


def _marked(mark: Any, value: Any = None, **more: Any) -> Node:
    return Node(value, mark.line + 1, mark.column + 1, **more) if mark else Node(value, **more)


_HINTS = {
    "expected alphabetic or numeric character": '; a pattern that begins with * needs quotes: "**.bn3"',
    "mapping values are not allowed here": (
        "; a text with a colon needs quotes, and the keys of one mapping begin in the same column"
    ),
    "could not find expected ':'": "; a key needs a colon, and a space behind it",
    "expected ',' or '}', but got '['": '; a pattern within braces needs quotes: "layer[1-4].*"',
    "expected ',' or '}', but got '{'": '; a pattern within braces needs quotes: "layer1.{0,1}"',
}
"""What a message of PyYAML has in it → what to do."""


def _syntax_message(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or ""
    if r"'\t'" in problem:
        return "a tab stands where a value or key should begin; indent with spaces"
    context = f" ({error.context})" if error.context else ""
    hint = next((hint for words, hint in _HINTS.items() if words in problem), "")
    return f"{error.problem}{context}{hint}"


class _Stop(Exception):
    """Reading cannot go on; the fault is in the report."""


@dataclass
class _Open:
    """A list or mapping that is still being read: its start, its anchor, the nodes so far."""

    mark: Any
    anchor: str | None
    is_mapping: bool
    children: list[Node] = field(default_factory=list)


class _TreeBuilder:
    """Folds YAML events into `Node`s. Everything is capped here, before it can grow."""

    def __init__(self, report: Report, kind: str) -> None:
        self.report, self.kind = report, kind
        self.root: Node | None = None
        self.stack: list[_Open] = []
        self.anchors: dict[str, Node] = {}
        self.documents = 0
        self.count = 0

    def take(self, event: yaml.Event, loader: yaml.SafeLoader) -> None:
        if isinstance(event, yaml.DocumentStartEvent):
            self.documents += 1
            if self.documents > 1:
                self._fatal(event, f"a second YAML document begins here; a file holds one {self.kind}")
        elif isinstance(event, yaml.AliasEvent):
            self._alias(event)
        elif isinstance(event, yaml.ScalarEvent):
            self._refuse_tag(event)
            self._place(event, event.anchor, self._scalar(event, loader))
        elif isinstance(event, yaml.CollectionStartEvent):
            self._refuse_tag(event)
            if len(self.stack) == MAX_DEPTH:
                self._fatal(event, f"nested more than {MAX_DEPTH} deep")
            mapping = isinstance(event, yaml.MappingStartEvent)
            self.stack.append(_Open(event.start_mark, event.anchor, mapping))
        elif isinstance(event, yaml.CollectionEndEvent):
            self._close(event)

    def _fatal(self, event: yaml.Event, message: str) -> None:
        self.report.add(_marked(event.start_mark), message)
        raise _Stop

    def _refuse_tag(self, event: Any) -> None:
        if event.tag is not None:
            self.report.add(
                _marked(event.start_mark),
                f"tags are not allowed, found {quoted(event.tag)}; write the plain value",
            )

    def _alias(self, event: yaml.AliasEvent) -> None:
        name, here = str(event.anchor), _marked(event.start_mark)
        if any(opened.anchor == name for opened in self.stack):
            self._fatal(event, f"*{name} stands inside what it names; recursion is not allowed")
        if name not in self.anchors:
            hint = did_you_mean(name, self.anchors)
            self._fatal(
                event, f'*{name} names no anchor{hint}; a pattern that begins with * needs quotes: "*{name}"'
            )
        target = self.anchors[name]
        if len(self.stack) + target.height > MAX_DEPTH:
            self._fatal(event, f"nested more than {MAX_DEPTH} deep once *{name} is expanded")
        self._place(event, None, replace(target, line=here.line, column=here.column))

    def _scalar(self, event: yaml.ScalarEvent, loader: yaml.SafeLoader) -> Node:
        if event.tag is not None:
            return _marked(event.start_mark, BAD)
        if not event.implicit[0]:
            return _marked(event.start_mark, event.value)
        tag = cast(Any, loader).resolve(yaml.ScalarNode, event.value, event.implicit)
        return _marked(event.start_mark, _scalar_value(tag, event.value), text=event.value)

    def _place(self, event: yaml.Event, anchor: str | None, node: Node) -> None:
        self.count += node.size
        if self.count > MAX_VALUES:
            self._fatal(event, f"more than {MAX_VALUES} values, aliases expanded")
        if anchor is not None:
            self.anchors[anchor] = node
        if self.stack:
            self.stack[-1].children.append(node)
        else:
            self.root = node

    def _close(self, event: yaml.Event) -> None:
        opened = self.stack.pop()
        children = opened.children
        size, height = sum(c.size for c in children), max((c.height for c in children), default=0)
        value = self._mapping(children) if opened.is_mapping else children
        self.count -= size  # counted when they were placed; now part of this node
        node = _marked(opened.mark, value, size=size + 1, height=height + 1)
        self._place(event, opened.anchor, node)

    def _mapping(self, children: list[Node]) -> dict[str, tuple[Node, Node]]:
        result: dict[str, tuple[Node, Node]] = {}
        for key, value in zip(children[::2], children[1::2], strict=True):
            if not isinstance(key.value, str):
                self.report.expected(key, "a word as key")
            elif key.text == "<<":
                self.report.add(key, "merge keys (<<) are not allowed; write the fields out")
            elif key.value in result:
                first = result[key.value][0]
                self.report.add(key, f"duplicate key {quoted(key.value)}, first at line {first.line}")
            else:
                result[key.value] = key, value
        return result


_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_WORDS = {".inf": math.inf, "+.inf": math.inf, "-.inf": -math.inf, ".nan": math.nan}


def _scalar_value(tag: str, text: str) -> Any:
    """A plain scalar's value: YAML 1.1, but 1e-5 is a number, and 010, 1:30 and dates are text."""
    kind = tag.rpartition(":")[2]
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() in ("yes", "true", "on")
    if kind not in ("int", "float", "str"):
        return text
    if kind == "float" and text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if kind == "int":
        return text if not _DECIMAL.fullmatch(text) else int(text) if len(text) <= 30 else math.inf
    return float(text) if _FLOAT.fullmatch(text) else text


# --- reading Python values --------------------------------------------------------------------


def from_python(value: Any, report: Report, convert: Callable[[Any], Any] = lambda value: value) -> Node:
    """The tree of a Python value; the caps hold here too, as a dict may come from JSON or hold itself.

    `convert` makes plain values of a caller's own classes.
    """
    try:
        return _PythonReader(report, convert).read(value, depth=0)
    except _Stop:
        return Node(BAD)


class _PythonReader:
    def __init__(self, report: Report, convert: Callable[[Any], Any]) -> None:
        self.report, self.convert, self.count = report, convert, 0

    def read(self, value: Any, depth: int) -> Node:
        self.count += 1
        if depth > MAX_DEPTH:
            self._fatal(f"nested more than {MAX_DEPTH} deep")
        if self.count > MAX_VALUES:
            self._fatal(f"more than {MAX_VALUES} values")
        value = self.convert(value)
        if isinstance(value, Mapping):
            return Node(self._mapping(value, depth))
        if isinstance(value, list | tuple):
            return Node([self.read(item, depth + 1) for item in value])
        return Node(value)

    def _mapping(self, value: Mapping[Any, Any], depth: int) -> dict[str, tuple[Node, Node]]:
        result: dict[str, tuple[Node, Node]] = {}
        for key, item in value.items():
            if isinstance(key, str):
                result[key] = Node(key), self.read(item, depth + 1)
            else:
                self.report.expected(Node(key), "a word as key")
        return result

    def _fatal(self, message: str) -> None:
        self.report.add(Node(None), message)
        raise _Stop
