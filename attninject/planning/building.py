"""From a plan to its blocks: made, and not yet put in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from attninject.blocks import registry
from attninject.observe.example_inputs import first_float
from attninject.observe.snapshot import rng_kept
from attninject.surgery.injected_state import base_class, keep_site
from attninject.surgery.location import Location

from .plan import Plan
from .planned_site import Site


def build(plan: Plan, model: nn.Module) -> list[tuple[Location, nn.Module]]:
    """A block for each site (the same one where sites share it), with its location.

    Touches nothing; the generators' states are put back.

    Args:
        plan: of this model.
        model: its first floating parameter says where blocks go whose carrier has none.
    """
    fallback = first_float(model)
    made: dict[str, nn.Module] = {}
    with rng_kept():
        for site, location in zip(plan.sites, plan.locations, strict=True):
            made[site.name] = made[site.shares] if site.shares else _build(site, location, fallback)
            keep_site(made[site.name], replace(site, block=registry.reference(site.block)))
    return [(at, made[site.name]) for site, at in zip(plan.sites, plan.locations, strict=True)]


def _build(site: Site, location: Location, fallback: Tensor) -> nn.Module:
    """The block of a site, on the device and in the dtype and mode of where it goes."""
    given: Any = {"init": site.init, "dims": site.layout.dims, **site.args}
    if site.second is not None:
        given["other_channels"] = site.second.channels
    if location.old is None:
        block = registry.create_block(site.block, site.channels, **given)
    else:
        forward = base_class(location.old).forward
        block = registry.create_replacement(site.block, location.old, site.channels, forward=forward, **given)
    like = first_float(location.old or location.carrier, first_float(location.carrier, fallback))
    device = like.device if location.device.type == "meta" else location.device
    if any(t.device != device or t.dtype != like.dtype for t in (*block.parameters(), *block.buffers())):
        block.to(device=device, dtype=like.dtype)
    return block.train(location.carrier.training)
