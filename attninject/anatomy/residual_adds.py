"""Which additions of a recorded run are residual adds of the trunk, and where their branches end."""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass

from attninject.observe.record import Call, Op, Record
from attninject.surgery.injected_state import base_class

from .dataflow import MOVES, Flow, Spot, kind, output_key


@dataclass(frozen=True, eq=False)
class ResidualAdd:
    """An addition that joins a branch and its shortcut.

    Attributes:
        op: the addition.
        owner: the call in whose forward it is written.
        branch: value that comes from the layers.
        shortcut: value that goes past them.
        inside: what the branch depends on and the shortcut does not.
    """

    op: Op
    owner: Call
    branch: int
    shortcut: int
    inside: int

    @property
    def out(self) -> int:
        """The sum."""
        return self.op.outs[0]


def residual_adds(flow: Flow) -> list[ResidualAdd]:
    """The residual adds of the trunk, in order.

    The branch is the side that bends the signal (by an activation, a softmax, a norm) with learned tensors;
    the shortcut does nothing of the kind. So sums of parallel branches do not count, nor those that one
    convolution could replace: positional convolutions, re-parameterised branches.
    """
    found: dict[int, ResidualAdd] = {}
    for step in flow.steps:
        op = step.ops[0]
        if len(step.ops) == 1 and kind(op) == "add" and len(op.ins) == 2:
            add = _residual(flow, op, found)
            if add is not None:
                found[add.out] = add
    return _of_trunk(flow, _without_cells(flow, list(found.values())))


def _residual(flow: Flow, op: Op, known: dict[int, ResidualAdd]) -> ResidualAdd | None:
    a, b = op.ins
    if a == b or flow.record.shape(a) != flow.record.shape(b):
        return None
    owner = _home(op)
    for branch, shortcut in sorted(((a, b), (b, a)), key=lambda s: flow.weights(flow.only(s[1], s[0]))):
        inside = flow.only(branch, shortcut)
        fork = _fork(flow, branch, shortcut, op, known)
        beside = flow.only(fork, branch)
        if inside & flow.sampled:
            continue  # a sample, mean + deviation · noise, as in a variational autoencoder
        if not flow.bit(branch) & flow.live or (beside and not flow.bit(shortcut) & flow.live):
            continue
        if _pooled(flow, inside, op.outs[0]) and _pooled(flow, beside, op.outs[0]):
            continue  # what several maps say as a whole is added up
        layers = inside & flow.bent and inside & flow.layered
        lone = not layers and not beside and _one_layer(flow, inside, owner)
        if not (layers or lone) or not _is_shortcut(flow, beside, inside):
            continue
        if inside & flow.gated and not _taken(flow, branch, inside) & _taken(flow, fork, beside):
            continue  # the branch takes at most its gate from there: two maps are fused
        if _is_local(flow, owner, fork, inside, beside):
            return ResidualAdd(op, owner, branch, shortcut, inside)
    return None


def _fork(flow: Flow, branch: int, shortcut: int, op: Op, known: dict[int, ResidualAdd]) -> int:
    """The shortcut, before branches in parallel to this one were added to it in the same forward."""
    while flow.only(shortcut, branch) & flow.active:
        before = known.get(shortcut)
        if before is None or before.op.call is not op.call:
            break
        shortcut = before.shortcut
    return shortcut


def _is_shortcut(flow: Flow, beside: int, inside: int) -> bool:
    """Whether it has fewer layers than the branch and bends nothing, but in front of a lone projection."""
    if flow.weights(inside) <= flow.weights(beside) != 0:
        return False
    if not beside & flow.active:
        return True
    if flow.weights(beside) != 1:
        return False
    projection = next(flow.members(beside & flow.weighted))
    return not beside & flow.active & ~flow.past(projection)


def _pooled(flow: Flow, inside: int, out: int) -> bool:
    """Whether a value of one position lies behind layers that made maps."""
    whole = flow.record.shape(out)
    shapes = (flow.record.shape(v) for v in flow.members(inside & flow.weighted))
    return len(whole) > 2 and max(whole[2:]) == 1 and any(max(s[2:], default=1) > 1 for s in shapes)


