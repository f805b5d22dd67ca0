"""What TorchScript compiles of a generated class: the same forward, in the part of Python that it knows.

A generated forward hands modules to functions and makes its graph anew when something has changed. TorchScript can do
neither: it takes the network as it is at that moment. So a generated forward begins by asking whether it is being
compiled, and then calls a method whose text is written here when TorchScript asks for it, and not before. Where there
is no such text, it names the reason, which TorchScript prints as it refuses.
"""

from __future__ import annotations
import __future__

import ast
import inspect
import itertools
import linecache
import re
import textwrap
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from attninject.layout import Layout

from .graph_edit import edit_graph, layout_arguments, with_item
from .injected_state import CONTAINERS, Insertion
from .layout_adapters import hidden, run_block, run_pair, shown
from .local_graph import LocalGraph

ENTRY = "_attninject_script"  # method of a generated class: the forward for TorchScript
ORIGINAL = "_attninject_original"  # method of a generated class: the forward of the original class
ITEM = "a block works on one item of what it returns"
_DROPPED = re.compile(r";  [\w =]+= None$")  # fx frees variables so; TorchScript wants one type for each
_serial = itertools.count()


class Scripted:
    """The method `ENTRY` of a generated class, written when somebody looks at it."""

    def __init__(
        self, base: type[nn.Module], edit: tuple[Insertion, ...], local: LocalGraph | None, own: bool
    ) -> None:
        self.of = base, edit, local, own
        self.made: Callable[..., Any] | None = None

    def __get__(self, carrier: nn.Module | None, owner: type) -> Any:
        if self.made is None:
            self.made = _written(*self.of)
        return self.made if carrier is None else types.MethodType(self.made, carrier)


def original(base: type[nn.Module]) -> Callable[..., Any]:
    """The original forward under another name, since TorchScript calls a method by its function's."""
    found: Any = base.forward
    if not isinstance(found, types.FunctionType):
        return base.forward
    copied = types.FunctionType(
        found.__code__, found.__globals__, ORIGINAL, found.__defaults__, found.__closure__
    )
    copied.__kwdefaults__, copied.__annotations__ = found.__kwdefaults__, found.__annotations__
    return copied


def _written(
    base: type[nn.Module], edit: tuple[Insertion, ...], local: LocalGraph | None, own: bool
) -> Callable[..., Any]:
    ours = {"as_map": as_map, "as_value": as_value, "hidden": hidden, "shown": shown}
    names = {**getattr(base.forward, "__globals__", {}), **ours}
    header = "(self, x)"
    try:
        header = _header(base, names)
        refuse = _refusal(base, edit, local, own)
        lines = list(_body(base, edit, local, names)) if not refuse else _refused(base, refuse)
    except _NotScriptable as error:
        lines = _refused(base, str(error))
    text = f"def {ENTRY}{header}:\n" + "".join(f"    {line}\n" for line in lines)
    filename = f"<attninject script {base.__module__}.{base.__qualname__} {next(_serial)}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(True), filename)
    code = compile(text, filename, "exec", flags=__future__.annotations.compiler_flag)
    exec(code, names)  # the text is ours, made from the graph
    made: Callable[..., Any] = names[ENTRY]
    return made


class _NotScriptable(Exception):
    """Says why."""


def _refused(base: type[nn.Module], reason: str) -> list[str]:
    """A body that TorchScript refuses, and shows."""
    return [f"return cannot_be_scripted({f'{base.__qualname__}: {reason}'!r})"]


def _refusal(base: type[nn.Module], edit: tuple[Insertion, ...], local: LocalGraph | None, own: bool) -> str:
    """Why TorchScript cannot have this forward; empty if it can, as far as can be told without the text."""
    if own:
        return "a forward was assigned to this instance"
    if local is not None and local.arguments.decisions:
        return "its forward decides by its inputs, and would have to be traced anew for others"
    around = [i for i in edit if i.target is None]
    if any(i.output is not None for i in around):
        return ITEM
    if around and issubclass(base, CONTAINERS) and base.forward is not nn.Sequential.forward:
        return "its forward goes over its own children, among which TorchScript would find the block"
    return ""


