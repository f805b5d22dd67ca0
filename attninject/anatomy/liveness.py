"""Which tokens of a sequence the rest of a recorded run looks at.

A head that takes the class token alone leaves the positions of the last block unread: a block of ours put there
works on what nobody sees, and learns nothing. Plans say so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from attninject.observe.record import Op, Record

from .dataflow import MOVES, kind
from .token_grid import Positions

_PREFIX, _ALL = 1, 2  # how much of a value is read: its tokens without a position, or all

_TOKEN_BY_TOKEN = MOVES | frozenset(
    {
        "slice", "select", "split", "split_with_sizes", "unbind", "cat", "narrow", "expand", "detach", "_to_copy",
        "add", "sub", "rsub", "mul", "div", "neg", "gelu", "relu", "silu", "sigmoid", "tanh", "hardswish",
        "native_dropout", "native_layer_norm", "mm", "addmm", "linear",
    }
)  # fmt: skip


def read_positions(record: Record, positions: Positions) -> frozenset[int]:
    """The values with numbered positions (`Positions.marks`) of which some are read, up to the model's result.

    Errs towards reading: operations that mix tokens read all of what they take, save an attention's queries.
    """
    numbered = functools.cache(positions.numbered)
    read = dict.fromkeys(record.calls[0].outs, _ALL)
    for op in reversed(list(record.calls[0].ops())):
        wanted = max((read.get(o, 0) for o in op.outs), default=0)
        if not wanted:
            continue
        for at, value in enumerate(op.ins):
            read[value] = max(read.get(value, 0), _share(op, at, wanted, numbered))
    return frozenset(v for v, share in read.items() if share == _ALL)


def _share(op: Op, at: int, wanted: int, numbered: Callable[[int], bool | None]) -> int:
    """How much of one operand a wanted result reads."""
    if numbered(op.outs[0]) is None:
        return _ALL
    if wanted == _ALL and any(numbered(o) for o in op.outs):
        return _ALL
    name = kind(op)
    queries = at == 0 and (name in ("bmm", "_softmax") or "scaled_dot_product" in name)
    return _PREFIX if queries or name in _TOKEN_BY_TOKEN else _ALL
