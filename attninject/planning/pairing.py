"""From a rule's `with` to second values: which belongs to which site, and what a plan says of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attninject.anatomy.dataflow import Spot
from attninject.errors import LayoutError, NoMatchError, NoTensorError, PatternError, SeveralCallsError
from attninject.layout import Layout
from attninject.observe.record import Call
from attninject.recipe.patterns import compile_pattern
from attninject.recipe.rules import Rule
from attninject.recipe.targets import Target
from attninject.wording import listed

from .by_pattern import by_pattern
from .layout_check import layout_of_second
from .meeting import Placed
from .planned_site import SecondValue
from .scene import Scene

Key = tuple[str, ...]  # what the wildcards of a pattern stood for, or the groups of a regular expression


def partners(
    rule: Rule, scene: Scene, spots: list[Spot], label: str, notes: list[str]
) -> Iterator[tuple[Spot, Spot]]:
    """Each spot with the one that `with` names for it.

    One that is found serves all, unless its wildcards choose some of the spots. Of several, each spot gets the one
    whose wildcards stood for what its own stood for, as many as `with` has; of those, the argument of its own call.
    Notes on patterns that find nothing.

    Raises:
        PlanError: of the kind that fits: there is no second value, or several that could be meant.
    """
    asked = rule.with_
    assert asked is not None
    search = Rule(
        rule.block, after=asked.after, before=asked.before, call=asked.call, input=asked.input,
        output=asked.output,
    )  # fmt: skip
    found = by_pattern(search, scene, f"{label}, with", notes)
    theirs = [(second, _keys(asked.after or asked.before, scene, second, label)) for second in found]
    mine = [(spot, _keys(rule.after or rule.before, scene, spot, label)) for spot in spots]
    if len(found) == 1 and _serves_all(theirs[0][1], [keys for _, keys in mine]):
        yield from ((spot, found[0]) for spot in spots)
        return
    what = f"{label}: with {asked} finds {len(found)} values ({listed([scene.name(s) for s in found], 4)})"
    if rule.place:
        raise SeveralCallsError(
            f"{what}, and a place has no wildcards that would tell which is whose; name one value, or the sites by "
            "after or before"
        )
    for spot, own in mine:
        fitting = [second for second, keys in theirs if _fit(own, keys)]
        given = [s for s in fitting if s.event is spot.event and s.position == "before"]
        fitting = given or fitting
        if len(fitting) == 1:
            yield spot, fitting[0]
            continue
        stood = " or ".join(", ".join(map(repr, key)) or "nothing" for key in own)
        told = f"the wildcards of {scene.name(spot)} stand for {stood}"
        if fitting:
            names = listed([f"{scene.name(s)} call {getattr(s.event, 'number', 1)}" for s in fitting], 4)
            raise SeveralCallsError(
                f"{what}; {told}, which fits {names}: give `with` a call, or as many wildcards "
                "(in a regular expression: groups) as tell them apart"
            )
        raise NoMatchError(
            f"{what}; {told}, which fits none of them; exclude the site, or write `with` otherwise"
        )


def _serves_all(keys: list[Key], sites: list[list[Key]]) -> bool:
    """Whether the one value that was found is that of every site: not where its wildcards choose among the sites."""
    return not any(map(any, keys)) or len({_fit(own, keys) for own in sites}) == 1


def _fit(own: list[Key], keys: list[Key]) -> bool:
    """Whether what the wildcards of a second value stood for is what the first ones of a site stood for."""
    return any(mine[: len(key)] == key for mine in own for key in keys)


def _keys(patterns: Sequence[str | Target] | None, scene: Scene, spot: Spot, label: str) -> list[Key]:
    """What the wildcards of the first pattern that names a spot stood for, under each name that it has there."""
    call = spot.event if isinstance(spot.event, Call) else spot.event.call
    tail = "" if spot.target is None else f"::{spot.target.name}"
    texts = [text for text in patterns or () if isinstance(text, str)]
    found: dict[Key, None] = {}
    try:
        for name in scene.names_at(call):
            keys = (compile_pattern(text).captures(name + tail) for text in texts)
            found.update(dict.fromkeys([key for key in keys if key is not None][:1]))
    except PatternError as error:
        raise SeveralCallsError(f"{label}: {error}; name one value with `with`") from error
    return list(found) or [()]


def described(rule: Rule, scene: Scene, placed: Placed, here: Layout, label: str) -> SecondValue | None:
    """A site's second value as a plan shows it; None where it has none.

    Args:
        rule: names the block.
        scene: the model.
        placed: the site.
        here: the layout that the block sees there.
        label: how messages call the rule.

    Raises:
        LayoutError, NoTensorError: the block cannot be given it.
    """
    spot = placed.second
    if spot is None:
        return None
    value, samples = scene.record.values[spot.value], scene.record.shape(placed.spot.value)[0]
    if not value.dtype.is_floating_point:
        raise NoTensorError(f"{label}: {scene.name(spot)} gives {value.dtype}, no floating-point tensor")
    layout = layout_of_second(rule, scene, spot, here, label)
    if value.shape[0] != samples:
        raise LayoutError(
            f"{label}: {scene.name(spot)}, the second value, holds {value.shape[0]} samples, and "
            f"{scene.name(placed.spot)} {samples}"
        )
    return SecondValue(
        path=scene.name(spot),
        position=spot.position,
        call=getattr(spot.event, "number", 1),
        shape=value.shape,
        layout=layout,
        channels=layout.channels(value.shape),
        input=spot.operand if spot.position == "before" else None,
        output=spot.output,
    )
