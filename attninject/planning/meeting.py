"""Where a block of two inputs goes: into a forward that has both of its values.

Nothing is carried past a forward: the block goes into one that has both values, that of the site's owner or of a
module further out which is given them by its children. So copies, compilation, export and checkpointing know nothing
of it. Where no forward has both, the message names the nearest values that would do. Of a forward that cannot be
rewritten, the arguments of one call are both there for the module that is called: the block then hangs on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

from torch import fx

from attninject.anatomy.dataflow import Spot
from attninject.errors import CannotRewriteError, TraceRefused
from attninject.observe.record import Call, Ref
from attninject.surgery.injected_state import Second, base_class
from attninject.surgery.local_graph import LocalGraph, Target, bound, find, operands, targets
from attninject.surgery.location import Location

from . import inplace_hazards, locating
from .crossing import around, operand_with, said, same_in_training, site_in, value_in
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
            there = said(scene, placed.spot)
            notes.append(
                f"{label}: {said(scene, spot)} goes {there}, where the same value meets the second one"
            )
        yield placed


def _located(scene: Scene, spot: Spot, second: Spot, label: str) -> Placed:
    """Where the block of a site goes: into the innermost forward that has both values and can be rewritten."""
    path = f"{label}: {said(scene, spot)} with {said(scene, second)}"
    theirs = list(around(second.owner))
    reasons: list[str] = []
    for owner in around(spot.owner):
        if owner not in theirs and not _is_given(scene, owner, second):
            continue
        try:
            return _in(scene, owner, spot, second, path)
        except CannotRewriteError as refused:
            reasons.append(str(refused).removeprefix(f"{path}: "))
    why = "; further out, ".join(reasons[:1] + reasons[1:][-1:])
    if second.event is spot.event and isinstance(spot.event, Call) and second.position == "before":
        return _at_call(scene, spot, second, path, why or "the root itself")
    raise CannotRewriteError(f"{path}: {why or 'the model itself has no forward around it; name its parts'}")


def _at_call(scene: Scene, spot: Spot, second: Spot, path: str, reason: str) -> Placed:
    """The block on the module whose argument the second value is, and whose argument or result the site is.

    Raises:
        CannotRewriteError: the module carries none; the message says why.
    """
    location = locating.at_call(scene, spot, path, reason)
    call = spot.event
    assert isinstance(call, Call)
    copied = inplace_hazards.given_is_written(scene, call.module)
    given = Second("before", None, locating.parameter(call, second, path), copied=copied)
    return Placed(spot, replace(location, insertion=replace(location.insertion, second=given)), second)


def _is_given(scene: Scene, owner: Call, second: Spot) -> bool:
    """Whether a second value from outside is an argument of a forward, in each of its runs."""
    once = len(scene.record.calls_of(owner.module)) == 1
    itself = second.event is owner and second.position == "before"
    return operand_with(owner, second.value) is not None and (itself or once)


def _in(scene: Scene, owner: Call, spot: Spot, second: Spot, path: str) -> Placed:
    locating.check_bypass(owner, path)
    here, there = site_in(scene, owner, spot, path), value_in(scene, owner, second, path)
    for named, found in ((spot, here), (second, there)):
        if found is not named and not same_in_training(scene, named, found):
            raise CannotRewriteError(
                f"{path}: while training {said(scene, found)} is another value than {said(scene, named)}, as behind a "
                f"dropout; the nearest that would do is {said(scene, found)}"
            )
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
    copied, begun = _written(scene, local, node, there), there.time
    if there.event is owner:  # its own input
        there = replace(there, position="after")
    operand = inplace_hazards.graph_operand(node, there)
    found = Second(there.position, target, operand, there.output, copied=copied)
    site = _node(local, owner, here)
    assert site is not None
    for graph in local.graphs:
        at, given = find(graph, targets(local.eval)[site]), find(graph, target)
        if at is None or given is None:
            raise TraceRefused("the call of the second value is not in its training graph")
        _check_order(graph, at, given, found, here, path)
    storage = scene.record.values[there.value].storage
    if any(here.time < op.time < begun for op in scene.writers.get(storage, ())):
        _refuse_late(path)
    return found


def _node(local: LocalGraph, owner: Call, spot: Spot) -> fx.Node | None:
    """The node of a spot in the graph of the forward that it is in; of an input of that forward its placeholder."""
    if not isinstance(spot.event, Call):
        return node_of(local, spot)
    if spot.event is not owner:
        return call_node(local.eval, spot.event)
    given = bound(base_class(owner.module).forward, owner.args, owner.kwargs)
    named = spot.operand if isinstance(spot.operand, str) else list(given)[spot.operand]
    alike = [n for n, (value, _) in given.items() if isinstance(value, Ref) and value.value == spot.value]
    return find(local.eval, Target("input", named if named in alike else alike[0])) if alike else None


def _check_order(graph: fx.Graph, at: fx.Node, given: fx.Node, second: Second, here: Spot, path: str) -> None:
    maker: Any = given if second.position == "after" else operands(given).get(second.operand)
    if not isinstance(maker, fx.Node):
        raise TraceRefused("the second value is made by no node of its graph")
    order = {node: i for i, node in enumerate(graph.nodes)}
    if order[maker] > order[at] or (maker is at and here.position == "before"):
        _refuse_late(path)


def _refuse_late(path: str) -> NoReturn:
    raise CannotRewriteError(
        f"{path}: the second value comes to be later than the block would need it; name one that is there by then"
    )


def _written(scene: Scene, local: LocalGraph, node: fx.Node, there: Spot) -> bool:
    """Whether the second value is written to in place once it is there."""
    storage = scene.record.values[there.value].storage
    if any(op.time > there.time for op in scene.writers.get(storage, ())):
        return True
    twin = find(local.train, targets(local.eval)[node])
    value: Any = twin
    if twin is not None and there.position == "before" and node.op != "placeholder":
        value = operands(twin).get(there.operand)
    shared = local.train_effects[value].storages if value in local.train_effects else frozenset()
    return any(effect.writes & shared for effect in local.train_effects.values())
