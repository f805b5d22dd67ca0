"""A local graph with the blocks' calls in it."""

from __future__ import annotations

import copy
import operator
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from attninject.errors import CannotRewriteError
from attninject.layout import Layout

from .injected_state import Insertion, Second
from .layout_adapters import run_block, run_pair, run_replacement
from .local_graph import IN_PLACE, Target, find, operands, set_operand


def layout_arguments(layout: Layout) -> tuple[Any, ...]:
    """Arguments of `run_block` behind the value, the defaults left out."""
    if layout.kind == "NLC" or layout.grid:
        return (layout.kind, layout.prefix, layout.grid)
    return () if layout.kind == "NCHW" else (layout.kind,)


def second_arguments(second: Second) -> tuple[Any, ...]:
    """How `run_pair` is told the layout of a second value."""
    described = layout_arguments(second.layout)
    return (*described, True) if second.watched else described


def with_item(tree: Any, key: int | str, value: Any) -> Any:
    """A copy of a tuple, list or dict with one item replaced."""
    if isinstance(tree, tuple):
        index = key if int(key) >= 0 else len(tree) + int(key)
        items = [value if i == index else item for i, item in enumerate(tree)]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    plain = type(tree) in (list, dict, OrderedDict)  # `copy.copy` would break a compiled graph
    new = tree.copy() if plain else copy.copy(tree)
    new[key] = value
    return new


# --- editing a graph ---------------------------------------------------------------------------


def edit_graph(graph: fx.Graph, edit: Sequence[Insertion], base: type[nn.Module]) -> fx.Graph:
    """A copy of a local graph with the blocks' calls in it.

    `after`: every later use of the value sees the block's result. `before`: the one call does. Several
    insertions at one node run in their order. An in-place operation on a block's result becomes
    out-of-place, since the block may have kept that result for its backward.
    """
    new = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    new.output(new.graph_copy(graph, copies))
    found = [(i, copies[_node(graph, i.target, i.name, base)]) for i in edit if i.target is not None]
    seconds = {  # the last first, so that those at one node stand in their order
        i.name: _hold(new, node, copies[_node(graph, i.second.target, i.name, base)], i)
        for i, node in reversed(found)
        if i.second is not None and i.second.target is not None
    }
    newest: dict[tuple[fx.Node, Any], fx.Node] = {}
    results = []
    for insertion, node in found:
        held = seconds.get(insertion.name)
        if insertion.position == "before":
            results.append(_insert_before(new, node, insertion, held))
        else:
            key = (node, insertion.output)
            value = newest.get(key) or _value_after(new, node, insertion.output)
            made_of = node if insertion.position == "replace" else None
            result = newest[key] = _insert_after(new, value, insertion, made_of, held)
            results.append(result)
        if held is not None:
            new.erase_node(held)
    for result in results:
        if result.target in (run_block, run_pair, run_replacement):  # else it is a copy already
            _protect(new, result)
    return new


def _node(graph: fx.Graph, target: Target, name: str, base: type[nn.Module]) -> fx.Node:
    """The node of a target, for the block of a name.

    Raises:
        CannotRewriteError: there is none.
    """
    node = find(graph, target)
    if node is None:
        raise CannotRewriteError(
            f"the forward of {base.__qualname__} no longer has {target.name} "
            f"(call {target.number}), where the block {name!r} belongs"
        )
    return node


def _hold(graph: fx.Graph, node: fx.Node, holder: fx.Node, insertion: Insertion) -> fx.Node:
    """A node at a block's place that uses its second value, and so sees what becomes of it as other blocks go in.

    Args:
        graph: without blocks so far.
        node: where the block goes.
        holder: the node that gives the second value, or takes it as an operand.
        insertion: of the block.
    """
    second = insertion.second
    assert second is not None
    value = holder if second.position == "after" else operands(holder)[second.operand]
    last = value
    if second.output is not None:
        with graph.inserting_after(value):
            last = graph.call_function(operator.getitem, (value, second.output))
    before = insertion.position == "before"
    with graph.inserting_before(node) if before else graph.inserting_after(last if value is node else node):
        held = graph.call_function(operator.pos, (last,))
    if second.copied:
        with graph.inserting_before(_as_named(graph, second, last, holder, held)):
            held.update_arg(0, graph.call_method("clone", (last,)))
    return held


