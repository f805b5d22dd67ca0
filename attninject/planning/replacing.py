"""From a module whose place a block is to take to a location: what carries the new part, and what forbids it.

The module stays: its class is extended, so that its forward runs the new part on what it was given and on what it
made of that. So its object, keys, tensors and hooks are what they were. A module that cannot be extended, since
converting norms replaces it or a parametrization owns its class, keeps its call in its owner's graph, and the new
part stands behind that call.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch.nn.modules.batchnorm import _NormBase

from attninject.anatomy.dataflow import Spot
from attninject.errors import CannotRewriteError, NoTensorError, TraceRefused
from attninject.observe.record import Call, Ref
from attninject.surgery.injected_state import Insertion, base_class, injected_in
from attninject.surgery.location import Location
from attninject.wording import listed

from . import inplace_hazards, locating
from .scene import Scene, call_node


def locate(scene: Scene, spot: Spot, path: str) -> Location:
    """Decide what carries the new part of a module; its insertion is completed by the plan, as everywhere.

    Args:
        scene: the model.
        spot: `replace` a call, with the operand that the new part is given.
        path: how messages call the module.

    Raises:
        CannotRewriteError, NoTensorError: the module's place cannot be taken; the message says why.
        InPlaceHazardError: no new part could keep the function there.
    """
    call, owner = spot.event, spot.owner
    assert isinstance(call, Call)
    if owner is None:
        raise CannotRewriteError(
            f"{path or 'the model'}: the model itself has no place to take; name its parts"
        )
    if not isinstance(call.out, Ref):
        raise NoTensorError(f"{path}: it gives a {type(call.out).__name__}, and a block gives one tensor")
    locating.check_bypass(owner, path)
    _refuse_unlike_calls(scene, spot, path)
    if others := scene.sharing.others(call.module):
        raise CannotRewriteError(
            f"{path}: {listed(others)} {locating.has(others)} it too and would be changed as well; give each its own"
        )
    known = injected_in(call.module)
    if taken := [i.name for i in (known.edit if known else ()) if i.position == "replace"]:
        raise CannotRewriteError(f"{path}: {taken[0]} has its place already; eject that first")
    if isinstance(call.module, _NormBase) or hasattr(call.module, "parametrizations"):
        return _in_graph(scene, spot, owner, path)
    return _at_module(scene, spot, path)


def result_of(spot: Spot) -> Spot:
    """The spot of what the module gives, which the block's result takes the place of."""
    call = spot.event
    assert isinstance(call, Call)
    return Spot(call, "after", call.outs[0])


def shared_notes(scene: Scene, spots: list[Spot], label: str) -> Iterator[str]:
    """That a module which the model has in several places is replaced in all of them."""
    for spot in spots:
        names = [name for name, module in scene.names.items() if module is spot.module]
        if len(names) > 1:
            yield f"{label}: {names[0]} is {listed(names[1:])} too and is replaced there as well"


def _refuse_unlike_calls(scene: Scene, spot: Spot, path: str) -> None:
    """Refuse a module that one block could not serve at each of its calls."""
    layout = scene.layout(spot)
    shapes = [scene.record.shape(c.ins[0]) for c in scene.record.calls_of(spot.module) if c.ins]
    if layout is None or len({len(s) for s in shapes}) > 1:
        return
    channels = sorted({layout.channels(shape) for shape in shapes})
    if len(channels) > 1:
        raise CannotRewriteError(
            f"{path}: it is called {len(shapes)} times, with {listed([str(c) for c in channels])} channels, and a "
            "block has one width; give each call a module of its own"
        )


def _at_module(scene: Scene, spot: Spot, path: str) -> Location:
    call = spot.event
    assert isinstance(call, Call)
    behind = result_of(spot)
    copies = inplace_hazards.at_module(scene, behind, path)
    locating.check_carrier(scene, call, behind, path)
    operand = locating.parameter(call, spot, path)
    given = copies.given or inplace_hazards.given_is_written(scene, call.module)
    insertion = Insertion("", "replace", None, operand, copy_given=given, copy_result=copies.result)
    return Location(insertion, call.module, written=copies.written, old=call.module)


def _in_graph(scene: Scene, spot: Spot, owner: Call, path: str) -> Location:
    """Behind the module's one call, in its owner's graph."""
    call = spot.event
    assert isinstance(call, Call)
    kind, norm = base_class(call.module).__name__, isinstance(call.module, _NormBase)
    why = "a batch norm, which converting or freezing norms replaces"
    what = f"{path}: {kind} is {why if norm else 'parametrized, so that its class is swapped when that ends'}"
    if len(scene.record.calls_of(call.module)) > len(scene.record.calls_of(owner.module)):
        raise CannotRewriteError(f"{what}, and it is called several times")
    if (reason := locating.why_not_rewritten(scene, owner)) and not locating.is_open_root(scene, owner):
        raise CannotRewriteError(f"{what}, and its call cannot be rewritten: {reason}")
    try:
        local = scene.graph(owner.module)
        node = call_node(local.eval, call)
        if node is not None:
            inplace_hazards.graph_operand(node, replace(spot, position="before"))
        at = locating.in_graph(scene, local, owner, result_of(spot), path)
    except TraceRefused as refused:
        raise CannotRewriteError(f"{what}, and its call cannot be rewritten: {refused}") from refused
    given = at.insertion.copy_given or inplace_hazards.given_is_written(scene, call.module)
    insertion = replace(at.insertion, position="replace", operand=spot.operand, copy_given=given)
    return replace(at, insertion=insertion, old=call.module)
