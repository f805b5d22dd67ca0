"""A site or a second value inside a module, as a module further out sees it: a result or an argument of a child."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

from attninject.anatomy.dataflow import Spot
from attninject.errors import CannotRewriteError
from attninject.observe.record import Call, Op, Record, Ref

from .scene import Scene


def around(owner: Call | None) -> Iterator[Call]:
    """The run of an owner, and those that it is part of, from the inside out."""
    while owner is not None:
        yield owner
        owner = owner.parent


def said(scene: Scene, spot: Spot) -> str:
    """What messages call a spot."""
    return f"{spot.position} {scene.name(spot)}"


def operand_with(call: Call, value: int) -> Any:
    """Which argument of a call a value is, by position or name; None: none."""
    return next(iter(_operands_with(call, value)), None)


def _operands_with(call: Call, value: int) -> list[Any]:
    return _keys({**dict(enumerate(call.args)), **call.kwargs}, value)


def site_in(scene: Scene, owner: Call, spot: Spot, path: str) -> Spot:
    """The same site among the calls that a module further out makes.

    Raises:
        CannotRewriteError: the value does not leave the child unchanged, or others in the child read it too.
    """
    if spot.owner is owner:
        return spot
    inside = _levels(spot, owner)
    child = inside[-1]
    _check_once(scene, inside, owner, path)
    if spot.position == "after":
        keys = _keys(child.out, spot.value)
        alone = not any(spot.value in e.ins and e.start > spot.time for level in inside for e in level.events)
        if len(keys) == 1 and alone:
            return Spot(child, "after", spot.value, keys[0])
    else:
        given = _operands_with(child, spot.value)
        readers = [e for level in inside for e in scene.users(level, spot.value) if spot.value in e.ins]
        if len(given) == 1 and len(readers) == len(inside):
            return Spot(child, "before", spot.value, operand=given[0])
    raise CannotRewriteError(
        f"{path}: the site lies inside {scene.path(child.module)}, which does not have the second value; the nearest "
        f"place that would do is {spot.position} {scene.path(child.module)}"
    )


def value_in(scene: Scene, owner: Call, second: Spot, path: str) -> Spot:
    """The spot of a second value among the calls that a module further out makes.

    Raises:
        CannotRewriteError: the child does not give it on.
    """
    if second.owner is owner or (second.event is owner and second.position == "before"):
        return second
    if owner not in around(second.owner):  # it is given to this forward
        return Spot(owner, "before", second.value, operand=operand_with(owner, second.value))
    inside = _levels(second, owner)
    child = inside[-1]
    for level in inside:
        if sum(owner in around(run) for run in scene.record.calls_of(level.module)) > 1:
            _refuse_several(scene, level, owner, path)
    if keys := _keys(child.out, second.value):
        return Spot(child, "after", second.value, keys[0])
    operand = operand_with(child, second.value)
    if operand is not None:
        return Spot(child, "before", second.value, operand=operand)
    raise CannotRewriteError(
        f"{path}: the second value lies inside {scene.path(child.module)}, which does not give it on; the nearest that "
        f"would do is with: {scene.path(child.module)}"
    )


def _levels(spot: Spot, owner: Call) -> list[Call]:
    """The runs from that of a spot's owner to the child of `owner` that it is in."""
    found = []
    for level in around(spot.owner):
        if level is owner:
            break
        found.append(level)
    return found


def _check_once(scene: Scene, inside: list[Call], owner: Call, path: str) -> None:
    """Refuse what runs more often than the module further out: a place there would be only one of its calls."""
    runs = len(scene.record.calls_of(owner.module))
    for level in inside:
        if len(scene.record.calls_of(level.module)) != runs:
            _refuse_several(scene, level, owner, path)


def _refuse_several(scene: Scene, level: Call, owner: Call, path: str) -> NoReturn:
    name, calls = scene.path(level.module), len(scene.record.calls_of(level.module))
    raise CannotRewriteError(
        f"{path}: {name} is called {calls} times, and only {scene.owner(owner) or 'the model'} has both values; "
        f"name one of its calls in place of a value inside it: {name} with call: 1"
    )


def same_in_training(scene: Scene, spot: Spot, other: Spot) -> bool:
    """Whether two spots of one value are so while training, too; true where that cannot be told."""
    found = _in_training(scene, spot), _in_training(scene, other)
    return None in found or found[0] == found[1]


def _in_training(scene: Scene, spot: Spot) -> int | None:
    """The value at a spot in the run in training mode; None where there is none, or it went another way."""
    event, record = spot.event, scene.training_record
    mine, its = _alike(scene.record, event), _alike(record, event) if record else []
    if len(mine) != len(its):
        return None
    twin = next(b for a, b in zip(mine, its, strict=True) if a is event)
    values, others = (event.outs, twin.outs) if spot.position == "after" else (event.ins, twin.ins)
    known = len(values) == len(others) and spot.value in values
    return others[values.index(spot.value)] if known else None


def _alike(record: Record, event: Call | Op) -> list[Any]:
    """The calls of an event's module in a run, or the operations of its name in the forward of its module."""
    if isinstance(event, Call):
        return list(record.calls_of(event.module))
    runs = record.calls_of(event.call.module)
    return [e for run in runs for e in run.events if isinstance(e, Op) and e.name == event.name]


def _keys(tree: Any, value: int) -> list[Any]:
    """The keys under which a value is in a call's result or arguments; [None] where it is the result itself."""
    if isinstance(tree, Ref):
        return [None] if tree.value == value else []
    items: Any = (
        tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    )
    return [key for key, item in items if isinstance(item, Ref) and item.value == value]