def _header(base: type[nn.Module], names: dict[str, Any]) -> str:
    """The original's parameters and result with their types, as it was written."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(base.forward))).body[0]
    except (OSError, TypeError, SyntaxError) as error:
        raise _NotScriptable("the source of its forward is not to be had") from error
    if not isinstance(tree, ast.FunctionDef) or _overloaded(base):
        raise _NotScriptable("its forward has several signatures, or is no function")
    given = tree.args
    for p in inspect.signature(base.forward).parameters.values():
        if p.default is not p.empty:
            names[f"_default_{p.name}"] = p.default
    positional = [*given.posonlyargs, *given.args]
    positional[0].arg = "self"
    with_default = positional[len(positional) - len(given.defaults) :]
    given.defaults = [ast.Name(f"_default_{a.arg}") for a in with_default]
    given.kw_defaults = [
        d and ast.Name(f"_default_{a.arg}") for a, d in zip(given.kwonlyargs, given.kw_defaults, strict=True)
    ]
    returns = f" -> {ast.unparse(tree.returns)}" if tree.returns else ""
    return f"({ast.unparse(given)}){returns}"


def _overloaded(base: type[nn.Module]) -> bool:
    """Whether its forward has `torch.jit._overload_method` signatures."""
    known: dict[str, Any] = getattr(torch._jit_internal, "_overloaded_methods", {})
    return base.__name__ in known.get(f"__torch__.{base.__module__}.forward", {})


def _body(
    base: type[nn.Module], edit: tuple[Insertion, ...], local: LocalGraph | None, names: dict[str, Any]
) -> Iterator[str]:
    parameters = list(inspect.signature(base.forward).parameters)[1:]
    around = [i for i in edit if i.target is None]
    for insertion in around:
        if insertion.second is not None:
            name = _parameter(insertion.second.operand, parameters)
            yield f"assert {name} is not None"
            yield f"{kept(insertion)} = {name}{'.clone()' if insertion.second.copied else ''}"
    for insertion in around:
        if insertion.position == "before":
            name = _parameter(insertion.operand, parameters)
            yield f"{name} = {_call(insertion, name)}"
    if local is not None:
        yield from _graphs(base, edit, local, names)
    elif base.forward is nn.Sequential.forward:
        yield f"_out = {parameters[0]}"
        yield "for _name, _layer in self.named_children():"
        yield f"    if _name not in {[i.name for i in around]!r}:"
        yield "        _out = _layer(_out)"
    else:
        yield f"_out = self.{ORIGINAL}({', '.join(parameters)})"
    for insertion in around:
        if insertion.position == "after":
            yield f"_out = {_call(insertion, '_out')}"
    yield "return _out"


def _parameter(operand: int | str, parameters: list[str]) -> str:
    return operand if isinstance(operand, str) else parameters[operand]


def _graphs(
    base: type[nn.Module], edit: tuple[Insertion, ...], local: LocalGraph, names: dict[str, Any]
) -> Iterator[str]:
    """Lines that compute `_out` by the edited graph, or by that of the mode."""
    for argument in local.arguments.constants:
        test = "is" if argument.value is None else "=="
        yield f"assert {argument.name} {test} {argument.value!r}"
    if local.train is local.eval:
        yield from _lines(edit_graph(local.eval, tuple(i for i in edit if i.target), base), names)
        return
    for condition, graph in (("if self.training:", local.train), ("else:", local.eval)):
        yield condition
        edited = edit_graph(graph, tuple(i for i in edit if i.target), base)
        yield from (f"    {line}" for line in _lines(edited, names))


def _lines(graph: fx.Graph, names: dict[str, Any]) -> Iterator[str]:
    """The code of an edited graph, each block called as what it is: a child."""
    for node in list(graph.nodes):
        if node.target is with_item:
            raise _NotScriptable(ITEM)
        if node.target is run_block:
            _call_as_child(graph, node, node.args[1:2], node.args[2:])
        elif node.target is run_pair:
            _call_as_child(graph, node, *_in_pairs(graph, node))
    code = graph.python_code("self")
    names.update(code.globals)
    _, _, body = code.src.partition("def forward(")
    for line in textwrap.dedent(body.partition("\n")[2]).splitlines():
        if line.strip():
            yield _DROPPED.sub("", line).replace("return ", "_out = ", 1)


def _in_pairs(graph: fx.Graph, node: fx.Node) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The values of a block of two inputs, the second as the block wants it, and the layout of the first."""
    _, given, other, here, there = node.args
    if described := _described(there):  # type: ignore[arg-type]
        with graph.inserting_before(node):
            other = graph.call_function(as_map, (other, *described))
    return (given, other), here  # type: ignore[return-value]


