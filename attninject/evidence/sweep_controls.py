"""Controls of an arm: the same parameters without attention, and the same attention elsewhere."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from attninject import api
from attninject.blocks.controls import BOTTLENECK, hidden_for
from attninject.errors import PlanError
from attninject.planning.plan import Plan
from attninject.planning.planned_site import Site
from attninject.planning.sites import SiteInfo, sites
from attninject.recipe.frozen import FrozenDict
from attninject.recipe.rules import Recipe

from .ranking import exact_rule

REACH = 1 / 6
"""How far from an arm's site a random one may lie, as a share of all calls of the network."""

TRIES = 50
"""Draws that are looked at until one can be carried out."""


def bottlenecks(plan: Plan) -> Recipe:
    """At each site of a plan a 1×1 residual bottleneck with as nearly the block's parameters as a width can have."""
    rules = []
    for site in plan.sites:
        rule = replace(
            exact_rule(site, plan.recipe.rules[site.rule]), block=BOTTLENECK, init="identity", name=None
        )
        hidden = hidden_for(site.parameters, site.channels)
        rules.append(replace(rule, args=FrozenDict({"hidden": hidden})))
    return Recipe(f"{plan.recipe.name}_bottleneck", tuple(rules))


def random_sites(model: nn.Module, plan: Plan, seed: int, draw: int) -> Recipe:
    """The plan's blocks behind modules drawn at random: same shape, and about the same depth.

    For each site a module without children is drawn whose result has the site's shape and which is called at most
    a sixth of the network's calls before or after it; none twice, and none that the plan itself has.

    Args:
        model: the one that the plan is of.
        plan: of the arm.
        seed: of the draws.
        draw: number of this one.

    Raises:
        PlanError: there are no other sites of that shape and depth, or no draw can be carried out.
    """
    generator = random.Random(f"{seed}/{draw}")
    found = sites(model)
    candidates = [_candidates(site, found, model, plan.sites) for site in plan.sites]
    reason = "none is free of another's"
    for _ in range(TRIES):
        drawn = _drawn(candidates, generator)
        if drawn is None:
            continue
        moved = [_behind(path, site) for path, site in zip(drawn, plan.sites, strict=True)]
        rules = tuple(exact_rule(site, plan.recipe.rules[site.rule]) for site in moved)
        recipe = Recipe(f"{plan.recipe.name}_random_{draw}", rules)
        try:
            api.plan(model, recipe)
        except PlanError as error:
            reason = str(error).partition("\n")[0]
            continue
        return recipe
    raise PlanError(f"no random sites of the shapes and depths of {plan.recipe.name}: {reason}")


def _behind(path: str, site: Site) -> Site:
    """The site's block behind another module."""
    return replace(site, path=path, position="after", call=1, input=None, output=None)


def _candidates(site: Site, every: Sequence[SiteInfo], model: nn.Module, taken: Sequence[Site]) -> list[str]:
    """Modules behind which the block of a site could stand as well."""
    order = {info.path: number for number, info in enumerate(every)}
    here = order.get(site.path.partition("::")[0], 0)
    own = {other.path for other in taken}
    return [
        info.path
        for number, info in enumerate(every)
        if info.shape == site.shape and info.calls == 1 and info.path not in own
        and abs(number - here) <= REACH * len(every) and info.type != "Identity"
        and not list(model.get_submodule(info.path).children())
    ]  # fmt: skip


def _drawn(candidates: Sequence[Sequence[str]], generator: random.Random) -> list[str] | None:
    """One of each list, none twice; None where this draw has left nothing for one of them."""
    drawn: list[str] = []
    for names in candidates:
        free = [name for name in names if name not in drawn]
        if not free:
            return None
        drawn.append(generator.choice(free))
    return drawn
