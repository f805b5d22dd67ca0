"""Which of the matches stay: filters, then pick."""

from __future__ import annotations

from typing import Any

from torch import nn

from attninject.recipe.patterns import compile_pattern
from attninject.recipe.rules import Every, Rule
from attninject.wording import listed

from .scene import Match, Scene

# --- filters -----------------------------------------------------------------------------------


def wanted(rule: Rule, name: str, module: nn.Module) -> bool:
    """Whether a module passes the filters that ask for its class and its name alone."""
    if rule.type and not ({c.__name__ for c in type(module).__mro__} & set(rule.type)):
        return False
    return not any(compile_pattern(text).matches(name) for text in rule.exclude)


def passes(rule: Rule, scene: Scene, found: Match) -> bool:
    """Whether all of a rule's filters keep a match."""
    inner = found.path[len(scene.root_path) + 1 :] if scene.root_path else found.path
    if not wanted(rule, inner.split("::")[0], found.module):
        return False
    for text in rule.exclude if "::" in inner else ():
        pattern = compile_pattern(text)
        if pattern.operation is not None and pattern.match_operation(*inner.split("::")):
            return False
    if rule.stages and scene.places.stage_of(found.spot.time) not in _stages(rule, scene):
        return False
    return found.channels is None or found.channels >= rule.min_channels


def _stages(rule: Rule, scene: Scene) -> set[int]:
    count = len(scene.places.spans)
    return {s if s > 0 else count + 1 + s for s in rule.stages}


def pick(rule: Rule, scene: Scene, found: list[Match]) -> list[Match]:
    """What `pick` chooses, per model, owner or stage, in call order."""
    groups: dict[Any, list[Match]] = {}
    for m in found:
        key: Any = 0
        if rule.per == "owner":
            owner = m.spot.owner
            key = id(owner.module) if owner else 0
        elif rule.per == "stage":
            key = scene.places.stage_of(m.spot.time)
        groups.setdefault(key, []).append(m)
    chosen = [m for group in groups.values() for m in _picked(rule.pick, group)]
    return sorted(chosen, key=lambda m: m.spot.time)


def _picked(pick: Any, group: list[Match]) -> list[Match]:
    if pick == "all":
        return group
    if pick == "first":
        return group[:1]
    if pick == "last":
        return group[-1:]
    if isinstance(pick, Every):
        return group[pick.offset :: pick.every]
    indices = {i if i >= 0 else len(group) + i for i in pick}
    return [m for i, m in enumerate(group) if i in indices]


def nothing_left(rule: Rule, label: str, found: list[Match], kept: list[Match]) -> str:
    """Why nothing is left: which filters took all, or that `pick` chose none."""
    filters = [f for f in ("type", "exclude", "stages", "min_channels") if getattr(rule, f)]
    if kept:
        pick = list(rule.pick) if isinstance(rule.pick, tuple) else rule.pick
        return f"{label}: pick: {pick} chooses none of the {len(kept)} sites that are left"
    kinds = ", ".join(sorted({type(m.module).__name__ for m in found}))
    return (
        f"{label}: {len(found)} sites match ({listed([m.path for m in found])}; {kinds}), "
        f"but {' and '.join(filters) or 'the filters'} leave none of them"
    )
