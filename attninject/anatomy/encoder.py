"""Where a net goes down to its lowest resolution, where it goes up again, and what reads the maps that it made.

An encoder's units depend on nothing that has fewer positions than they have; a decoder's, or a neck's, do. Parallel
streams that exchange what they know depend on each other too: there the lowest resolution itself comes after a higher
one that has gone up, and nothing is a decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from attninject.observe.record import Call
from attninject.surgery.injected_state import base_class

from .dataflow import Flow, Spot, kind
from .repeated_units import contains, positions, resolution


def going_up(flow: Flow, values: Sequence[int], sizes: Sequence[int], whole: int) -> set[int] | None:
    """Those of these values that lie behind one of fewer positions: a decoder's, or a neck's.

    Args:
        flow: the net's dataflow.
        values: results of its units, or other steps of its way, in order.
        sizes: their numbers of positions; 0 for what is no map.
        whole: the number of positions of the input.

    Returns:
        The values; None where some do, but the way leads only up (a generator), or the lowest resolution is behind
        one of them or beside the higher ones (parallel streams).
    """
    found: set[int] = set()
    for n, (value, size) in enumerate(zip(values, sizes, strict=True)):
        before = zip(values[:n], sizes[:n], strict=True)
        lower = (v for v, s in before if v in found or 0 < s < size)
        if any(flow.depends(value, v) for v in lower):
            found.add(value)
    down = [(v, s) for v, s in zip(values, sizes, strict=True) if s and v not in found]
    return found if not found or _is_way_down(flow, down, min(filter(None, sizes)), whole) else None


def _is_way_down(flow: Flow, down: Sequence[tuple[int, int]], lowest: int, whole: int) -> bool:
    """Whether these values, with their numbers of positions, lead from the image to the lowest resolution."""
    most = max((s for _, s in down), default=0)
    starts = [v for v, s in down if s == most]
    alone = (v for v, s in down if s < most and not any(flow.depends(v, w) for w in starts))
    return lowest < whole and any(s == lowest for _, s in down) and not any(alone)


def without_bridge(units: list[Call], sizes: list[int], roles: Callable[[Call], set[str]]) -> list[Call]:
    """Without what stands alone at the bottom between encoder and decoder.

    No other unit has its class, or its role or that of a module around it: `roles` gives these.
    """
    units = list(units)
    while len(units) > 2 and sizes[len(units) - 1] == sizes[len(units) - 2]:
        last = units[-1]
        cls, around = base_class(last.module), roles(last)
        alike = (base_class(u.module) is cls or roles(u) & around for u in units[:-1])
        if any(alike):
            break
        units.pop()
    return units


def on_the_way_down(flow: Flow, down: list[Call], up: list[Call], sizes: list[int]) -> list[Call]:
    """Those of the units before the decoder that are the encoder's: neither a neck's, nor on a path past the bottom.

    Args:
        flow: the net's dataflow.
        down: the units that lie behind nothing of fewer positions.
        up: the others.
        sizes: how many positions the results of `down` have.
    """
    classes = {base_class(u.module) for u in up}
    last = max((u.start for u in down if base_class(u.module) not in classes), default=1 << 60)
    kept = [u for u in down if u.start <= last]  # behind them stand a neck's, of the decoder's class
    size = dict(zip(map(id, down), sizes, strict=True))
    lowest = min((size[id(u)] for u in kept if size[id(u)]), default=0)
    joined = [u.outs[0] for u in kept if size[id(u)] == lowest and _joins(flow, u, kept)]
    kept = [u for u in kept if not any(flow.depends(u.outs[0], j) for j in joined)]
    low = [u.outs[0] for u in kept if size[id(u)] == lowest]
    return [u for u in kept if any(flow.depends(v, u.outs[0]) for v in low)]


def _joins(flow: Flow, unit: Call, units: list[Call]) -> bool:
    """Whether a unit is given what one made side by side with what an earlier one did: there a way up begins."""
    made = [u.outs[0] for u in units]
    for step in flow.steps:
        if kind(step.ops[0]) != "cat" or not set(step.outs) & set(unit.ins):
            continue
        between = not any(u.start < step.time < u.end for u in units)  # in a dense layer it is no way up
        return between and any(flow.depends(v, w) for w in made if w in step.ins for v in step.ins if v != w)
    return False


def towers(flow: Flow, rows: Iterable[list[Spot]]) -> list[list[Spot]]:
    """The rows of units at each resolution, divided where several ways lead down that share nothing (two inputs).

    A way that runs once more, for the second image of a pair, is the same way.
    """
    rows = list(rows)
    every = sum(flow.bit(s.value) for row in rows for s in row)
    divided = [_apart(flow, row, every) for row in rows]
    if sum(len(parts) > 1 for parts in divided) < 2:
        return rows
    return [part for parts in divided for part in parts]


def _apart(flow: Flow, row: list[Spot], every: int) -> list[list[Spot]]:
    """One row, a part for each way."""
    ends = [s for s in row if not any(t is not s and flow.depends(t.value, s.value) for t in row)]
    pasts = [flow.past(s.value) & every for s in ends]
    shared = any(a & b for n, a in enumerate(pasts) for b in pasts[:n])
    if shared or len({id(s.module) for s in ends}) < len(ends):
        return [row]
    return [[s for s in row if flow.depends(end.value, s.value)] for end in ends]


# --- what reads the maps -----------------------------------------------------------------------


def head(flow: Flow, calls: Iterable[Call], units: list[Call]) -> Call | None:
    """The outermost call that reads maps of several resolutions, with no layer behind it: a detector's head.

    One that gives one map of a resolution that it takes is a decoder; one that holds units is a part of the trunk.
    A run may have stopped inside it: what it gives then depends on values.
    """
    for call in calls:
        sizes = {positions(resolution(flow.record, i)) for i in dict.fromkeys(call.ins)} - {0}
        if len(sizes) < 2 or any(call is u or contains(call, u) for u in units):
            continue
        one_map = len(call.outs) == 1 and positions(resolution(flow.record, call.outs[0])) in sizes
        if not one_map and not goes_on(flow, call):
            return call
    return None


def goes_on(flow: Flow, call: Call) -> bool:
    """Whether a layer outside a call works on its result."""
    behind = (v for v in flow.members(flow.weighted) if flow.time[flow.number[v]] > call.end)
    return any(flow.depends(v, o) for v in behind for o in call.outs)


def is_head(flow: Flow, unit: Call, units: list[Call]) -> bool:
    """Whether what looks like a unit is the head: see `head`."""
    return head(flow, [unit], [u for u in units if u is not unit]) is unit
