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

from .injected_state import Insertion
from .layout_adapters import run_block, run_replacement
from .local_graph import IN_PLACE, find


def layout_arguments(layout: Layout) -> tuple[Any, ...]:
    """Arguments of `run_block` behind the value, the defaults left out."""
    if layout.kind == "NLC" or layout.grid:
        return (layout.kind, layout.prefix, layout.grid)
    return () if layout.kind == "NCHW" else (layout.kind,)


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
    found = []
    for insertion in edit:
        assert insertion.target is not None
        node = find(graph, insertion.target)
        if node is None:
            raise CannotRewriteError(
                f"the forward of {base.__qualname__} no longer has {insertion.target.name} "
                f"(call {insertion.target.number}), where the block {insertion.name!r} belongs"
            )
        found.append((insertion, copies[node]))
    newest: dict[tuple[fx.Node, Any], fx.Node] = {}
    results = []
    for insertion, node in found:
        if insertion.position == "before":
            results.append(_insert_before(new, node, insertion))
            continue
        key = (node, insertion.output)
        value = newest.get(key) or _value_after(new, node, insertion.output)
        made_of = node if insertion.position == "replace" else None
        result = newest[key] = _insert_after(new, value, insertion, made_of)
        results.append(result)
    for result in results:
        if result.target in (run_block, run_replacement):  # else it is a copy already
            _protect(new, result)
    return new


def _block_node(graph: fx.Graph, insertion: Insertion, value: Any) -> fx.Node:
    block = graph.create_node("get_attr", insertion.name)
    given = graph.call_method("clone", (value,)) if insertion.copy_given else value
    result = graph.call_function(run_block, (block, given, *layout_arguments(insertion.layout)))
    return graph.call_method("clone", (result,)) if insertion.copy_result else result


def _insert_before(graph: fx.Graph, node: fx.Node, insertion: Insertion) -> fx.Node:
    operand = insertion.operand
    with graph.inserting_before(node):
        if isinstance(operand, str):
            result = _block_node(graph, insertion, node.kwargs[operand])
            node.update_kwarg(operand, result)
        else:
            result = _block_node(graph, insertion, node.args[operand])
            node.update_arg(operand, result)
    return result


def _replacement_node(graph: fx.Graph, insertion: Insertion, value: fx.Node, call: fx.Node) -> fx.Node:
    """What stands in the place of a child, behind its call: given what the child was given, and what it gave."""
    operand = insertion.operand
    given = call.kwargs[operand] if isinstance(operand, str) else call.args[operand]
    if insertion.copy_given:
        with graph.inserting_before(call):
            given = graph.call_method("clone", (given,))
    block = graph.create_node("get_attr", insertion.name)
    module = graph.create_node("get_attr", str(call.target))
    arguments = (block, given, value, module, *layout_arguments(insertion.layout))
    result = graph.call_function(run_replacement, arguments)
    return graph.call_method("clone", (result,)) if insertion.copy_result else result


def _insert_after(graph: fx.Graph, value: fx.Node, insertion: Insertion, call: fx.Node | None) -> fx.Node:
    """`call`: of the child whose place the block takes; None where it is given the value alone."""
    users = list(value.users)
    with graph.inserting_before(value.next):
        if call is None:
            result = _block_node(graph, insertion, value)
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
