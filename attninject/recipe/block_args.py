"""The arguments of a block, as a rule gives them, held against what the block takes."""

from __future__ import annotations

from typing import Any

from .checks import plain_value
from .frozen import FrozenDict
from .report import Node, Report


def plain_args(node: Node, report: Report) -> Any:
    """The value of `args`: a mapping of plain values."""
    good = isinstance(node.value, dict)
    return plain_value(node, report) if good else report.expected(node, "a mapping such as {reduction: 16}")


def check_block_args(block: Node, args: Node, values: FrozenDict, report: Report) -> None:
    """Report each argument that the block does not take, or not with this value."""
    from attninject.blocks import registry

    for name, message in registry.check_args(block.value, values):
        key = args.value.get(name) if name is not None else None
        # An unknown name is wrong at the key, a bad value at the value.
        at = block if key is None else key[0] if "no argument" in message else key[1]
        report.add(at, message)
