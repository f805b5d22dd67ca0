"""In-place operations around a site: which forbid a block there, and which need a copy beside it.

A block gives a new tensor, so from the site on there are two where the original net has one: the original,
which its owner, or a caller further out, may still hold under another name, and the block's result. A write
into one with a later reader of the other would be missed: a hazard. A write into the original after the
block read it would spoil what the block keeps for its backward: the block is given a copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from torch import fx, nn

from attninject.anatomy.dataflow import Spot
from attninject.errors import InPlaceHazardError, TraceRefused
from attninject.observe.record import Call, Op
from attninject.surgery.injected_state import base_class
from attninject.surgery.local_graph import Effect, LocalGraph, find, operands, targets

from .scene import Scene, call_node


@dataclass(frozen=True)
class Copies:
    """What has to be copied at a site: what the block is given; what it gives.

    `written`: something later writes into what the block gives, which matters to a block that keeps it.
    """

    given: bool = False
    result: bool = False
    written: bool = False


@dataclass
class _Sides:
    """What happened to the two tensors since the site: `True` is the block's result, `False` the original."""

    path: str
    shared: frozenset[int]  # storages of the site's value
    writes: dict[bool, bool] = field(default_factory=lambda: {True: False, False: False})
    returned: set[bool] = field(default_factory=set)  # sides of what the last graph returned
    aliased: bool = False  # a write into the result is read through another view of it

    def read(self, sides: set[bool]) -> None:
        if any(self.writes[not side] for side in sides):
            self.refuse()

    def refuse(self) -> NoReturn:
        raise InPlaceHazardError(
            f"{self.path}: an in-place operation changes a value that others read here, so that no block "
            "could keep the function; choose a site after the in-place operation, or one before it that only "
            "it reads"
        )

    def write(self, sides: set[bool]) -> None:
        for side in sides:
            self.writes[side] = True

    def walk(
        self, graph: fx.Graph, effects: Mapping[fx.Node, Effect], site: fx.Node, inside: set[bool]
    ) -> None:
        """Go through a graph from `site` on. `inside`: the sides that the site itself gives on."""
        behind = {site} if True in inside else set()
        views: set[fx.Node] = set()  # of the result, written to by another name
        self.returned, started = set(), False
        for node in graph.nodes:
            if node is site or not started:
                started |= node is site
                continue
            mine = [a for a in node.all_input_nodes if a in effects and effects[a].storages & self.shared]
            sides = {a in behind for a in mine}
            self.read(sides)
            self.aliased |= any(a in views for a in mine)
            if node not in effects:
                self.returned |= sides
                continue
            if effects[node].writes & self.shared:
                self.write(sides)
                views |= behind - {site, node}
            if effects[node].storages & self.shared and True in sides:
                behind.add(node)


# --- in the owner's graph ----------------------------------------------------------------------


def in_graph(
    scene: Scene, local: LocalGraph, spot: Spot, node: fx.Node, operand: int | str, path: str
) -> Copies:
    """Check a site in its owner's graph, in both modes, and what becomes of its value further out.

    Args:
        node: of the site, in the eval graph.
        operand: `before`: which of the node's.

    Raises:
        InPlaceHazardError: no block could keep the function there.
    """
    assert spot.owner is not None
    storage = scene.record.values[spot.value].storage
    if _never_written(scene, local, storage, spot.owner):
        return Copies()
    sides = _walked(local.eval, local.effects, spot, node, operand, path, frozenset({storage}))
    for again, shared in _runs(scene, spot, spot.owner):
        outside = _Sides(path, shared, dict(sides.writes), set(sides.returned))
        _outward(scene, outside, again)
        sides.writes[False] |= outside.writes[False]
        sides.aliased |= outside.aliased
    twin = None if local.train is local.eval else find(local.train, targets(local.eval)[node])
    if twin is None or twin not in local.train_effects:
        return Copies(sides.writes[False], sides.aliased, sides.writes[True])
    value = twin if spot.position == "after" else _operand(twin, operand)
    shared = local.train_effects[value].storages if value in local.train_effects else frozenset()
    other = _walked(local.train, local.train_effects, spot, twin, operand, path, shared)
    return Copies(
        sides.writes[False] or other.writes[False],
        sides.aliased or other.aliased,
        sides.writes[True] or other.writes[True],
    )


def _never_written(scene: Scene, local: LocalGraph, storage: int, owner: Call) -> bool:
    """Whether nothing ever writes into the site's tensor, as is the rule: then there is nothing to walk through."""
    once = len(scene.record.calls_of(owner.module)) == 1
    return once and local.train is local.eval and storage not in scene.writers


def _runs(scene: Scene, spot: Spot, owner: Call) -> Iterator[tuple[Call, frozenset[int]]]:
    """Every run of the site's owner, and the storage of the site's value in it."""
    values = scene.record.values
    wanted = values[spot.value].storage
    for run in scene.record.calls_of(owner.module):
        if run is owner:
            yield run, frozenset({wanted})
            continue
        mine, its = _values(owner), _values(run)
        if len(mine) != len(its):
            raise TraceRefused("its runs in one forward go different ways")
        pairs = zip(mine, its, strict=True)
        twin = next((b for a, b in pairs if values[a].storage == wanted), spot.value)
        yield run, frozenset({values[twin].storage})


def alike_in_all_runs(scene: Scene, spot: Spot, owner: Call) -> bool:
    """Whether the site's tensor has the same channels in every run of its owner; true where that cannot be told."""
    runs = scene.record.calls_of(owner.module)
    layout = scene.layout(spot) if len(runs) > 1 else None
    mine = _values(owner)
    if layout is None or spot.value not in mine:
        return True
    at = mine.index(spot.value)
    shapes = [scene.record.shape(its[at]) for run in runs if len(its := _values(run)) == len(mine)]
    ranked = [shape for shape in shapes if len(shape) == len(scene.record.shape(spot.value))]
    return len({layout.channels(shape) for shape in ranked}) == 1


