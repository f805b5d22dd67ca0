"""Where a net ends each resolution that it goes up to again: the ends of its decoder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from attninject.observe.record import Call, Record

from .dataflow import Flow, Spot
from .repeated_units import contains, is_leaf, positions, resolution

_ONE_STEP = 1.5  # maps whose extents differ by less belong to one step: a border was cut off or put on


class Net(Protocol):
    """What is asked of a `PlaceMap`."""

    record: Record
    root: Call
    flow: Flow

    @property
    def units(self) -> list[Call]:
        """The repeated units, in order."""
        ...

    @property
    def head(self) -> Call | None:
        """What reads maps of several resolutions with no layer behind."""
        ...

    def within(self, call: Call) -> bool:
        """Whether the call happened within the root, in a module that has a name."""
        ...

    def after(self, call: Call) -> Spot:
        """The spot at a call's first result."""
        ...

    def resolution(self, spot: Spot) -> tuple[int, ...] | None:
        """Spatial extents at a spot."""
        ...


def climb(net: Net, low: int) -> list[Spot]:
    """After the last call at each resolution above that of a value on which it depends, if a layer reads it later.

    A layer that begins the next step up, in a module that takes the last step's end in and gives a larger map, is not
    the last.
    """
    flow, units = net.flow, {id(u) for u in net.units}
    ends: dict[tuple[int, ...] | None, Spot] = {}
    lowest, start = positions(resolution(net.record, low)), flow.time[flow.number[low]]
    read = _read_by_layers(flow)
    whole = [u for u in net.units if u.outs]
    parts = [c for c in (*whole, *layers_outside(net, whole)) if c.start > start]
    for call in sorted(parts, key=lambda c: (id(c) in units, c.end)):  # units before others
        spot = net.after(call)
        at = net.resolution(spot)
        wanted = flow.bit(spot.value) & read and flow.depends(spot.value, low)
        does = flow.made_by(call.ops()) & (flow.weighted | flow.active)
        if positions(at) <= lowest or not wanted or not does:
            continue
        if id(call) in units or at not in ends or not _begins_a_step(net, call, ends[at]):
            ends[at] = spot
    last = [s for s in ends.values() if not any(_one_step(net, s, t) for t in ends.values())]
    return [_around(net, s, last, start, read) for s in last]


def layers_outside(net: Net, units: list[Call]) -> Iterator[Call]:
    """The layers that run outside these units and the head."""
    closed = [*units, *([net.head] if net.head else ())]
    for call in net.record.calls:
        if call.outs and net.within(call) and is_leaf(call) and not any(contains(c, call) for c in closed):
            yield call


def _read_by_layers(flow: Flow) -> int:
    """The values that a convolution or a linear layer depends on."""
    past = 0
    for value in flow.members(flow.weighted):
        past |= flow.past(value) & ~flow.bit(value)
    return past


def _begins_a_step(net: Net, call: Call, end: Spot) -> bool:
    """Whether a module around a layer is given what an end of its resolution leads to, and gives a larger map."""
    at, frame = net.resolution(end), call.parent
    while frame is not None and frame is not net.root:
        given = (i for i in frame.ins if resolution(net.record, i) == at)
        up = frame.outs and positions(net.resolution(net.after(frame))) > positions(at)
        if up and any(net.flow.depends(i, end.value) for i in given):
            return True
        frame = frame.parent
    return False


def _one_step(net: Net, end: Spot, later: Spot) -> bool:
    """Whether the second end is the first with a border cut off or put on."""
    pairs = zip(net.resolution(end) or (), net.resolution(later) or (), strict=False)
    near = all(max(a, b) < _ONE_STEP * min(a, b) for a, b in pairs)
    return later is not end and near and net.flow.depends(later.value, end.value)


def _around(net: Net, end: Spot, others: list[Spot], start: int, read: int) -> Spot:
    """The spot, or the end of a module around it that gives one map of this resolution and holds no other end.

    Nor may it have begun before a time, or be the last that a layer reads.
    """
    frame, at = end.owner, net.resolution(end)
    while frame is not None and net.within(frame) and frame.start > start and len(frame.outs) == 1:
        holds = any(frame.start < s.time < frame.end for s in others if net.resolution(s) != at)
        out = net.after(frame)
        if holds or net.resolution(out) != at or not net.flow.bit(out.value) & read:
            break
        end = out if net.flow.depends(out.value, end.value) else end
        frame = frame.parent
    return end
