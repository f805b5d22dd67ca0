"""Named places: sites that mean the same on every architecture, found from one recorded run.

Nothing here knows an architecture's name. A residual add is an addition whose operands share a source
and differ in the layers between; a unit is a module that owns such adds (or, in nets without any, a
repeated module of several layers); a stage is a run of units at one resolution.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .edits import CONTAINERS, base_class
from .errors import NoSuchPlaceError
from .layout import measure
from .probe import Call, Op, Record, Ref
from .trace import Target


@dataclass(frozen=True, eq=False)
class Spot:
    """One point of the dataflow in a recorded run.

    Attributes:
        event: the call or operation; the root's own call for its input and result.
        position: `after` or `before` it.
        value: the tensor there.
        output: `after` a call with a nested result: index or key of the tensor.
        operand: `before`: position or name of the operand.
        target: name of the operation in its owner's graph, where a pattern gave it: a value alone does not say
            it, since an operation may hand its operand on (a dropout in eval mode).
    """

    event: Call | Op
    position: str
    value: int
    output: int | str | None = None
    operand: int | str = 0
    target: Target | None = None

    @property
    def owner(self) -> Call | None:
        """The run of the module in whose forward the event is."""
        return self.event.parent if isinstance(self.event, Call) else self.event.call

    @property
    def time(self) -> int:
        """Orders spots as the run met them."""
        if isinstance(self.event, Op):
            return self.event.time
        return self.event.end if self.position == "after" else self.event.start


# --- dataflow ----------------------------------------------------------------------------------

_WEIGHTED = (
    "aten.convolution",
    "aten.mm.",
    "aten.addmm",
    "aten.bmm",
    "aten.baddbmm",
    "aten.linear",
    "aten._convolution",
)
_MOVES = (
    "permute",
    "transpose",
    "view",
    "reshape",
    "contiguous",
    "clone",
    "unsqueeze",
    "flatten",
    "_unsafe_view",
)


class Flow:
    """Who depends on whom, over all values of a record. Sets of values are bits of an int."""

    def __init__(self, record: Record) -> None:
        self.record = record
        count = len(record.values)
        self.ancestors = [1 << i for i in range(count)]
        self.live = [False] * count  # depends on the model's input
        self.learned = [False] * count  # made of the model's tensors alone
        self.time = [-1] * count
        self.weighted = 0
        self.depthwise = 0
        for i in record.calls[0].ins:
            self.live[i] = True
        for i in record.constants:
            self.learned[i] = True
        self.ops = list(record.calls[0].ops())
        for op in self.ops:
            self._add(op)

    def _add(self, op: Op) -> None:
        live = any(self.live[i] for i in op.ins)
        learned = not live and any(self.learned[i] for i in op.ins)
        past = 0
        for i in op.ins:
            past |= self.ancestors[i]
        weights = [i for i in op.ins if self.learned[i] and len(self.record.shape(i)) > 1]
        for o in op.outs:
            if o in op.ins:
                continue
            self.ancestors[o] |= past
            self.live[o], self.learned[o] = live, learned
            self.time[o] = op.time
            if live and weights and op.name.startswith(_WEIGHTED):
                self.weighted |= 1 << o
                shape = self.record.shape(weights[0])
                if "convolution" in op.name and shape[1] == 1 and shape[0] > 1:
                    self.depthwise |= 1 << o

    def only(self, a: int, b: int) -> int:
        """Ancestors of `a` that are no ancestors of `b`."""
        return self.ancestors[a] & ~self.ancestors[b]

    def weights(self, bits: int) -> int:
        """How many of these values a convolution or linear layer made."""
        return (bits & self.weighted).bit_count()

    def earliest(self, bits: int) -> int:
        """The time at which the first of these values was made."""
        times = (self.time[i] for i in self.bits(bits) if self.live[i] and self.time[i] >= 0)
        return min(times, default=1 << 60)

    @staticmethod
    def bits(bits: int) -> Iterator[int]:
        """The values of a set."""
        while bits:
            low = bits & -bits
            yield low.bit_length() - 1
            bits ^= low


# --- residual adds -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ResidualAdd:
    """An addition that joins a branch and its shortcut, and the call in which both were made."""

    op: Op
    owner: Call
    branch: int
    shortcut: int


def residual_adds(record: Record, flow: Flow) -> Iterator[ResidualAdd]:
    """The residual adds of a run, in order.

    Left out: sums of parallel branches with equally many layers, fusion of tensors that were made
    outside the owner (feature pyramids), a depthwise convolution alone (positional encodings), and sums
    inside an attention (of logits, or of its result before the projection).
    """
    for op in flow.ops:
        if not op.name.startswith(("aten.add.Tensor", "aten.add_.Tensor")) or len(op.ins) != 2:
            continue
        a, b = op.ins
        if a == b or not (flow.live[a] and flow.live[b]) or record.shape(a) != record.shape(b):
            continue
        only_a, only_b = flow.only(a, b), flow.only(b, a)
        weights_a, weights_b = flow.weights(only_a), flow.weights(only_b)
        if weights_a == weights_b:
            continue
        branch, shortcut = (a, b) if weights_a > weights_b else (b, a)
        only = only_a if branch == a else only_b
        if flow.weights(only) == (only & flow.depthwise).bit_count() == 1:
            continue
        owner = _enclosing(op.call, flow.earliest(only_a | only_b))
        if owner is not None and not _in_attention(flow, op, only_a | only_b):
            yield ResidualAdd(op, owner, branch, shortcut)


_MIXES = ("_softmax", "bmm", "scaled_dot_product")


def _in_attention(flow: Flow, op: Op, made: int) -> bool:
    """Whether the sum meets a softmax in its own forward with no layer in between, before or behind it."""
    later = flow.weighted & made
    for other in flow.ops:
        if other.call not in (op.call, op.call.parent) or not any(k in other.name for k in _MIXES):
            continue
        if other.time < op.time:
            mixed = 1 << other.outs[0]
            between = any(flow.ancestors[w] & mixed for w in flow.bits(later))
            if made & mixed and not between:
                return True
        elif "softmax" in other.name:
            logits = flow.ancestors[other.outs[0]]
            behind = flow.ancestors[op.outs[0]]
            if logits >> op.outs[0] & 1 and not flow.weights(logits & ~behind):
                return True
    return False


def _enclosing(call: Call, time: int) -> Call | None:
    """The smallest call around this one in which everything since `time` was made.

    Only helpers that make nothing themselves (an addition as a module) are climbed out of.
    """
    if call.start <= time:
        return call
    helper = not any(isinstance(e, Call) for e in call.events) and len(call.events) == 1
    return _enclosing(call.parent, time) if helper and call.parent else None


def branch_end(record: Record, flow: Flow, add: ResidualAdd) -> Spot | None:
    """The last value of the branch, inwards of drop-path, dropout and layer scale.

    Axis moves between the last layer and the add are stepped over when a call lies behind them.
    """
    value, best = add.branch, None
    while True:
        event = _producer(add.owner, value)
        if event is None:
            return best
        spot = Spot(event, "after", value, output_key(event, value))
        source = _scaled(record, flow, event)
        if source is not None:
            value = source
        elif isinstance(event, Op) and event.name.split(".")[1] in _MOVES:
            best, value = best or spot, event.ins[0]
        else:
            batch = record.shape(record.input_values[0])[0] if record.input_values else 0
            whole = isinstance(event, Call) and record.shape(value)[0] == batch  # not a batch of windows
            return spot if best is None or whole else best


def _producer(owner: Call, value: int) -> Call | Op | None:
    """The event of the owner's own forward that made the value; those that hand it on do not count."""
    for event in owner.events:
        if value in event.outs and value not in event.ins:
            return event
    return None


