"""Where the named places of one recorded run are."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from attninject.observe.record import Call, Op, Record
from attninject.surgery.injected_state import base_class
from attninject.surgery.local_graph import public_forwards

from .dataflow import Flow, Spot, kind, operand_of, output_key
from .dilation import divided_by_dilation
from .encoder import goes_on, going_up, head, is_head, on_the_way_down, towers, without_bridge
from .loops import LoopRun
from .repeated_units import Units, contains, is_leaf, positions, resolution
from .residual_adds import ResidualAdd, branch_end, producer, residual_adds
from .way_up import climb, layers_outside


class PlaceMap:
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
        """The repeated units of the trunk, and of a decoder, in order; a detector's head is none."""
        found = self._finder.find()
        leaves = (c for c in self.record.calls if c.outs and is_leaf(c) and self.within(c))
        if not self.adds and going_up(self.flow, *self._sized(map(self.after, leaves)), self._whole):
            found = self._finder.of_main_class() or found
        return [u for u in found if not is_head(self.flow, u, found)]

    @functools.cached_property
    def _finder(self) -> Units:
        return Units(self.flow, self.root, self.adds)

    @functools.cached_property
    def _whole(self) -> int:
        """How many positions the input has."""
        given = self.record.input_values[:1]
        return math.prod(self.record.shape(given[0])[2:]) if given else 0

    def _sized(self, spots: Iterable[Spot]) -> tuple[list[int], list[int]]:
        """The values at some spots, and how many positions each has."""
        spots = list(spots)
        return [s.value for s in spots], [positions(self.resolution(s)) for s in spots]

    @functools.cached_property
    def _up(self) -> set[int] | None:
        """Results of the units that belong to a decoder or a neck; None where what goes up is none."""
        units = [u for u in self.units if u.outs]
        if any(len({self.resolution(s) for s in self._streams(u)}) > 1 for u in units):
            return None
        way = units if self.adds else sorted([*units, *layers_outside(self, units)], key=lambda c: c.end)
        return going_up(self.flow, *self._sized(map(self.after, way)), self._whole)

    @functools.cached_property
    def encoder(self) -> list[Call]:
        """The units on the way down from the image; all of them in a net that does not go up again."""
        units = [u for u in self.units if u.outs]
        found = [u for u in units if u.outs[0] not in (self._up or ())]
        if found != units:
            up = [u for u in units if u.outs[0] in (self._up or ())]
            found = on_the_way_down(self.flow, found, up, self._sized(map(self.after, found))[1])
        values, sizes = self._sized(map(self.after, found))
        at = [v for v, size in zip(values, sizes, strict=True) if size == min(filter(None, sizes), default=0)]
        return without_bridge(found, sizes, self._finder.roles) if at and climb(self, at[-1]) else found

    def resolution(self, spot: Spot) -> tuple[int, ...] | None:
        """Spatial extents at a spot after a call, or None where it has none."""
        return resolution(self.record, spot.value, getattr(spot.event, "module", None))

    @functools.cached_property
    def stages(self) -> list[Spot]:
        """After the last unit at each resolution on the way down; in a net of one resolution, after each third.

        A stride that was traded for dilation ends a stage too, and each of several ways down has its own.
        """
        rows: dict[tuple[int, ...], list[Spot]] = {}
        for unit in self.encoder:
            for spot in map(self._laid_out, self._streams(unit)):
                at = self.resolution(spot)
                if at is not None:
                    rows.setdefault(at, []).append(spot)
        ways = towers(self.flow, rows.values())
        parts = divided_by_dilation(self.flow, ways, self.adds, self.resolution, self._finder.role)
        if len(parts) == 1 and len(row := parts[0]) >= 3:
            return [row[round(len(row) * k / 3) - 1] for k in (1, 2, 3)]
        ends = sorted((part[-1] for part in parts), key=lambda s: s.time)
        return [self._joined(s) for s in ends] or self._plain()

    def _plain(self) -> list[Spot]:
        """Nets whose way down has no units: the last activation before each drop of the resolution."""
        ends = self._activations()
        up = going_up(self.flow, *self._sized(ends), self._whole)
        if not up:
            return ends
        first = min(s.time for s in ends if s.value in up)
        return [*{self.resolution(s): s for s in ends if s.time < first}.values()]

    @functools.cached_property
    def decoder(self) -> list[Spot]:
        """The last value at each resolution that the net goes up to again, before its last layer and its head."""
        if self._up is None or not self.stages:
            return []
        low = min(self.stages, key=lambda s: (positions(self.resolution(s)), -s.time))
        return sorted(climb(self, low.value), key=lambda s: s.time)

    @functools.cached_property
    def head(self) -> Call | None:
        """What reads maps of several resolutions, with no layer behind it: a detector's head."""
        inner = (c for c in self.record.calls if contains(self.root, c) and self.within(c))
        return head(self.flow, inner, self.units)

    def _streams(self, unit: Call) -> list[Spot]:
        """After a unit: its first result, and further ones that go on from an input (parallel resolutions)."""
        taken = {self.record.shape(i) for i in unit.ins}
        made = [o for o in dict.fromkeys(unit.outs) if o not in unit.ins]
        first = unit.outs[:1]
        return [
            after_call(unit, o)
            for o in made
            if o in first or (len(taken) > 1 and self.record.shape(o) in taken)
        ]

    def _laid_out(self, spot: Spot) -> Spot:
        """The spot, or where a module around it puts its image blocks back into a map."""
        frame, value = spot.owner, spot.value
        shape, given = self.record.shape(value), self.record.input_values[:1]
        folded = bool(given) and shape[0] != self.record.shape(given[0])[0]  # windows in the batch
        cut = self.resolution(spot) is None and (len(shape) > 3 or (len(shape) == 3 and folded))
        while cut and frame is not None and frame is not self.root:
            maps = [o for o in frame.outs if self.flow.depends(o, value) and resolution(self.record, o)]
            if maps:
                return after_call(frame, maps[0])
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
            taken = {resolution(self.record, i) for i in frame.ins} - {None}
            if (len(frame.outs) == 1 or len(taken) == 1) and any(elsewhere):
                break  # not what ends this resolution, but what joins several, or goes through them
            joined = [o for o in frame.outs if resolution(self.record, o, frame.module) == at]
            if value not in frame.outs and len(joined) == 1 and self._bypassed(frame, value, joined[0]):
                value = joined[0]
                end = after_call(frame, value)
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
        """Nets without units: the last activation before each drop of the resolution, a module's or a function's.

        A layer that works before it counts; one whose map is pooled before it is bent works for the next.
        """
        ends, last, at = list[Spot](), None, None
        heavy = behind = False  # a layer worked since the last end; behind the last activation
        for event in self._parts(self.root):
            module = event.module if isinstance(event, Call) else None
            now = resolution(self.record, event.outs[0], module) if event.outs else None
            if not now or max(now) == 1:
                continue
            made = self.flow.made_by(event.ops() if isinstance(event, Call) else (event,))
            acts = self._bends(event, made)
            if isinstance(event, Op) and not (acts and self._is_next(event, last, behind)):
                continue
            if now != at:
                ends, heavy = ([*ends, last], behind) if last and heavy else (ends, heavy)
                last, at = None, now
            if made & self.flow.weighted:
                heavy = behind = True
            if acts and (last is None or self.is_shared(event.outs[0], last.value)):
                last, behind = self._after_part(event), False
        return [self._summed(self.unshared(s)) for s in ([*ends, last] if last and heavy else ends)]

    def _bends(self, event: Call | Op, made: int) -> bool:
        """Whether a layer or an operation is an activation: `made`, its values, are bent, and the shape stays."""
        same = bool(event.ins) and self.record.shape(event.ins[0]) == self.record.shape(event.outs[0])
        return same and bool(made & self.flow.active) and not made & self.flow.layered

    def _is_next(self, event: Op, last: Spot | None, behind: bool) -> bool:
        """Whether an activation that is no module may stand for the last one: no norm of the map, nor a step of one."""
        if kind(event) == "div":
            return False  # SSD's, by the map's own length
        return last is None or behind or self.record.shape(last.value) == self.record.shape(event.outs[0])

    def _parts(self, call: Call) -> Iterator[Call | Op]:
        """The layers within a call, and the operations around them that a block can stand behind, in order."""
        closed = call is self.root and public_forwards(base_class(call.module))
        for event in call.events:
            if isinstance(event, Op):
                yield from () if closed else (event,)
            elif is_leaf(event):
                yield from (event,) if self.within(event) else ()
            elif self.within(event):
                yield from self._parts(event)

    def _after_part(self, event: Call | Op) -> Spot:
        """The spot after a layer or an operation; after the module whose result an operation gives."""
        if isinstance(event, Call):
            return self.after(event)
        ends = event.call is not self.root and event.call.outs == event.outs
        return self.after(event.call) if ends else Spot(event, "after", event.outs[0])

    def unshared(self, end: Spot) -> Spot:
        """The spot, or after the caller of an activation that several modules share, if that gives the same value."""
        callers = {id(c.parent.module) for c in self.record.calls_of(end.module) if c.parent}
        owner = end.owner
        alone = owner is None or len(callers) == 1 or owner.outs != (end.value,) or not self.within(owner)
        return end if owner is None or alone else self.after(owner)

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

    def unseen(self) -> str:
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

    # --- words for the places ------------------------------------------------------------------

    def after(self, call: Call) -> Spot:
        """The spot at a call's first result."""
        return after_call(call, call.outs[0])

    def before(self, call: Call) -> Spot:
        """The spot at a call's first input; where that is an item of a list, its operand is the list."""
        value = call.ins[0]
        if isinstance(call, LoopRun) and call.parent:
            made = producer(call.parent, value)
            if made is not None:
                return Spot(made, "after", value, output_key(made, value))
            call = call.parent
        return Spot(call, "before", value, operand=operand_of(call, value))

    def branch_ends(self) -> list[Spot]:
        """The branch's last value before each residual add that has one."""
        return [s for a in self.adds if (s := branch_end(self.record, self.flow, a))]

    def shortcuts(self) -> list[Spot]:
        """The shortcut operand of each residual add."""
        return [Spot(a.op, "before", a.shortcut, operand=a.op.ins.index(a.shortcut)) for a in self.adds]

    def layers_behind(self, spot: Spot) -> Iterator[Call]:
        """The layers that run behind a spot and give something, in call order."""
        for call in self.record.calls:
            if is_leaf(call) and self.within(call) and call.start > spot.time and call.outs:
                yield call

    def is_shared(self, value: int, earlier: int) -> bool:
        """Whether all results that depend on an earlier value depend on this one: it is in no head of several."""
        flow = self.flow
        return all(flow.depends(o, value) for o in self.root.outs if flow.depends(o, earlier))

    def gives_map(self, call: Call) -> bool:
        """Whether a call is the last convolution or linear layer before a result of the net that is no vector."""
        flow, value = self.flow, call.outs[0]
        maps = (o for o in self.root.outs if len(self.record.shape(o)) > 2)
        last = flow.bit(value) & flow.weighted and not goes_on(flow, call)
        return bool(last) and any(flow.depends(o, value) for o in maps)

    def ends_a_way(self, end: Spot) -> bool:
        """Whether a stage end is the last of its way down, where there are several to one resolution."""
        last = self.stages[-1]
        same = self.resolution(end) == self.resolution(last)
        return same and not self.flow.depends(last.value, end.value)

    def read_by_head(self) -> list[Spot]:
        """After the modules that made the maps which a detector's head reads; none where there is no such head."""
        head = self.head
        maps = [i for i in dict.fromkeys(head.ins) if positions(resolution(self.record, i))] if head else []
        made = [self.made_by(head, i) for i in maps] if head else []
        return sorted((s for s in made if s), key=lambda s: s.time)

    def made_by(self, call: Call, value: int) -> Spot | None:
        """The spot after the module that made a value which enters a call; None where an operation made it."""
        frame = call.parent
        while frame is not None and self.within(frame):
            made = producer(frame, value)
            if isinstance(made, Call) and self.within(made):
                return after_call(made, value)
            frame = None if made else frame.parent
        return None

    def inside_repeated(self, spot: Spot) -> Spot:
        """The spot, or where its module makes the value, if the net itself calls that for several inputs side by side.

        Its calls cannot be told apart there, and are one site: parts of one image, two images of a pair.
        """
        call = spot.event
        if not isinstance(call, Call) or spot.position != "after" or is_leaf(call) or not self._repeats(call):
            return spot
        made = producer(call, spot.value)
        return Spot(made, "after", spot.value, output_key(made, spot.value)) if made else spot

    def _repeats(self, call: Call) -> bool:
        """Whether the outermost forward calls a module several times, and no call depends on another."""
        if call.parent is None or call.parent not in (self.root, self.record.calls[0]):
            return False
        calls = [e for e in call.parent.events if isinstance(e, Call) and e.module is call.module]
        pairs = itertools.combinations(calls, 2)
        return len(calls) > 1 and not any(
            self.flow.depends(o, i) for a, b in pairs for i in a.outs for o in b.outs
        )

    def is_out_of_reach(self, spot: Spot) -> bool:
        """Whether a spot is after a batch norm that cannot carry a block, in a forward that takes none either."""
        outermost = spot.owner in (self.root, self.record.calls[0])
        return isinstance(spot.event, Call) and outermost and not self.can_carry(spot.event)

    @staticmethod
    def can_carry(call: Call) -> bool:
        """Whether a block can stand behind it: a batch norm needs a lone module as its reader, or to end a Sequential."""
        owner = call.parent
        if owner is None or not isinstance(call.module, _NormBase):
            return True
        users = [e for e in owner.events if call.outs[0] in e.ins and e is not call]
        ends = isinstance(owner.module, nn.Sequential) and owner.outs == call.outs
        return len(users) == 1 and isinstance(users[0], Call) if users else ends


def after_call(call: Call, value: int) -> Spot:
    """The spot at one result of a call; of a run of a loop, where its forward makes it, or after the whole loop."""
    made: Call | Op | None = call
    if isinstance(call, LoopRun) and call.parent:
        made = call.parent if value in call.parent.outs else producer(call.parent, value)
    assert made is not None
    return Spot(made, "after", value, output_key(made, value))
