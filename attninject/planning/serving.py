"""One block for several sites: which sites of a rule share theirs (`share`)."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

from torch import Tensor

from attninject.anatomy.dataflow import Spot
from attninject.observe.example_inputs import first_float
from attninject.recipe.rules import Rule
from attninject.surgery.location import Location

from .planned_site import Site
from .scene import Scene


def joined(
    rule: Rule, scene: Scene, rows: list[tuple[Site, Location]], spots: list[Spot]
) -> list[tuple[Site, Location]]:
    """The rows of a rule, those that share a block with an earlier one marked, which costs no parameters again.

    Sites share a block within an owner, a stage or the model if it would be built alike for them: of one width, in
    one number of dimensions, with second values of one width, on one device.
    """
    if rule.share is None:
        return rows
    fallback = first_float(scene.model)
    first: dict[Hashable, str] = {}
    found = []
    for (site, location), spot in zip(rows, spots, strict=True):
        key = (_group(rule, scene, spot), *_form(site, location, fallback))
        name = first.setdefault(key, site.name)
        found.append((site if name == site.name else replace(site, shares=name, parameters=0), location))
    return found


def _group(rule: Rule, scene: Scene, spot: Spot) -> int:
    if rule.share == "owner":
        return id(spot.owner.module) if spot.owner else 0
    return scene.places.stage_of(spot.time) if rule.share == "stage" else 0


def _form(site: Site, location: Location, fallback: Tensor) -> tuple[Hashable, ...]:
    """What two sites of a rule have in common if one block can serve both."""
    like = location.like(fallback)
    dtype = str(location.dtype or like.dtype)
    second = site.second.channels if site.second else 0
    return site.channels, site.layout.dims, second, str(like.device), dtype, id(location.source)
