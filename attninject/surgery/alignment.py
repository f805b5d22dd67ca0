"""The names of a training graph's calls and operations: those that their counterparts have in the eval graph.

Dropping paths adds operations of its own while training (`keep + torch.rand(…)`, a product with the mask), so counting
alone would give the name of the residual addition to another one.
"""

from __future__ import annotations

from collections.abc import Collection
from difflib import SequenceMatcher

from torch import fx

from .local_graph import SIZES, operation_name, targets


def align(train: fx.Graph, evaluated: fx.Graph) -> None:
    """Name the nodes of a training graph after those of the eval graph, in order; what only training has gets no name."""
    names = targets(evaluated)
    theirs, others = _tokens(evaluated), _tokens(train)
    known, nodes = [n for n in theirs if n in names], list(others)
    matcher = SequenceMatcher(None, [theirs[n] for n in known], [others[n] for n in nodes], autojunk=False)
    train.__dict__["_attninject_targets"] = {
        nodes[b + i]: names[known[a + i]] for a, b, size in matcher.get_matching_blocks() for i in range(size)
    }


def _tokens(graph: fx.Graph) -> dict[fx.Node, tuple[str, ...]]:
    """What each call or operation on the data is, and which of its operands are: for nodes alike in two graphs."""
    carrying: set[fx.Node] = set()
    found = {}
    for node in graph.nodes:
        if not _carries(node, carrying):
            continue
        carrying.add(node)
        kind = str(node.target) if node.op == "call_module" else f"::{operation_name(node)}"
        if node.op == "call_module" or operation_name(node):
            found[node] = (kind, *(_operand(i, carrying) for i in node.all_input_nodes))
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
