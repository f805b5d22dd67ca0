"""Which of the spots that a rule found stay: filters, then pick."""

from __future__ import annotations

from typing import Any

from torch import nn

from attninject.anatomy.dataflow import Spot
from attninject.recipe.patterns import compile_pattern
from attninject.recipe.rules import Every, Rule
from attninject.wording import listed

from .scene import Scene


def wanted(rule: Rule, name: str, module: nn.Module) -> bool:
    """Whether a module passes the filters that ask for its class and its name alone."""
    if rule.type and not ({c.__name__ for c in type(module).__mro__} & set(rule.type)):
        return False
    return not any(compile_pattern(text).matches(name) for text in rule.exclude)


def passes(rule: Rule, scene: Scene, spot: Spot) -> bool:
    """Whether all of a rule's filters keep a spot."""
    name = scene.name(spot)
    inner = name[len(scene.root_path) + 1 :] if scene.root_path else name
    if not wanted(rule, inner.split("::")[0], spot.module):
        return False
    for text in rule.exclude if "::" in inner else ():
        pattern = compile_pattern(text)
        if pattern.operation is not None and pattern.match_operation(*inner.split("::")):
            return False
    if rule.stages and scene.places.stage_of(spot.time) not in _stages(rule, scene):
        return False
    channels = scene.channels(spot) if rule.min_channels else None
    return channels is None or channels >= rule.min_channels


def _stages(rule: Rule, scene: Scene) -> set[int]:
    count = len(scene.places.spans)
    return {s if s > 0 else count + 1 + s for s in rule.stages}


def pick(rule: Rule, scene: Scene, found: list[Spot]) -> list[Spot]:
    """What `pick` chooses, per model, owner or stage, in call order."""
    groups: dict[int, list[Spot]] = {}
    for spot in found:
        key = 0
        if rule.per == "owner":
            key = id(spot.owner.module) if spot.owner else 0
        elif rule.per == "stage":
            key = scene.places.stage_of(spot.time)
        groups.setdefault(key, []).append(spot)
    chosen = [s for group in groups.values() for s in _picked(rule.pick, group)]
    return sorted(chosen, key=lambda s: s.time)


def _picked(pick: Any, group: list[Spot]) -> list[Spot]:
    if pick == "all":
        return group
    if pick == "first":
        return group[:1]
    if pick == "last":
        return group[-1:]
    if isinstance(pick, Every):
        return group[pick.offset :: pick.every]
    indices = {i if i >= 0 else len(group) + i for i in pick}
    return [s for i, s in enumerate(group) if i in indices]


def nothing_left(rule: Rule, scene: Scene, label: str, found: list[Spot], kept: list[Spot]) -> str:
    """Why nothing is left: which filters took all, or that `pick` chose none."""
    filters = [f for f in ("type", "exclude", "stages", "min_channels") if getattr(rule, f)]
    if kept:
        pick = list(rule.pick) if isinstance(rule.pick, tuple) else rule.pick
        return f"{label}: pick: {pick} chooses none of the {len(kept)} sites that are left"
    kinds = ", ".join(sorted({type(s.module).__name__ for s in found}))
    return (
        f"{label}: {len(found)} sites match ({listed([scene.name(s) for s in found])}; {kinds}), "
        f"but {' and '.join(filters) or 'the filters'} leave none of them"
    )
