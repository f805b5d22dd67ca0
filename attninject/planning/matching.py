"""From a rule to spots: by place or by pattern, filtered, picked. Looks at the recorded run, changes nothing."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from torch.nn.modules.batchnorm import _NormBase

from attninject.anatomy import places
from attninject.anatomy.dataflow import Spot, kind, operand_of
from attninject.errors import (
    AllExcludedError,
    CannotRewriteError,
    NoSuchPlaceError,
    NoTensorError,
    TraceRefused,
)
from attninject.layout import RANK
from attninject.observe.record import Call, Op, Ref
from attninject.recipe.rules import Rule
from attninject.wording import listed

from .by_pattern import by_pattern
from .picking import nothing_left, passes, pick
from .scene import Scene, instead, operation_of


def match(rule: Rule, scene: Scene, label: str) -> tuple[list[Spot], list[str]]:
    """The spots of one rule in call order, and notes on what it left aside.

    Args:
        rule: what to match.
        scene: the model.
        label: how messages call the rule.

    Raises:
        PlanError: of the kind that fits; `NoMatchError` and `AllExcludedError` when nothing is left.
    """
    notes: list[str] = []
    find = _by_place if rule.place else by_pattern
    found = find(rule, scene, label, notes)
    kept = [s for s in sorted(found, key=lambda s: s.time) if passes(rule, scene, s)]
    picked = pick(rule, scene, kept)
    if not picked:
        raise AllExcludedError(nothing_left(rule, scene, label, found, kept))
    return picked, notes


def _by_place(rule: Rule, scene: Scene, label: str, notes: list[str]) -> list[Spot]:
    """The spots of a rule's `place`, each in the first run of its owner."""
    assert rule.place is not None
    try:
        spots = places.spots(scene.places, rule.place)
    except NoSuchPlaceError as error:
        raise NoSuchPlaceError(f"{label}: {error}") from error
    first = {(id(s.event), s.position, s.value): s for s in (_in_first_run(scene, s) for s in spots)}
    reached = _with_tensors(scene, list(first.values()), label, notes)
    return [_named(scene, s) for s in _with_positions(rule, scene, reached, label, notes)]


def _with_tensors(scene: Scene, spots: list[Spot], label: str, notes: list[str]) -> list[Spot]:
    """With the spots before a call that takes its tensors in a list moved to where it makes one of them.

    Raises:
        NoTensorError: that is nowhere within reach.
    """
    reached = [s if _is_tensor(s) else _first_inside(scene, s) for s in spots]
    missed = [s for s, r in zip(spots, reached, strict=True) if r is None]
    if not missed:
        return [r for r in reached if r is not None]
    names = list(dict.fromkeys(scene.path(s.module) for s in missed))
    why = f"several tensors enter in a list, not one: {listed(names, 4)}"
    if len(missed) == len(spots):
        raise NoTensorError(f"{label}: {why}; take place block_end, or name the modules inside with before")
    notes.append(f"{label}: left aside, since {why}")
    return [r for r in reached if r is not None]


def _is_tensor(spot: Spot) -> bool:
    """Whether the spot's value is an argument of its call, and no item of one; everywhere else it is a tensor."""
    if spot.position == "after" or isinstance(spot.event, Op):
        return True
    args, operand = spot.event.args, spot.operand
    given = args[operand] if isinstance(operand, int) else spot.event.kwargs[operand]
    return isinstance(given, Ref)


def _first_inside(scene: Scene, spot: Spot) -> Spot | None:
    """Where a call makes one tensor of its list: after their concatenation, else before the item's lone reader."""
    call = spot.event
    assert isinstance(call, Call)
    given = {*call.ins}
    for event in call.events:
        if isinstance(event, Op) and kind(event) == "cat" and given == {*event.ins}:
            return _if_reached(scene, Spot(event, "after", event.outs[0]))
    readers = [e for e in scene.users(call, spot.value) if spot.value in e.ins]
    if len(readers) == 1 and isinstance(reader := readers[0], Call):
        inner = Spot(reader, "before", spot.value, operand=operand_of(reader, spot.value))
        return inner if _is_tensor(inner) else _first_inside(scene, inner)
    return None


