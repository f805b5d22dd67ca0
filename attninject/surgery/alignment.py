"""The names of calls and operations in another graph of the same forward: those that their counterparts have.

Dropping paths adds operations of its own while training (`keep + torch.rand(…)`, a product with the mask), and another
input size may lead to a branch with more sums, so counting alone would give the name of the residual addition to another
one.
"""

from __future__ import annotations

from collections.abc import Collection
from difflib import SequenceMatcher

from torch import fx

from .local_graph import SIZES, LocalGraph, operation_name, rename, targets


def name_after(local: LocalGraph, named: LocalGraph) -> None:
    """Name the nodes of a forward's graphs as an earlier trace of it does."""
    align(local.eval, named.eval)
    if local.train is not local.eval:
        align(local.train, local.eval)
    local.named_by = named.names_from


def align(graph: fx.Graph, named: fx.Graph) -> None:
    """Name the nodes of a graph after those of `named`, in order; inputs keep theirs, what `named` lacks gets no name."""
    names, own = targets(named), targets(graph)
    theirs, others = _tokens(named), _tokens(graph)
    known, nodes = [n for n in theirs if n in names], list(others)
    matcher = SequenceMatcher(None, [theirs[n] for n in known], [others[n] for n in nodes], autojunk=False)
    rename(
        graph,
        {node: target for node, target in own.items() if target.kind == "input"}
        | {
            nodes[b + i]: names[known[a + i]]
            for a, b, size in matcher.get_matching_blocks()
            for i in range(size)
        },
    )


def _tokens(graph: fx.Graph) -> dict[fx.Node, tuple[str, ...]]:
    """What each call or operation on the data is: for nodes alike in two graphs.

    Of an operation also which of its operands are data; a child's call may get more or fewer options.
    """
    carrying: set[fx.Node] = set()
    found: dict[fx.Node, tuple[str, ...]] = {}
    for node in graph.nodes:
        if not _carries(node, carrying):
            continue
        carrying.add(node)
        if node.op == "call_module":
            found[node] = (str(node.target),)
        elif kind := operation_name(node):
            found[node] = (f"::{kind}", *(_operand(i, carrying) for i in node.all_input_nodes))
    return found


def _carries(node: fx.Node, carrying: Collection[fx.Node]) -> bool:
    """Whether a node holds data: not a size, nor something drawn or made for one."""
    if node.op in ("placeholder", "get_attr", "call_module"):
        return True
    if node.target in SIZES or (node.target is getattr and node.args[1] in SIZES):
        return False
    name = operation_name(node)
    made = name.startswith("new_") or name.endswith("_like")
    return not made and any(i in carrying for i in node.all_input_nodes)


def _operand(node: fx.Node, carrying: Collection[fx.Node]) -> str:
    if node.op == "get_attr":
        return str(node.target)
    return "data" if node in carrying else "other"
