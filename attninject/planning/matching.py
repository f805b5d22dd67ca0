"""From a rule to spots: by place or by pattern, filtered, picked. Looks at the recorded run, changes nothing."""

from __future__ import annotations

from dataclasses import replace

from attninject.anatomy import places
from attninject.anatomy.dataflow import Spot
from attninject.errors import AllExcludedError, CannotRewriteError, NoSuchPlaceError, TraceRefused
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
    return [_named(scene, s) for s in _with_positions(scene, list(first.values()), label, notes)]


def _with_positions(scene: Scene, spots: list[Spot], label: str, notes: list[str]) -> list[Spot]:
    """Without those at vectors (batch, channels), as in a residual head behind the pooling, unless all are."""
    vectors = [s for s in spots if len(scene.record.shape(s.value)) == 2]
    if not vectors or len(vectors) == len(spots):
        return spots
    names = list(dict.fromkeys(scene.path(s.module) or "the root" for s in vectors))
    notes.append(f"{label}: left aside, since vectors have no positions: {listed(names, 4)}")
    return [s for s in spots if s not in vectors]


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
    if isinstance(event, Call):
        return spot
    owner = event.call.module
    try:
        return replace(spot, target=operation_of(scene.graph(owner), spot))
    except TraceRefused as refused:
        if (beside := _before_its_reader(scene, spot)) is not None:
            return beside
        raise CannotRewriteError(
            f"{scene.path(owner) or 'the root'}: the value sits inside the forward of {type(owner).__name__}, "
            f"and {refused}{instead(scene, event.call)}"
        ) from refused


def _before_its_reader(scene: Scene, spot: Spot) -> Spot | None:
    """The spot before the one module that reads an operation's result, or that first hands it on (a drop-path)."""
    owner = spot.owner
    if owner is None or spot.position != "after":
        return None
    events = scene.users[id(owner), spot.value]
    readers = [e for e in events if e is not spot.event and spot.value in e.ins]
    first = readers[0] if readers else None
    if not isinstance(first, Call) or (len(readers) > 1 and spot.value not in first.outs):
        return None
    at = next((i for i, a in enumerate(first.args) if isinstance(a, Ref) and a.value == spot.value), None)
    return None if at is None else Spot(first, "before", spot.value, operand=at)