def _as_named(graph: fx.Graph, second: Second, value: fx.Node, holder: fx.Node, held: fx.Node) -> fx.Node:
    """The node before which a second value, which is written to in place, is what it is named for."""
    if second.position == "before":
        return next(n for n in graph.nodes if n is holder or n is held)
    behind = value.next
    while behind.op == "placeholder":
        behind = behind.next
    return behind


def _block_node(graph: fx.Graph, insertion: Insertion, value: Any, held: fx.Node | None) -> fx.Node:
    block = graph.create_node("get_attr", insertion.name)
    given = graph.call_method("clone", (value,)) if insertion.copy_given else value
    here = layout_arguments(insertion.layout)
    if held is None or insertion.second is None:
        result = graph.call_function(run_block, (block, given, *here))
    else:
        there = second_arguments(insertion.second)
        result = graph.call_function(run_pair, (block, given, held.args[0], here, there))
    return graph.call_method("clone", (result,)) if insertion.copy_result else result


def _insert_before(graph: fx.Graph, node: fx.Node, insertion: Insertion, held: fx.Node | None) -> fx.Node:
    with graph.inserting_before(node):
        result = _block_node(graph, insertion, operands(node)[insertion.operand], held)
    set_operand(node, insertion.operand, result)
    return result


def _replacement_node(graph: fx.Graph, insertion: Insertion, value: fx.Node, call: fx.Node) -> fx.Node:
    """What stands in the place of a child, behind its call: given what the child was given, and what it gave."""
    given = operands(call)[insertion.operand]
    if insertion.copy_given:
        with graph.inserting_before(call):
            given = graph.call_method("clone", (given,))
    block = graph.create_node("get_attr", insertion.name)
    module = graph.create_node("get_attr", str(call.target))
    arguments = (block, given, value, module, *layout_arguments(insertion.layout))
    result = graph.call_function(run_replacement, arguments)
    return graph.call_method("clone", (result,)) if insertion.copy_result else result


def _insert_after(
    graph: fx.Graph, value: fx.Node, insertion: Insertion, call: fx.Node | None, held: fx.Node | None
) -> fx.Node:
    """`call`: of the child whose place the block takes; None where it is given the value. `held`: see `_hold`."""
    users = list(value.users)
    with graph.inserting_before(value.next if held is None else held):
        if call is None:
            result = _block_node(graph, insertion, value, held)
        else:
            result = _replacement_node(graph, insertion, value, call)
    for user in users:
        user.replace_input_with(value, result)
    return result


def _value_after(graph: fx.Graph, node: fx.Node, output: int | str | None) -> fx.Node:
    """The node that holds the value: the node itself, or one item of its result, the only one used."""
    if output is None:
        return node
    items = [
        u
        for u in node.users
        if u.op == "call_function" and u.target is operator.getitem and u.args[1] == output
    ]
    others = [u for u in node.users if u not in items]
    with graph.inserting_after(node):
        item = graph.call_function(operator.getitem, (node, output))
    for duplicate in items:
        duplicate.replace_all_uses_with(item)
        graph.erase_node(duplicate)
    unknown = [u for u in others if not (u.op == "call_function" and u.target is operator.getitem)]
    if unknown:
        with graph.inserting_after(item):
            whole = graph.call_function(with_item, (node, output, item))
        for user in unknown:
            user.replace_input_with(node, whole)
    return item


_OUT_OF_PLACE = {
    getattr(operator, f"i{n}"): getattr(operator, n if n not in ("and", "or") else f"{n}_") for n in IN_PLACE
}


def _protect(graph: fx.Graph, result: fx.Node) -> None:
    """Make in-place operations on a block's result out-of-place; later readers see their result."""
    for user in list(result.users):
        if not user.args or user.args[0] is not result:
            continue
        if user.op == "call_function" and user.target in _OUT_OF_PLACE:
            user.target = _OUT_OF_PLACE[user.target]
        elif user.op == "call_function" and user.kwargs.get("inplace"):
            user.update_kwarg("inplace", False)
        elif (
            user.op == "call_method"
            and str(user.target).endswith("_")
            and not str(user.target).endswith("__")
        ):
            user.target = str(user.target)[:-1]
        else:
            continue
        order = {node: i for i, node in enumerate(graph.nodes)}
        later = [u for u in result.users if order[u] > order[user]]
        for other in later:
            other.replace_input_with(result, user)