_POSITIONAL = re.compile(r"cpe|pos(ition|_?(conv|enc|emb))", re.IGNORECASE)


def _one_layer(flow: Flow, inside: int, owner: Call) -> bool:
    """A layer with a bare shortcut, though it bends nothing: one convolution with its batch norm, or scaled pooling.

    A convolution without a norm is a positional encoding; several in parallel are one, re-parameterised. With
    a norm the dataflow cannot tell either from a mixer: then the class around says that it encodes positions.
    """
    if not flow.weights(inside):
        return bool(inside & flow.pooled and inside & flow.taught)
    around = (owner, owner.parent) if owner.parent else (owner,)
    if any(_POSITIONAL.search(base_class(c.module).__name__) for c in around):
        return False
    return flow.weights(inside) == 1 and (inside & flow.normed).bit_count() > 0


def _taken(flow: Flow, value: int, inside: int) -> int:
    """What a part of the net takes from outside to make a value; what only gates it there does not count."""
    inside, first, wanted = inside & flow.made, flow.earliest(inside), flow.bit(value)
    last = bisect.bisect(flow.steps, flow.time[flow.number[value]], key=lambda step: step.time)
    for step in reversed(flow.steps[:last]):
        if step.time < first:
            break
        made = sum(map(flow.bit, {*step.outs}))
        if made & wanted & inside:
            given = sum(map(flow.bit, {*step.ins}))
            wanted |= (given & ~flow.gates if made & flow.gated else 0) or given
    return wanted & flow.live & ~inside


def _home(op: Op) -> Call:
    """The call in whose forward the addition is written; an addition as a module belongs to its caller."""
    call = op.call
    return call.parent if call.events == [op] and call.parent else call


def _is_local(flow: Flow, owner: Call, fork: int, inside: int, beside: int) -> bool:
    """Whether the branch was made in the forward that holds the sum, from the fork on.

    Else the sum fuses tensors that were made elsewhere, as feature pyramids and decoders do; save a module that
    ends a branch (a last layer and the sum) with no lower resolution on the way. A projected shortcut may come
    from the caller.
    """
    if beside:
        given = flow.earliest(beside) < owner.start and beside & flow.bent
        taken = _taken(flow, fork, beside)
        first = next((v for v in flow.members(inside & flow.made) if flow.past(v) & taken), None)
        return first is not None and flow.time[flow.number[first]] > owner.start and not given
    between = [v for v in flow.members(inside & flow.made) if flow.depends(v, fork)]
    if flow.time[flow.number[between[0]]] > owner.start:
        return True
    layers = [v for v in between if flow.bit(v) & flow.weighted]
    ends_here = any(flow.time[flow.number[v]] > owner.start for v in layers)
    return ends_here and not _lower(flow, layers, fork)


def _lower(flow: Flow, values: Iterable[int], than: int) -> bool:
    """Whether any of these maps has fewer positions than another; a pooled vector is no map."""
    shape = flow.record.shape
    whole = shape(than)
    maps = (shape(v) for v in values if len(shape(v)) == len(whole) > 3)
    return any(1 < min(s[-2:]) < min(whole[-2:]) for s in maps)


def _without_cells(flow: Flow, found: list[ResidualAdd]) -> list[ResidualAdd]:
    """Without nodes of a searched cell: sums of one forward, independent of each other, that are concatenated."""
    cells: set[int] = set()
    for owner in {id(a.owner): a.owner for a in found}.values():
        ops = [e for e in owner.events if isinstance(e, Op)]
        sums = {op.outs[0] for op in ops if kind(op) == "add"}
        for op in ops:
            nodes = [i for i in op.ins if i in sums] if kind(op) == "cat" else []
            if any(not flow.depends(b, a) for a, b in itertools.pairwise(sorted(nodes))):
                cells |= set(nodes)
    return [a for a in found if a.out not in cells]