def _call_as_child(graph: fx.Graph, node: fx.Node, values: tuple[Any, ...], layout: tuple[Any, ...]) -> None:
    """`values`: the site's, in this layout, and what else the block is given."""
    block, (given, *rest) = node.args[0], values
    assert isinstance(block, fx.Node)
    with graph.inserting_before(node):
        described = _described(layout)
        x = graph.call_function(as_map, (given, *described)) if described else given
        y = graph.call_module(str(block.target), (x, *rest))
        y = graph.call_function(as_value, (y, given, *described)) if described else y
    node.replace_all_uses_with(y)
    graph.erase_node(node)
    if not block.users:
        graph.erase_node(block)


def _call(insertion: Insertion, value: str) -> str:
    tail = _tail(insertion.layout)
    given = f"{value}.clone()" if insertion.copy_given else value
    given = f"hidden({given}, {insertion.mask})" if insertion.mask else given
    values = f"as_map({given}{tail})" if tail else given
    if insertion.second is not None:
        there = _tail(insertion.second.layout)
        values += f", as_map({kept(insertion)}{there})" if there else f", {kept(insertion)}"
    block = f"self.{insertion.name}({values})"
    whole = f"as_value({block}, {value}{tail})" if tail else block
    whole = f"shown({whole}, {value}, {insertion.mask})" if insertion.mask else whole
    return f"{whole}.clone()" if insertion.copy_result else whole


def kept(insertion: Insertion) -> str:
    """The variable that holds the second value of a block around a forward."""
    return f"_with_{insertion.name}"


def _tail(layout: Layout) -> str:
    return "".join(f", {a!r}" for a in _described(layout_arguments(layout)))


def _described(layout: tuple[Any, ...]) -> tuple[Any, ...]:
    """Kind, prefix and grid (empty: none), or nothing where the value is as the block wants it."""
    if not layout or (layout[0] in ("NCL", "NCDHW") and len(layout) == 1):
        return ()
    kind, prefix, grid = (*layout, 0, None)[:3] if len(layout) == 1 else layout[:3]
    return kind, prefix, list(grid or ())


def as_map(x: Tensor, kind: str, prefix: int, grid: list[int]) -> Tensor:
    """What `run_block` gives a block of a value in some layout; without grid: `grid` is empty."""
    if kind == "NHWC" or kind == "NDHWC":
        return x.movedim(-1, 1)
    if kind == "NC":
        return x.unsqueeze(2)
    tokens = x[:, prefix:]
    sequence = tokens if kind == "NCL" else tokens.transpose(1, 2)
    if len(grid) == 0:
        return sequence
    y: Tensor = sequence.unflatten(2, fitted(sequence.shape[2], grid))
    return y


def as_value(y: Tensor, x: Tensor, kind: str, prefix: int, grid: list[int]) -> Tensor:
    """A block's result in the layout of x, whose first `prefix` tokens it has not seen."""
    if kind == "NHWC" or kind == "NDHWC":
        return y.movedim(1, -1)
    if len(grid) > 0:
        y = y.flatten(2)
    y = y if kind == "NCL" else y.transpose(1, 2)
    return y if prefix == 0 else torch.cat([x[:, :prefix], y], 1)


def fitted(count: int, grid: list[int]) -> list[int]:
    """The measured grid, or one of as many tokens and its aspect ratio, as `layout_adapters.fit_grid` finds it."""
    positions = 1
    for side in grid:
        positions *= side
    if count == positions:
        return grid
    rows = int((count * grid[0] / grid[-1]) ** 0.5 + 0.5)
    fits = len(grid) == 2 and rows > 0 and count % rows == 0 and rows * grid[-1] == grid[0] * (count // rows)
    assert fits, "the tokens form no grid of the aspect ratio that the plan measured"
    return [rows, count // rows]
