"""Named places: sites that mean the same on every architecture. A new place is one function here.

A place reads a `PlaceMap`, the structure that one recorded run shows, and gives spots in call order. Nothing here
imports torch, so that a recipe is checked, and the places are listed, without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from attninject.errors import NoSuchPlaceError

if TYPE_CHECKING:
    from .dataflow import Spot
    from .place_map import PlaceMap

    Place = Callable[[PlaceMap], list[Spot]]

PLACES: dict[str, Place] = {}
"""Name → function; `register_place` adds to it."""


def register_place(name: str) -> Callable[[Place], Place]:
    """Make a function a place that rules may name: `@register_place("second_block")`."""

    def register(place: Place) -> Place:
        PLACES[name] = place
        return place

    return register


def spots(net: PlaceMap, name: str) -> list[Spot]:
    """The spots of a place, in call order.

    Raises:
        NoSuchPlaceError: the net has no such place; the message names those that it has.
    """
    found = PLACES[name](net)
    if found:
        return [net.inside_repeated(spot) for spot in found]
    others = [other for other, place in sorted(PLACES.items()) if other != name and place(net)]
    raise NoSuchPlaceError(
        f"this {type(net.root.module).__name__} has no place {name!r}; "
        + (f"it has {', '.join(others)}" if others else "name modules with `after` or `before`")
        + net.unseen()
    )


@register_place("before_downsample")
def _before_downsample(net: PlaceMap) -> list[Spot]:
    """Every stage end but the last, of each way down."""
    return [end for end in net.stages[:-1] if not net.ends_a_way(end)]


@register_place("block_end")
def _block_end(net: PlaceMap) -> list[Spot]:
    """After each repeated unit: residual, dense layer, transformer or inception block."""
    return [net.after(unit) for unit in net.units if unit.outs]


@register_place("block_start")
def _block_start(net: PlaceMap) -> list[Spot]:
    """Before each repeated unit, where its branch and its shortcut part."""
    return [net.before(unit) for unit in net.units if unit.ins]


@register_place("decoder_end")
def _decoder_end(net: PlaceMap) -> list[Spot]:
    """The last value at each resolution that a net goes up to again behind its stages."""
    return list(net.decoder)


@register_place("head_input")
def _head_input(net: PlaceMap) -> list[Spot]:
    """The maps that a detector's head reads; what a decoder gives; else the last value at the last stage's resolution.

    That is before it is pooled or a token is taken from it, before several heads part, and before a layer that makes a
    map that the net gives.
    """
    if not net.stages:
        return []
    if read := net.read_by_head():
        return read
    if net.decoder:
        return net.decoder[-1:]
    end = last = net.stages[-1]
    for call in net.layers_behind(end):
        if not net.flow.depends(call.outs[0], end.value):
            continue  # an encoding of positions, made of no map
        if net.resolution(net.after(call)) != net.resolution(end) or net.gives_map(call):
            break
        if net.can_carry(call) and net.is_shared(call.outs[0], last.value):
            last = net.unshared(net.after(call))
    return [last]


@register_place("residual_branch")
def _residual_branch(net: PlaceMap) -> list[Spot]:
    """The branch's last value before each residual add of the trunk."""
    return net.branch_ends()


@register_place("shortcut")
def _shortcut(net: PlaceMap) -> list[Spot]:
    """The other operand of each residual add of the trunk."""
    return net.shortcuts()


@register_place("stage_end")
def _stage_end(net: PlaceMap) -> list[Spot]:
    """The last value at each resolution of the trunk."""
    return list(net.stages)


@register_place("stem_end")
def _stem_end(net: PlaceMap) -> list[Spot]:
    """What enters the first unit on the way down: after the module that made it, else before the unit."""
    first = next((unit for unit in net.encoder if unit.ins), None)
    if first is None:
        return []
    made = net.made_by(first, first.ins[0])
    return [made if made and not net.is_out_of_reach(made) else net.before(first)]