def _if_reached(scene: Scene, spot: Spot) -> Spot | None:
    """The spot after an operation, or before the one module that reads its result; None where neither takes a block."""
    assert isinstance(spot.event, Op)
    try:
        return replace(spot, target=operation_of(scene.graph(spot.event.call.module), spot))
    except TraceRefused:
        beside = _before_its_reader(scene, spot)
        return None if beside is None or isinstance(beside.module, _NormBase) else beside


def _with_positions(rule: Rule, scene: Scene, spots: list[Spot], label: str, notes: list[str]) -> list[Spot]:
    """Without those that are no map or tokens, as in a head behind the pooling, unless all are.

    Vectors (batch, channels) have no positions; of other tensors the axes cannot be told, unless the rule says them.
    """
    unfit = {id(s): why for s in spots if (why := _unfit(rule, scene, s))}
    if not unfit or len(unfit) == len(spots):
        return spots
    for why in dict.fromkeys(unfit.values()):
        left = (s.module for s in spots if unfit.get(id(s)) == why)
        names = list(dict.fromkeys(scene.path(m) or "the root" for m in left))
        notes.append(f"{label}: left aside, since {why}: {listed(names, 4)}")
    return [s for s in spots if id(s) not in unfit]


def _unfit(rule: Rule, scene: Scene, spot: Spot) -> str:
    """Why no block can be put at a value, whatever the block; empty where one can."""
    value = scene.record.values[spot.value]
    if len(value.shape) == 2:
        return "vectors have no positions"
    if not value.dtype.is_floating_point:
        return "they hold no floating-point numbers"
    told = RANK.get(rule.layout or "") == len(value.shape) or scene.layout(spot) is not None
    return "" if told else "their axes are not those of a map"


def _in_first_run(scene: Scene, spot: Spot) -> Spot:
    """The same spot in the first run of its owner, whose later runs have the same sites; itself where they differ."""
    owner, event = spot.owner, spot.event
    if owner is None or (first := scene.record.calls_of(owner.module)[0]) is owner:
        return spot
    if len(first.events) != len(owner.events):
        return spot
    twin = next(b for a, b in zip(owner.events, first.events, strict=True) if a is event)
    if _what(twin) != _what(event):
        return spot
    given, its = (event.outs, twin.outs) if spot.position == "after" else (event.ins, twin.ins)
    if len(given) != len(its) or spot.value not in given:
        return spot
    return replace(spot, event=twin, value=its[given.index(spot.value)])


def _what(event: Call | Op) -> object:
    return event.module if isinstance(event, Call) else event.name


def _named(scene: Scene, spot: Spot) -> Spot:
    """The spot with the name of its operation; where the owner's forward has no graph, before what reads the value."""
    event = spot.event
    if isinstance(event, Call) or spot.target is not None:
        return spot
    owner = event.call.module
    try:
        return replace(spot, target=operation_of(scene.graph(owner), spot))
    except TraceRefused as refused:
        if (beside := _before_its_reader(scene, spot)) is not None:
            return beside
        with contextlib.suppress(TraceRefused):
            return replace(spot, target=operation_of(scene.graph(owner, decide=True), spot))
        raise CannotRewriteError(
            f"{scene.path(owner) or 'the root'}: the value sits inside the forward of {type(owner).__name__}, "
            f"and {refused}{instead(scene, event.call)}"
        ) from refused


def _before_its_reader(scene: Scene, spot: Spot) -> Spot | None:
    """The spot before the one module that reads an operation's result, or that first hands it on (a drop-path)."""
    owner = spot.owner
    if owner is None or spot.position != "after":
        return None
    events = scene.users(owner, spot.value)
    readers = [e for e in events if e is not spot.event and spot.value in e.ins]
    first = readers[0] if readers else None
    if not isinstance(first, Call) or (len(readers) > 1 and spot.value not in first.outs):
        return None
    at = next((i for i, a in enumerate(first.args) if isinstance(a, Ref) and a.value == spot.value), None)
    return None if at is None else Spot(first, "before", spot.value, operand=at)
