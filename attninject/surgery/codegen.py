"""The source text of a generated forward."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint
from torch import fx, nn

from .graph_edit import edit_graph, layout_arguments, second_arguments, with_item
from .injected_state import OWN, Insertion
from .layout_adapters import (
    before_packing,
    note_extent,
    passed_by,
    run_block,
    run_masked,
    run_pair,
    run_replacement,
)
from .local_graph import DECISION_NAMES, MISSING, PRESENT, AttributeRead, LocalGraph
from .scripting import ENTRY, kept


class ForwardWriter:
    """Writes the source of a generated forward, and the names that the source needs."""

    def __init__(
        self,
        base: type[nn.Module],
        edit: tuple[Insertion, ...],
        local: LocalGraph | None,
        watched: bool,
        remake: Callable[..., Any],
        own: inspect.Signature | None = None,
    ) -> None:
        """`remake(carrier, *args)`: what the forward calls when its graph no longer holds.

        `own`: of the forward that the instance has as an attribute, around which the blocks then work.
        """
        self.own = own is not None
        self.base, self.edit, self.local, self.watched = base, edit, local, watched
        self.around_result = watched or any(i.target is None and i.position != "before" for i in edit)
        self.names: dict[str, Any] = {
            "_base": base.forward,
            **DECISION_NAMES,
            "_remake": remake,
            "torch": torch,
            "run_block": run_block,
            "run_masked": run_masked,
            "run_pair": run_pair,
            "run_replacement": run_replacement,
            "passed_by": passed_by,
            "with_item": with_item,
            "note_extent": note_extent,
            "before_packing": before_packing,
        }
        self._globals: dict[str, Any] = getattr(base.forward, "__globals__", {})
        self.parameters = list(own.parameters.values()) if own else _parameters(base.forward)

    def source(self) -> str:
        """The text of `forward`, and before it its inner functions."""
        lines = [f"def forward({self._header()}):"]
        lines += [
            "    if torch.jit.is_scripting():",
            f"        return self.{ENTRY}({self._arguments().removeprefix('self').removeprefix(', ')})",
        ]
        if self.local:
            lines += self._guards(self.local)
        packs = issubclass(self.base, nn.TransformerEncoder)
        if self.watched and packs:
            lines.append(f"    {(src := self.parameters[0].name)} = before_packing(self, {src})")
        around = [i for i in self.edit if i.target is None]
        for insertion in around:
            if insertion.second is not None:
                name = self._parameter(insertion.second.operand)
                copied = f" if {name} is None else {name}.clone()" if insertion.second.copied else ""
                lines.append(f"    {kept(insertion)} = {name}{copied}")
        for insertion in around:
            if insertion.position == "before":
                name = self._parameter(insertion.operand)
                lines.append(f"    {name} = {_call(insertion, name)}")
        text, calls = self._inner()
        calls = [c.replace("return ", "_out = ", 1) for c in calls] if self.around_result else calls
        lines += self._replaced(around, calls)
        if self.watched and not packs:
            lines.append("    note_extent(self, _out)")
        lines += ["    " + _after(i) for i in around if i.position == "after"]
        if self.around_result:
            lines.append("    return _out")
        return text + "\n".join(lines) + "\n"

    def _replaced(self, around: list[Insertion], calls: list[str]) -> list[str]:
        """The lines that run the module's own forward, and behind it what stands in its place, if anything."""
        insertion = next((i for i in around if i.position == "replace"), None)
        if insertion is None:
            return calls
        given = self._parameter(insertion.operand)
        lines = [f"    _given = {given}{'.clone()' if insertion.copy_given else ''}"]
        if insertion.alone:
            lines += ["    _out = None", f"    if passed_by(self.{insertion.name}):"]
            calls = [f"    {line}" for line in calls]
        tail = "".join(f", {a!r}" for a in layout_arguments(insertion.layout))
        copied = ".clone()" if insertion.copy_result else ""
        call = f"run_replacement(self.{insertion.name}, _given, _out, self{tail}){copied}"
        return [*lines, *calls, f"    _out = {call}"]

    def _header(self) -> str:
        parts, star = ["self"], False
        for p in self.parameters:
            text = p.name
            if p.kind is p.VAR_POSITIONAL:
                text, star = "*" + text, True
            elif p.kind is p.VAR_KEYWORD:
                text = "**" + text
            elif p.kind is p.KEYWORD_ONLY and not star:
                parts.append("*")
                star = True
            if p.default is not p.empty:
                self.names[f"_default_{p.name}"] = p.default
                annotation = self._annotation(p)
                text += f"{annotation} = _default_{p.name}" if annotation else f"=_default_{p.name}"
            else:
                text += self._annotation(p)
            parts.append(text)
        return ", ".join(parts)

    def _annotation(self, p: inspect.Parameter) -> str:
        """What the original says of a parameter, where TorchScript would otherwise take it for a tensor."""
        text = p.annotation if isinstance(p.annotation, str) else getattr(p.annotation, "__name__", "")
        if p.annotation is p.empty or text in ("Tensor", "torch.Tensor"):
            return ""
        if not isinstance(p.annotation, (str, type)):
            text = f"_type_{p.name}"
            self.names[text] = p.annotation
        else:
            self.names.update((n, v) for n, v in self._globals.items() if n in re.findall(r"\w+", text))
        return f": {text}"

    def _arguments(self) -> str:
        parts = ["self"]
        for p in self.parameters:
            if p.kind is p.KEYWORD_ONLY:
                parts.append(f"{p.name}={p.name}")
            else:
                star = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}.get(p.kind.name, "")
                parts.append(star + p.name)
        return ", ".join(parts)

    def _parameter(self, operand: int | str) -> str:
        if isinstance(operand, str):
            return operand
        return self.parameters[operand].name

    def _guards(self, local: LocalGraph) -> list[str]:
        """Lines that make the graph anew when something it depends on is not as it was."""
        lines, tests = self._of_options(local), []
        for a in local.arguments.constants:
            if isinstance(a.value, str):
                tests.append(f"{a.name} != {a.value!r}")
            elif not isinstance(a.value, tuple):
                tests.append(f"{a.name} is not {a.value!r}")
        for d in local.arguments.decisions:
            tests.append(f"not {d.expression}" if d.outcome else d.expression)
        slots = self._slots()
        guarded = [r for r in local.reads if (r.path, r.name) not in slots and r.value is not PRESENT]
        for n, read in enumerate(guarded):
            tests.append(self._read_test(n, read))
        return lines + self._unless(tests)

    def _of_options(self, local: LocalGraph) -> list[str]:
        """Lines that make the graph anew for other options than it has, and give those a name each."""
        several = {a.name: a.value for a in local.arguments.constants if isinstance(a.value, tuple)}
        lines = self._unless(
            [f"tuple({name}) != {keys!r}" if keys else name for name, keys in several.items()]
        )
        names = [a.name for a in local.arguments.items if a.option]
        whole = next((name for name, keys in several.items() if keys), None)
        return [*lines, f"    {', '.join(names)}, = {whole}.values()"] if names else lines

    def _unless(self, tests: list[str]) -> list[str]:
        if not tests:
            return []
        return [f"    if {' or '.join(tests)}:", f"        return _remake({self._arguments()})"]

    def _slots(self) -> set[tuple[str, str]]:
        return {("", i.name) for i in self.edit if i.slot != "free"}

    def _read_test(self, n: int, read: AttributeRead) -> str:
        module = _dotted(read.path)
        if read.value is MISSING:
            return f"hasattr({module}, {read.name!r})"
        if read.value is None or isinstance(read.value, bool):
            return f"{module}.{read.name} is not {read.value!r}"
        self.names[f"_read_{n}"] = read.value
        plain = isinstance(read.value, (int, float, str, tuple, list, dict))
        return f"{module}.{read.name} {'!=' if plain else 'is not'} _read_{n}"

    def _inner(self) -> tuple[str, list[str]]:
        """Text of the inner functions, and the lines that call them."""
        if self.own:
            return "", [f"    return self.{OWN}({self._arguments().removeprefix('self').removeprefix(', ')})"]
        if self.local is None:
            return "", [f"    return _base({self._arguments()})"]
        given = ", ".join(["self", *(a.name for a in self.local.arguments.inputs)])
        text = self._graph_source("_run_eval", self.local.eval)
        lines = []
        if self.local.train is not self.local.eval:
            text += self._graph_source("_run_train", self.local.train)
            if self.around_result:
                return text, [
                    f"    return {self._run('(_run_train if self.training else _run_eval)', given)}"
                ]
            lines = ["    if self.training:", f"        return {self._run('_run_train', given)}"]
        return text, [*lines, f"    return {self._run('_run_eval', given)}"]

    def _run(self, name: str, given: str) -> str:
        """The call of an inner function; checkpointed as a whole where the original checkpoints parts of it."""
        if self.local is None or not self.local.checkpointed:
            return f"{name}({given})"
        self.names["_checkpoint"] = torch.utils.checkpoint.checkpoint
        return f"_checkpoint({name}, {given}, use_reentrant=False)"

    def _graph_source(self, name: str, graph: fx.Graph) -> str:
        edited = edit_graph(graph, tuple(i for i in self.edit if i.target), self.base)
        code = edited.python_code("self")
        self.names.update((k, v) for k, v in code.globals.items() if k not in self.names)
        return code.src.strip().replace("def forward(", f"def {name}(", 1) + "\n\n"


def _parameters(forward: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(forward).parameters.values())[1:]


def _dotted(path: str) -> str:
    text = "self"
    for part in path.split(".") if path else ():
        text = f"{text}.{part}" if part.isidentifier() else f"getattr({text}, {part!r})"
    return text


def _call(insertion: Insertion, value: str) -> str:
    tail = "".join(f", {a!r}" for a in layout_arguments(insertion.layout))
    given = f"{value}.clone()" if insertion.copy_given else value
    call = f"run_block(self.{insertion.name}, {given}{tail})"
    if insertion.mask:
        call = f"run_masked(self.{insertion.name}, {given}, {insertion.mask}{tail})"
    if insertion.second is not None:
        here, there = layout_arguments(insertion.layout), second_arguments(insertion.second)
        call = f"run_pair(self.{insertion.name}, {given}, {kept(insertion)}, {here!r}, {there!r})"
    return f"{call}{'.clone()' if insertion.copy_result else ''}"


def _after(insertion: Insertion) -> str:
    if insertion.output is None:
        return f"_out = {_call(insertion, '_out')}"
    item = f"_out[{insertion.output!r}]"
    return f"_out = with_item(_out, {insertion.output!r}, {_call(insertion, item)})"
