"""Stages of one resolution, where strides were traded for dilation or left out.

A network that is asked for a larger map (`output_stride`, `replace_stride_with_dilation`) keeps its widths and drops
the strides of its last stages; the convolutions behind each dropped stride are dilated in its place. What shows it is
the dilation. The first unit of such a stage keeps the dilation of those before, though: a stage of one unit shows
none, nor does one of attention. There the widths tell, as many as there are strides missing to the usual 32nd.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from attninject.observe.record import Call
from attninject.surgery.injected_state import base_class

from .dataflow import Flow, Spot, kind
from .residual_adds import ResidualAdd

_USUAL = 32  # the stride of a classifier's last map


def divided_by_dilation(
    flow: Flow,
    rows: list[list[Spot]],
    adds: list[ResidualAdd],
    resolution: Callable[[Spot], tuple[int, ...] | None],
    role: Callable[[Call], str],
) -> list[list[Spot]]:
    """The units of each resolution, divided where a stride was traded for dilation.

    Args:
        flow: the net's dataflow.
        rows: after each unit, in order, those of one resolution together.
        adds: the residual adds.
        resolution: at a spot; not None at these.
        role: of a call, see `Units.role`.
    """
    if not rows:
        return []
    given = flow.record.shape(flow.record.input_values[0])[2:]
    sizes = [resolution(row[0]) or () for row in rows]
    lowest = min(map(math.prod, sizes), default=0)
    return [
        part
        for row, at in zip(rows, sizes, strict=True)
        for part in _divided(flow, row, adds, role, _missing(given, at) if math.prod(at) == lowest else 0)
    ]


def _missing(given: tuple[int, ...], at: tuple[int, ...]) -> int:
    """How many strides of two a map of size `at` is short of the usual 32nd of an image of size `given`.

    0 for tokens in a row and for sequences.
    """
    if len(at) != len(given) or len(at) < 2:
        return 0
    return max(0, round(math.log2(_USUAL * at[-1] / given[-1])))


def _divided(
    flow: Flow, row: list[Spot], adds: list[ResidualAdd], role: Callable[[Call], str], missing: int
) -> list[list[Spot]]:
    """One row; `missing` strides are to be found in it by the widths where the dilations do not show them."""
    calls = [s.event for s in row if isinstance(s.event, Call) and s.event.ins]
    if len(calls) < len(row):
        return [row]
    begins = _dilated(flow, calls, _starts(flow, calls, adds))
    if len(begins) != missing and len(wider := _wider_containers(flow, calls, role)) == missing:
        begins = wider
    return [row[a:b] for a, b in zip([0, *begins], [*begins, len(row)], strict=True)]


def _starts(flow: Flow, calls: Sequence[Call], adds: list[ResidualAdd]) -> list[int]:
    """Where a stage may begin: the first unit, those of another width than their input's, those behind another layer.

    One that projects its shortcut at the same width is one, too.
    """
    shape = flow.record.shape
    owned = (a for a in adds if a.owner.ins)
    projects = {id(a.owner) for a in owned if flow.weights(flow.only(a.shortcut, a.owner.ins[0]))}
    found = [0]
    for n, (before, call) in enumerate(itertools.pairwise(calls), 1):
        given = shape(call.ins[0])
        if given != shape(call.outs[0]) or id(call) in projects or given != shape(before.outs[0]):
            found.append(n)
    return found


def _dilated(flow: Flow, calls: Sequence[Call], starts: list[int]) -> list[int]:
    """The starts from which on the units have a larger dilation than all before.

    The one of its class before keeps the old dilation: the unit that would have the stride itself, at whatever width.
    Where none at this width does, a lone unit of another before it is that one.
    """
    dilations, classes = [_dilation(flow, c) for c in calls], [base_class(c.module) for c in calls]
    parts = [dilations[a:b] for a, b in zip(starts, [*starts[1:], len(calls)], strict=True)]
    later = [d for part in parts for d in part[1:] if d]
    if sorted(later) != later:
        return []  # a pattern within a stage
    found: list[int] = []
    level = max(1, *parts[0])
    for n in range(1, len(parts)):
        if max(parts[n]) <= level:
            continue
        level = max(parts[n])
        lone = n > 1 and len(parts[n - 1]) == 1 and starts[n - 1] not in found
        larger = starts[n] + parts[n].index(level)
        alike = [k for k in range(starts[n], larger) if classes[k] is classes[larger]]
        found.append(starts[n - 1] if lone and parts[n][0] == level else max(alike, default=starts[n]))
    return found


def _wider_containers(flow: Flow, calls: Sequence[Call], role: Callable[[Call], str]) -> list[int]:
    """The units that begin a container like the one before (`layer4` behind `layer3`) with a result of another width."""
    shape = flow.record.shape
    begins = [0, *(n for n in range(1, len(calls)) if calls[n].parent is not calls[n - 1].parent)]
    ends = [calls[n - 1] for n in (*begins[1:], len(calls))]
    found = []
    for n, before, end in zip(begins[1:], ends, ends[1:], strict=False):
        inner, outer = before.parent, end.parent
        alike = inner is not None and outer is not None and role(inner) == role(outer)
        if alike and shape(before.outs[0]) != shape(end.outs[0]):
            found.append(n)
    return found


def _dilation(flow: Flow, call: Call) -> int:
    """The largest dilation of a call's convolutions over neighbours; 0 where it has none."""
    found = [0]
    for op in call.ops():
        if kind(op) in ("convolution", "_convolution") and max(flow.record.shape(op.ins[1])[2:]) > 1:
            found += op.given[0][5]
    return max(found)
