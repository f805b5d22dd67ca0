"""Named places: sites that mean the same on every architecture, found from one recorded run.

Nothing here knows an architecture's name. Residual adds and their branches come from `residuals`, the
repeated units from `units`; a stage ends with the last unit at its resolution.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from .edits import base_class
from .errors import NoSuchPlaceError
from .flow import Flow, Spot, output_key
from .record import Call, Record
from .residuals import ResidualAdd, branch_end, producer, residual_adds
from .trace import public_forwards
from .units import Units, contains, resolution


class Map:
    """The places of one recorded run. `inside` limits them to what happens within one call."""

    def __init__(self, record: Record, inside: Call | None = None) -> None:
        self.record = record
        self.root = inside or record.calls[0]
        self.flow = Flow(record)

    @functools.cached_property
    def adds(self) -> list[ResidualAdd]:
        """Residual adds within the root."""
        return [a for a in residual_adds(self.flow) if self.within(a.owner)]

    @functools.cached_property
    def _named(self) -> set[int]:
        return {id(m) for m in self.root.module.modules()}

    def within(self, call: Call) -> bool:
        """Whether the call happened within the root, in a module that has a name there (none has one in a plain list)."""
        return (call is self.root or contains(self.root, call)) and id(call.module) in self._named

    @functools.cached_property
    def units(self) -> list[Call]:
        """The repeated units of the trunk, in order."""
        return Units(self.flow, self.root, self.adds).find()

    def resolution(self, spot: Spot) -> tuple[int, ...] | None:
        """Spatial extents at a spot after a call, or None where it has none."""
        return resolution(self.record, spot.value, getattr(spot.event, "module", None))

    @functools.cached_property
    def stages(self) -> list[Spot]:
        """After the last unit at each resolution; in a net of one resolution, after each third of its units."""
        rows: dict[tuple[int, ...], list[Spot]] = {}
        for unit in self.units:
            for spot in map(self._laid_out, self._streams(unit)):
                at = self.resolution(spot)
                if at is not None:
                    rows.setdefault(at, []).append(spot)
        if len(rows) == 1 and len(row := next(iter(rows.values()))) >= 3:
            return [row[round(len(row) * k / 3) - 1] for k in (1, 2, 3)]
        ends = sorted((row[-1] for row in rows.values()), key=lambda s: s.time)
        return [self._joined(s) for s in ends] or self._activations()

    def _streams(self, unit: Call) -> list[Spot]:
        """After a unit: its first result, and further ones that go on from an input (parallel resolutions)."""
        taken = {self.record.shape(i) for i in unit.ins}
        made = [o for o in dict.fromkeys(unit.outs) if o not in unit.ins]
        first = unit.outs[:1]
        return [
            _after(unit, o) for o in made if o in first or (len(taken) > 1 and self.record.shape(o) in taken)
        ]

    def _laid_out(self, spot: Spot) -> Spot:
        """The spot, or where a module around it puts its image blocks back into a map."""
        frame, value = spot.owner, spot.value
        cut = self.resolution(spot) is None and len(self.record.shape(value)) > 3
        while cut and frame is not None and frame is not self.root:
            maps = [o for o in frame.outs if self.flow.depends(o, value) and resolution(self.record, o)]
            if maps:
                return _after(frame, maps[0])
            frame = frame.parent
        return spot

    def _joined(self, end: Spot) -> Spot:
        """The spot, or the end of a module around it that joins it with what went past it.

        So a dense block stands for its last layer, a cross stage for the blocks that see half its channels.
        """
        frame, value, at = end.owner, end.value, self.resolution(end)
        while frame is not None and frame is not self.root and self.within(frame):
            others = [u for u in self.units if contains(frame, u)]
            elsewhere = (
                resolution(self.record, u.outs[0], u.module) not in (at, None) for u in others if u.outs
            )
            if len(frame.outs) == 1 and any(elsewhere):
                break  # not what ends this resolution, but what joins several
            joined = [o for o in frame.outs if resolution(self.record, o, frame.module) == at]
            if value not in frame.outs and len(joined) == 1 and self._bypassed(frame, value, joined[0]):
                value = joined[0]
                end = _after(frame, value)
            frame = frame.parent
        return end

    def _bypassed(self, frame: Call, value: int, out: int) -> bool:
        """Whether the module's result depends on the value, and on its inputs by another way too."""
        if not self.flow.depends(out, value):
            return False
        wanted = {out}
        for step in reversed(self.flow.steps):
            if frame.start < step.time < frame.end and not wanted.isdisjoint(set(step.outs) - {value}):
                wanted.update(step.ins)
        return not wanted.isdisjoint(frame.ins)

    def _activations(self) -> list[Spot]:
        """Nets without units: the last activation before each drop of the resolution."""
        groups: list[tuple[tuple[int, ...], list[Spot], bool]] = []
        for call in self.record.calls:
            leaf = _is_leaf(call)
            at = resolution(self.record, call.outs[0], call.module) if call.outs else None
            if not leaf or not self.within(call) or not at or max(at) == 1:
                continue
            if not groups or groups[-1][0] != at:
                groups.append((at, [], False))
            bits = sum(self.flow.bit(o) for op in call.ops() for o in op.outs if o in self.flow.number)
            same = bool(call.ins) and self.record.shape(call.ins[0]) == self.record.shape(call.outs[0])
            if same and bits & self.flow.active and not bits & self.flow.taught:
                groups[-1][1].append(_after(call, call.outs[0]))
            groups[-1] = (at, groups[-1][1], groups[-1][2] or bool(bits & self.flow.weighted))
        return [self._summed(spots[-1]) for _, spots, heavy in groups if spots and heavy]

    def _summed(self, end: Spot) -> Spot:
        """The spot, or behind the residual sum in the root's own forward whose branch it ends."""
        at, sums = (
            self.resolution(end),
            [a for a in self.adds if a.op.call is self.root and a.op.time > end.time],
        )
        if public_forwards(base_class(self.root.module)):
            return end  # they would pass by what is put into this one
        for add in sums:
            if self.flow.depends(add.branch, end.value) and resolution(self.record, add.out) == at:
                return Spot(add.op, "after", add.out)
        return end

    @functools.cached_property
    def spans(self) -> list[tuple[int, int]]:
        """Begin and end time of each stage; what comes before the first is the stem."""
        if not self.stages:
            return []
        begin = self.units[0].start if self.units else self.root.start
        ends = [s.time for s in self.stages]
        return list(zip([begin, *ends[:-1]], ends, strict=True))

    def stage_of(self, time: int) -> int:
        """Number of the stage, from 1; 0 outside all."""
        return next((n for n, (b, e) in enumerate(self.spans, 1) if b <= time <= e), 0)

    def spots(self, place: str) -> list[Spot]:
        """The spots of a place, in order.

        Raises:
            NoSuchPlaceError: the net has no such place; the message names those that it has.
        """
        found = PLACES[place](self)
        if found:
            return found
        others = [name for name, fn in PLACES.items() if name != place and fn(self)]
        raise NoSuchPlaceError(
            f"this {type(self.root.module).__name__} has no place {place!r}; "
            + (f"it has {', '.join(others)}" if others else "name modules with `after` or `before`")
            + self._unseen()
        )

    def _unseen(self) -> str:
        """What a message adds where the net calls modules that it does not hold as its own."""
        calls = (c for c in self.record.calls if contains(self.root, c) and id(c.module) not in self._named)
        classes = sorted(
            {type(c.module).__name__ for c in calls if type(c.module).__module__[:6] != "torch."}
        )
        return (
            f"; not seen are modules in a plain list or the like ({', '.join(classes)}): put them in an nn.ModuleList"
            if classes
            else ""
        )


