"""Where a block of two inputs goes: into a forward that has both of its values.

Nothing is carried past a forward: the block goes into one that has both values, that of the site's owner or of a
module further out which is given them by its children. So copies, compilation, export and checkpointing know nothing
of it. Where no forward has both, the message names the nearest values that would do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from torch import fx

from attninject.anatomy.dataflow import Spot
from attninject.errors import CannotRewriteError, TraceRefused
from attninject.observe.record import Call, Ref
from attninject.surgery.injected_state import Second, base_class
from attninject.surgery.local_graph import LocalGraph, Target, bound, find, operands, targets
from attninject.surgery.location import Location

from . import inplace_hazards, locating
from .scene import Scene, call_node, node_of


class Placed(NamedTuple):
    """A site and where its block goes; with the spot of its second value in the same forward, if it is given one."""

    spot: Spot
    location: Location
    second: Spot | None = None


def located(scene: Scene, pairs: list[tuple[Spot, Spot]], label: str, notes: list[str]) -> Iterator[Placed]:
    """Where the block of each site goes that is given a second value; notes on those that move.

    Raises:
        CannotRewriteError: no forward has both values; the message names the nearest that would do.
        InPlaceHazardError: no block could keep the function there.
    """
    for spot, second in pairs:
        placed = _located(scene, spot, second, label)
        if placed.spot is not spot:
            there = _said(scene, placed.spot)
            notes.append(
                f"{label}: {_said(scene, spot)} goes {there}, where the same value meets the second one"
            )
        yield placed


def _located(scene: Scene, spot: Spot, second: Spot, label: str) -> Placed:
    """Where the block of a site goes: into the innermost forward that has both values and can be rewritten."""
    path = f"{label}: {_said(scene, spot)} with {_said(scene, second)}"
    theirs = list(_around(second.owner))
    reasons: list[str] = []
    for owner in _around(spot.owner):
        if owner not in theirs and not _is_given(scene, owner, second):
            continue
        try:
            return _in(scene, owner, spot, second, path)
        except CannotRewriteError as refused:
            reasons.append(str(refused).removeprefix(f"{path}: "))
    said = "; further out, ".join(reasons[:1] + reasons[1:][-1:])
    raise CannotRewriteError(f"{path}: {said or 'the model itself has no forward around it; name its parts'}")


def _is_given(scene: Scene, owner: Call, second: Spot) -> bool:
    """Whether a second value from outside is an argument of a forward, in each of its runs."""
    once = len(scene.record.calls_of(owner.module)) == 1
    itself = second.event is owner and second.position == "before"
    return _operand(owner, second.value) is not None and (itself or once)


def _operand(call: Call, value: int) -> Any:
    """Which argument of a call a value is, by position or name; None: none."""
    return _item({**dict(enumerate(call.args)), **call.kwargs}, value)[1]


def _around(owner: Call | None) -> Iterator[Call]:
    """The run of an owner, and those that it is part of, from the inside out."""
    while owner is not None:
        yield owner
        owner = owner.parent


def _in(scene: Scene, owner: Call, spot: Spot, second: Spot, path: str) -> Placed:
    locating.check_bypass(owner, path)
    here, there = _site_in(scene, owner, spot, path), _value_in(scene, owner, second, path)
    try:
        local = _graph(scene, owner)
        location = locating.in_graph(scene, local, owner, here, path)
        given = _second(scene, local, owner, here, there, path)
    except TraceRefused as refused:
        raise CannotRewriteError(
            f"{path}: {scene.owner(owner) or 'the model'} ({base_class(owner.module).__name__}) has both values, and "
            f"its forward cannot be rewritten: {refused}"
        ) from refused
    return Placed(here, replace(location, insertion=replace(location.insertion, second=given)), there)


def _graph(scene: Scene, owner: Call) -> LocalGraph:
    """The graph of an owner, as `locating` would have it where nothing else serves.

    Raises:
        TraceRefused: there is none.
    """
    reason = "" if locating.is_open_root(scene, owner) else locating.why_not_rewritten(scene, owner)
    if not reason:
        try:
            return scene.graph(owner.module)
        except TraceRefused:
            return scene.graph(owner.module, decide=True)
    if locating.why_not_rewritten(scene, owner, parted=True):
        raise TraceRefused(reason)
    return scene.graph(owner.module, decide=True)


def _second(scene: Scene, local: LocalGraph, owner: Call, here: Spot, there: Spot, path: str) -> Second:
    """The second value as an insertion names it.

    Raises:
        TraceRefused: it is not in the graph, or not the same in every run.
        CannotRewriteError: it comes to be too late.
    """
    node = _node(local, owner, there)
    if node is None:
        raise TraceRefused("the call of the second value is not in its graph")
    target = targets(local.eval)[node]
    if not inplace_hazards.alike_in_all_runs(scene, there, owner):
        raise TraceRefused("its runs in one forward differ in the channels of the second value")
    if there.event is owner:  # its own input
        there = replace(there, position="after")
    operand = inplace_hazards.graph_operand(node, there)
    found = Second(there.position, target, operand, there.output, copied=_written(scene, local, node, there))
    site = _node(local, owner, here)
    assert site is not None
    for graph in local.graphs:
        at, given = find(graph, targets(local.eval)[site]), find(graph, target)
        if at is None or given is None:
            raise TraceRefused("the call of the second value is not in its training graph")
        _check_order(graph, at, given, found, here, path)
    return found


def _node(local: LocalGraph, owner: Call, spot: Spot) -> fx.Node | None:
    """The node of a spot in the graph of the forward that it is in; of an input of that forward its placeholder."""
    if not isinstance(spot.event, Call):
        return node_of(local, spot)
    if spot.event is not owner:
        return call_node(local.eval, spot.event)
    given = bound(base_class(owner.module).forward, owner.args, owner.kwargs)
    names = [n for n, (value, _) in given.items() if isinstance(value, Ref) and value.value == spot.value]
    return find(local.eval, Target("input", names[0])) if names else None


def _check_order(graph: fx.Graph, at: fx.Node, given: fx.Node, second: Second, here: Spot, path: str) -> None:
    maker: Any = given if second.position == "after" else operands(given).get(second.operand)
    if not isinstance(maker, fx.Node):
        raise TraceRefused("the second value is made by no node of its graph")
    order = {node: i for i, node in enumerate(graph.nodes)}
    if order[maker] > order[at] or (maker is at and here.position == "before"):
        raise CannotRewriteError(
            f"{path}: the second value comes to be later than the block would need it; name one that is there by then"
        )


def _written(scene: Scene, local: LocalGraph, node: fx.Node, there: Spot) -> bool:
    """Whether the second value is written to in place once it is there."""
    storage = scene.record.values[there.value].storage
    if any(op.time > there.time for op in scene.writers.get(storage, ())):
        return True
    twin = find(local.train, targets(local.eval)[node])
    value: Any = twin if there.position == "after" or twin is None else operands(twin).get(there.operand)
    shared = local.train_effects[value].storages if value in local.train_effects else frozenset()
    return any(effect.writes & shared for effect in local.train_effects.values())


# --- crossing a forward ------------------------------------------------------------------------


def _site_in(scene: Scene, owner: Call, spot: Spot, path: str) -> Spot:
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
        crosses, key = _item(child.out, spot.value)
        alone = not any(
            spot.value in e.ins and _begin(e) > spot.time for level in inside for e in level.events
        )
        if crosses and alone:
            return Spot(child, "after", spot.value, key)
    else:
        operand = _operand(child, spot.value)
        readers = [e for level in inside for e in scene.users(level, spot.value) if spot.value in e.ins]
        if operand is not None and len(readers) == len(inside):
            return Spot(child, "before", spot.value, operand=operand)
    raise CannotRewriteError(
        f"{path}: the site lies inside {scene.path(child.module)}, which does not have the second value; the nearest "
        f"place that would do is {spot.position} {scene.path(child.module)}"
    )


def _value_in(scene: Scene, owner: Call, second: Spot, path: str) -> Spot:
    """The spot of a second value among the calls that a module further out makes.

    Raises:
        CannotRewriteError: the child does not give it on.
    """
    if second.owner is owner:
        return second
    if owner not in _around(second.owner):  # it is given to this forward
        return Spot(owner, "before", second.value, operand=_operand(owner, second.value))
    inside = _levels(second, owner)
    child = inside[-1]
    if owner.runs[id(child.module)] > 1:
        _check_once(scene, inside, owner, path)
    crosses, key = _item(child.out, second.value)
    if crosses:
        return Spot(child, "after", second.value, key)
    operand = _operand(child, second.value)
    if operand is not None:
        return Spot(child, "before", second.value, operand=operand)
    raise CannotRewriteError(
        f"{path}: the second value lies inside {scene.path(child.module)}, which does not give it on; the nearest that "
        f"would do is with: {scene.path(child.module)}"
    )


def _levels(spot: Spot, owner: Call) -> list[Call]:
    """The runs from that of a spot's owner to the child of `owner` that it is in."""
    found = []
    for level in _around(spot.owner):
        if level is owner:
            break
        found.append(level)
    return found


def _check_once(scene: Scene, inside: list[Call], owner: Call, path: str) -> None:
    """Refuse what runs more often than the module further out: a place there would be only one of its calls."""
    runs = len(scene.record.calls_of(owner.module))
    for level in inside:
        calls = len(scene.record.calls_of(level.module))
        if calls != runs:
            name = scene.path(level.module)
            raise CannotRewriteError(
                f"{path}: {name} is called {calls} times, and only {scene.owner(owner) or 'the model'} has both values; "
                f"name one of its calls in place of a value inside it: {name} with call: 1"
            )


def _item(tree: Any, value: int) -> tuple[bool, int | str | None]:
    """Whether a value is a call's result or an item of it, and under which key (None: itself)."""
    if isinstance(tree, Ref):
        return tree.value == value, None
    items: Any = (
        tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    )
    keys = [key for key, item in items if isinstance(item, Ref) and item.value == value]
    return bool(keys), keys[0] if keys else None


def _begin(event: Any) -> int:
    time: int = event.start if isinstance(event, Call) else event.time
    return time


def _said(scene: Scene, spot: Spot) -> str:
    return f"{spot.position} {scene.name(spot)}"