def _scaled(record: Record, flow: Flow, event: Call | Op) -> int | None:
    """The value that a layer scale multiplies: the one live input of products with learned tensors."""
    ops = [event] if isinstance(event, Op) else list(event.ops())
    live = [i for i in event.ins if flow.live[i]]
    kinds = {op.name.split(".")[1].rstrip("_") for op in ops}
    if len(live) != 1 or not kinds <= {"mul", *_MOVES} or "mul" not in kinds:
        return None
    learned = any(flow.learned[i] for op in ops for i in op.ins)
    return live[0] if learned else None


def output_key(event: Call | Op, value: int) -> int | str | None:
    """Where in a call's result the value is: None for the result itself."""
    if isinstance(event, Op) or isinstance(event.out, Ref):
        return None
    items = event.out.items() if isinstance(event.out, dict) else enumerate(event.out)
    return next((k for k, item in items if isinstance(item, Ref) and item.value == value), None)


# --- units and stages --------------------------------------------------------------------------


class Map:
    """The places of one recorded run. `inside` limits them to what happens within one call."""

    def __init__(self, record: Record, inside: Call | None = None) -> None:
        self.record = record
        self.root = inside or record.calls[0]
        self.flow = Flow(record)

    @functools.cached_property
    def adds(self) -> list[ResidualAdd]:
        """Residual adds within the root."""
        return [a for a in residual_adds(self.record, self.flow) if self.within(a.owner)]

    def within(self, call: Call) -> bool:
        """Whether the call happened within the root."""
        return self.root.start <= call.start and call.end <= self.root.end

    @functools.cached_property
    def units(self) -> list[Call]:
        """The repeated units of the trunk, in order."""
        classes = {base_class(a.owner.module) for a in self.adds if a.owner is not self.root}
        calls = [c for c in self.record.calls if self.within(c) and c is not self.root]
        alike = [c for c in calls if base_class(c.module) in classes]
        found = alike if classes else _repeated(calls, self.flow)
        return [c for c in found if not any(o is not c and _contains(o, c) for o in found)]

    def resolution(self, call: Call) -> tuple[int, ...] | None:
        """Spatial extents of a call's first result, or None where it has none."""
        return resolution(self.record, call)

    @functools.cached_property
    def stages(self) -> list[Call]:
        """The call whose result is the last at each resolution."""
        units = [(u, r) for u in self.units if (r := self.resolution(u))]
        ends: list[tuple[Call, Any]] = []
        for unit, at in units:
            if ends and ends[-1][1] == at:
                ends[-1] = (unit, at)
            else:
                ends.append((unit, at))
        if len(ends) == 1 and len(units) >= 3:
            n = len(units)
            ends = [units[n * k // 3 - 1] for k in (1, 2, 3)]
        if not ends:
            return self._activations()
        return [self._trunk(c) for c, _ in ends]

    def _trunk(self, unit: Call) -> Call:
        """The unit, or the module around it when the unit gives only a part (a dense layer)."""
        parent = unit.parent
        if parent is None or parent is self.root or set(unit.outs) & set(parent.outs):
            return unit
        children = [e for e in parent.events if isinstance(e, Call)]
        if children[-1] is not unit:
            return unit
        alike = all(base_class(c.module) is base_class(unit.module) for c in children)
        return parent if alike and self.resolution(parent) == self.resolution(unit) else unit

    def _activations(self) -> list[Call]:
        """Nets without units: the last activation before each drop of the resolution."""
        groups: list[tuple[Any, list[Call], bool]] = []
        for call in self.record.calls:
            leaf = not any(isinstance(e, Call) for e in call.events)
            if not leaf or not self.within(call) or not (at := self.resolution(call)):
                continue
            if not groups or groups[-1][0] != at:
                groups.append((at, [], False))
            heavy = any((1 << o) & self.flow.weighted for op in call.ops() for o in op.outs)
            same = bool(call.ins) and self.record.shape(call.ins[0]) == self.record.shape(call.outs[0])
            if same and not any(True for _ in call.module.parameters()) and any(True for _ in call.ops()):
                groups[-1][1].append(call)
            groups[-1] = (at, groups[-1][1], groups[-1][2] or heavy)
        return [calls[-1] for _, calls, heavy in groups if calls and heavy]

    @functools.cached_property
    def spans(self) -> list[tuple[int, int]]:
        """Begin and end time of each stage; what comes before the first is the stem."""
        if not self.stages:
            return []
        first = next((u for u in self.units), None)
        begin = first.start if first else self.root.start
        ends = [c.end for c in self.stages]
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
        )


def resolution(record: Record, call: Call) -> tuple[int, ...] | None:
    """Spatial extents of the call's first result by the run's own input size."""
    if not call.outs or not record.input_values:
        return None
    shape, given = record.shape(call.outs[0]), record.shape(record.input_values[0])
    layout = measure(shape, given[0], given[2:], channels_of(call.module))
    return None if layout is None or len(shape) < 3 else layout.positions(shape)


def channels_of(module: nn.Module) -> int | None:
    """Channels that a module says it gives, for layers whose channel axis is known."""
    for name in ("out_channels", "num_features", "out_features", "embed_dim"):
        value = getattr(module, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    shape = getattr(module, "normalized_shape", None)
    return shape[0] if isinstance(shape, (tuple, list)) and len(shape) == 1 else None


def _contains(outer: Call, inner: Call) -> bool:
    return outer.start < inner.start and inner.end < outer.end


def _repeated(calls: list[Call], flow: Flow) -> list[Call]:
    """Modules of two layers or more that stand beside others of their class, outermost first."""
    beside: dict[tuple[int, type], list[Call]] = {}
    for call in calls:
        cls = base_class(call.module)
        made = sum(1 << o for op in call.ops() for o in dict.fromkeys(op.outs))
        if not issubclass(cls, CONTAINERS) and flow.weights(made) > 1:
            beside.setdefault((id(call.parent), cls), []).append(call)
    return sorted((c for group in beside.values() if len(group) > 1 for c in group), key=lambda c: c.start)


# --- the places --------------------------------------------------------------------------------


def _after(record: Record, call: Call) -> list[Spot]:
    return [Spot(call, "after", call.outs[0], output_key(call, call.outs[0]))] if call.outs else []


def _stage_end(net: Map) -> list[Spot]:
    return [s for c in net.stages for s in _after(net.record, c)]


def _before_downsample(net: Map) -> list[Spot]:
    return _stage_end(net)[:-1]


def _block_end(net: Map) -> list[Spot]:
    return [s for c in net.units for s in _after(net.record, c)]


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
        made = _producer(frame, value)
        if isinstance(made, Call):
            return [Spot(made, "after", value, output_key(made, value))]
        frame = None if made else frame.parent
    return [Spot(first, "before", value)]


def _head_input(net: Map) -> list[Spot]:
    """The last value at the last stage's resolution, before it is pooled or a token is taken from it."""
    if not net.stages:
        return []
    last, at = net.stages[-1], net.resolution(net.stages[-1])
    for call in net.record.calls:
        leaf = not any(isinstance(e, Call) for e in call.events)
        if leaf and net.within(call) and call.start > last.end:
            if net.resolution(call) != at:
                break
            last = call
    return _after(net.record, last)


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