# --- the places --------------------------------------------------------------------------------


def _is_leaf(call: Call) -> bool:
    """Whether a call is one layer's; what makes the weight of a parametrized one does not count."""
    return hasattr(call.module, "parametrizations") or not any(isinstance(e, Call) for e in call.events)


def _after(call: Call, value: int) -> Spot:
    return Spot(call, "after", value, output_key(call, value))


def _stage_end(net: Map) -> list[Spot]:
    return list(net.stages)


def _before_downsample(net: Map) -> list[Spot]:
    return net.stages[:-1]


def _block_end(net: Map) -> list[Spot]:
    return [_after(c, c.outs[0]) for c in net.units if c.outs]


def _block_start(net: Map) -> list[Spot]:
    return [Spot(c, "before", c.ins[0]) for c in net.units if c.ins]


def _shortcut(net: Map) -> list[Spot]:
    return [Spot(a.op, "before", a.shortcut, operand=a.op.ins.index(a.shortcut)) for a in net.adds]


def _stem_end(net: Map) -> list[Spot]:
    """What enters the first unit: after the module that made it, else before the unit."""
    first = next((u for u in net.units if u.ins), None)
    if first is None:
        return []
    value, frame = first.ins[0], first.parent
    while frame is not None and net.within(frame):
        made = producer(frame, value)
        if isinstance(made, Call) and net.within(made):
            return [_after(made, value)]
        frame = None if made else frame.parent
    return [Spot(first, "before", value)]


def _head_input(net: Map) -> list[Spot]:
    """The last value at the last stage's resolution, before it is pooled or a token is taken from it."""
    if not net.stages:
        return []
    last = net.stages[-1]
    at = net.resolution(last)
    for call in net.record.calls:
        if _is_leaf(call) and net.within(call) and call.start > last.time and call.outs:
            if resolution(net.record, call.outs[0], call.module) != at:
                break
            last = _after(call, call.outs[0]) if _can_carry(call) else last
    return [last]


def _can_carry(call: Call) -> bool:
    """Whether a block can stand behind it: a batch norm needs a lone module as its consumer, or to end a Sequential."""
    owner = call.parent
    if owner is None or not isinstance(call.module, _NormBase):
        return True
    users = [e for e in owner.events if call.outs[0] in e.ins and e is not call]
    ends = isinstance(owner.module, nn.Sequential) and owner.outs == call.outs
    return len(users) == 1 and isinstance(users[0], Call) if users else ends


def _residual_branch(net: Map) -> list[Spot]:
    return [s for a in net.adds if (s := branch_end(net.record, net.flow, a))]


PLACES: dict[str, Callable[[Map], list[Spot]]] = {
    "before_downsample": _before_downsample,
    "block_end": _block_end,
    "block_start": _block_start,
    "head_input": _head_input,
    "residual_branch": _residual_branch,
    "shortcut": _shortcut,
    "stage_end": _stage_end,
    "stem_end": _stem_end,
}