def _of_trunk(flow: Flow, found: list[ResidualAdd]) -> list[ResidualAdd]:
    """Without sums that reach the net's output through another's branch alone: within an attention, in side paths.

    Kept are blocks in a row inside a branch (a residual group), and a sum with a bare shortcut in the same
    forward as the outer one.
    """
    by_out = {a.out: a for a in found}
    fusing = {a.out for a in found if _fuses(flow, a, by_out)}
    by_out = {o: a for o, a in by_out.items() if o not in fusing}
    outs = flow.record.calls[0].outs
    trunk = (
        set(outs)
        if outs
        else {o for s in flow.steps for o in s.outs} - {i for s in flow.steps for i in s.ins}
    )
    for step in reversed(flow.steps):
        if not trunk.isdisjoint(step.outs):
            add = by_out.get(step.outs[0])
            trunk.update((add.shortcut,) if add and add.op is step.ops[0] else step.ins)
    outer = [a for a in by_out.values() if a.out in trunk]
    kept = {a.out for a in outer}
    for add in outer:
        within = _within(flow, add, by_out)
        kept |= {a.out for a in within if a.owner is add.owner and flow.depends(a.branch, a.shortcut)}
        kept |= {a.out for a in _row(add, within)}
    return [a for a in by_out.values() if a.out in kept]


def _within(flow: Flow, add: ResidualAdd, by_out: dict[int, ResidualAdd]) -> list[ResidualAdd]:
    return [a for a in by_out.values() if a is not add and flow.bit(a.out) & add.inside]


def _row(add: ResidualAdd, within: list[ResidualAdd]) -> list[ResidualAdd]:
    """Those in modules of one class that run one after another within the add's owner."""
    inner = [a for a in within if add.owner.start < a.owner.start and a.owner.end < add.owner.end]
    modules = {id(a.owner.module): base_class(a.owner.module) for a in inner}
    return inner if len(modules) > len(set(modules.values())) else []


def _fuses(flow: Flow, add: ResidualAdd, by_out: dict[int, ResidualAdd]) -> bool:
    """Whether the sum joins resolutions: its branch is a row of blocks at others, or the net's way down and up.

    In the net's own forward a branch that runs again and again is a recurrence, and no residual either.
    """
    shape = flow.record.shape
    shapes = {shape(a.out) for a in _row(add, _within(flow, add, by_out))}
    if shapes and shapes != {shape(add.out)}:
        return True
    if add.owner.parent is not None:
        return False
    last = producer(add.owner, add.branch)
    again = (
        isinstance(last, Call)
        and sum(e.module is last.module for e in add.owner.events if isinstance(e, Call)) > 1
    )
    return again or _lower(flow, flow.members(add.inside & flow.weighted), add.out)


# --- where a branch ends -----------------------------------------------------------------------


def branch_end(record: Record, flow: Flow, add: ResidualAdd) -> Spot | None:
    """The last value of the branch, inwards of drop-path, dropout and layer scale.

    Axis moves between the last layer and the add are stepped over when a call lies behind them, but not those
    that put windows back into a map: each spatial axis is two there.
    """
    value, best, windows = add.branch, None, False
    dims = len(record.shape(record.input_values[0])) - 2 if record.input_values else 2
    while True:
        event = producer(add.owner, value)
        if event is None:
            return best
        spot = Spot(event, "after", value, output_key(event, value))
        source = _scaled(flow, event)
        if source is not None:
            value = source
        elif isinstance(event, Op) and kind(event) in MOVES | {"slice"}:
            best, value = best or spot, event.ins[0]
            windows = windows or len(record.shape(event.ins[0])) >= 2 * dims + 2
        else:
            return spot if best is None or (isinstance(event, Call) and not windows) else best


def producer(owner: Call, value: int) -> Call | Op | None:
    """The event of the owner's own forward that made the value; those that hand it on do not count."""
    for event in owner.events:
        if value in event.outs and value not in event.ins:
            return event
    return None


_SCALES = frozenset({"mul", "div"})


def _scaled(flow: Flow, event: Call | Op) -> int | None:
    """The value that a layer scale multiplies: the one live input of products with learned tensors or constants."""
    ops = [event] if isinstance(event, Op) else list(event.ops())
    live = [i for i in event.ins if flow.bit(i) & flow.live]
    kinds = {kind(op) for op in ops}
    scales = len(live) == 1 and kinds <= _SCALES | MOVES and kinds & _SCALES
    return live[0] if scales else None