def _values(call: Call) -> list[int]:
    return [*call.ins, *(v for event in call.events for v in (*event.ins, *event.outs))]


def _walked(
    graph: fx.Graph,
    effects: Mapping[fx.Node, Effect],
    spot: Spot,
    node: fx.Node,
    operand: int | str,
    path: str,
    shared: frozenset[int],
) -> _Sides:
    sides = _Sides(path, shared)
    if spot.position == "after":
        sides.walk(graph, effects, node, {True})
        return sides
    value = _operand(node, operand)
    twice = any(a is value for key, a in operands(node).items() if key != operand)
    if effects[node].writes & shared:
        sides.write({True, False} if twice else {True})
    sides.walk(graph, effects, node, {True} if effects[node].storages & shared else set())
    return sides


def _operand(node: fx.Node, operand: int | str) -> Any:
    return operands(node)[operand]


# --- at a module -------------------------------------------------------------------------------


def at_module(scene: Scene, spot: Spot, path: str) -> Copies:
    """The same for a site at a call: by its owner's graph where there is one, else by storages.

    Raises:
        InPlaceHazardError: no block could keep the function there.
    """
    call = spot.event
    assert isinstance(call, Call)
    storage = scene.record.values[spot.value].storage
    inside = spot.position == "before" and storage in call.writes
    later = [op for op in scene.writers.get(storage, ()) if op.time > call.end]
    if not inside and not later:
        return Copies()
    owner = call.parent
    if owner is None:
        return Copies()
    sides = _Sides(path, frozenset({storage}))
    sides.writes[True] = inside
    sides.returned = {True} if spot.position == "after" or _gives(scene, call, storage) else set()
    if is_chain(owner.module):
        _along(scene, sides, call)
        return Copies(sides.writes[False], written=sides.writes[True])
    try:
        local = scene.graph(owner.module)
        node = call_node(local.eval, call)
        if node is not None:
            return in_graph(scene, local, spot, node, graph_operand(node, spot), path)
    except TraceRefused:
        pass
    if _doubtful(scene, spot, storage, inside, later):
        sides.refuse()
    return Copies(True)


def graph_operand(node: fx.Node, spot: Spot) -> int | str:
    """The spot's operand, which its node must have.

    Raises:
        TraceRefused: the forward was called with it, the graph does without.
    """
    operand = spot.operand
    if operand in operands(node) or spot.position == "after":
        return operand
    raise TraceRefused(f"operand {operand!r} is not in its graph")


def _doubtful(scene: Scene, spot: Spot, storage: int, inside: bool, later: list[Op]) -> bool:
    """Without a graph: whether somebody else may read what is written."""
    call = spot.event
    assert isinstance(call, Call)
    if not inside:
        return scene.record.born[storage] < call.start and bool(later)
    values = scene.record.values
    events = call.parent.events if call.parent else []
    readers = [e for e in events if e.start > call.end and any(values[i].storage == storage for i in e.ins)]
    return len(readers) > 1


def given_is_written(scene: Scene, module: nn.Module) -> bool:
    """Whether what a module is given is written to, in a call or later: who is to have it as it was gets a copy."""
    for call in scene.record.calls_of(module):
        storages = {scene.record.values[value].storage for value in call.ins}
        if any(op.time > call.start for s in storages for op in scene.writers.get(s, ())):
            return True
    return False


# --- further out -------------------------------------------------------------------------------


def _outward(scene: Scene, sides: _Sides, call: Call) -> None:
    """Go on where `call` returned to, as long as somebody there may hold the original tensor."""
    parent = call.parent
    outside = any(scene.record.born[s] < call.start for s in sides.shared)
    if parent is None or not (outside or False in sides.returned):
        return
    if True not in sides.returned and not sides.writes[True]:  # only the original goes on
        if any(op.time > call.end for s in sides.shared for op in scene.writers.get(s, ())):
            sides.write({False})
    elif is_chain(parent.module):
        _along(scene, sides, call)
    else:
        _in_parent(scene, sides, call, parent)


def _along(scene: Scene, sides: _Sides, call: Call) -> None:
    """The rest of a Sequential: each value has one reader, so nobody in it holds the original."""
    parent = call.parent
    assert parent is not None
    writers = (op for s in sides.shared for op in scene.writers.get(s, ()))
    if True in sides.returned and any(call.end < op.time < parent.end for op in writers):
        sides.write({True})
    if parent.events[-1] is not call:
        sides.returned &= {True} if any(_gives(scene, parent, s) for s in sides.shared) else set()
    _outward(scene, sides, parent)


def _in_parent(scene: Scene, sides: _Sides, call: Call, parent: Call) -> None:
    try:
        local = scene.graph(parent.module)
        node = call_node(local.eval, call)
    except TraceRefused:
        node = None
    if node is None:
        later = [op for op in scene.ops if op.time > call.end and op.reads & sides.shared]
        if later and (sides.writes[True] or any(op.writes & sides.shared for op in later)):
            sides.refuse()
        return
    sides.walk(local.eval, local.effects, node, sides.returned & {True})
    _outward(scene, sides, parent)


def _gives(scene: Scene, call: Call, storage: int) -> bool:
    return any(scene.record.values[o].storage == storage for o in call.outs)


def is_chain(module: nn.Module) -> bool:
    """Whether a module is a Sequential that does nothing but call its children in turn."""
    cls = base_class(module)
    return issubclass(cls, nn.Sequential) and cls.forward is nn.Sequential.forward
