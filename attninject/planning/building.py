"""From a plan to its blocks: made, and not yet put in."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import torch
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
    devices = {p.device for p in model.parameters()}
    made: dict[str, nn.Module] = {}
    with rng_kept(), torch.inference_mode(False):  # else they could never be trained
        for site, location in zip(plan.sites, plan.locations, strict=True):
            made[site.name] = made[site.shares] if site.shares else _build(site, location, fallback, devices)
            keep_site(made[site.name], replace(site, block=registry.reference(site.block)))
    return [(at, made[site.name]) for site, at in zip(plan.sites, plan.locations, strict=True)]


def _build(site: Site, location: Location, fallback: Tensor, devices: set[torch.device]) -> nn.Module:
    """The block of a site, on the device and in the dtype and mode of where it goes.

    Of several `devices` that the model is on, the tensor's; it may have moved from the one where it was planned.
    """
    like = location.like(fallback)
    dtype = location.dtype or like.dtype
    device = location.device if location.device in devices else like.device
    given: Any = {"init": site.init, "dims": site.layout.dims, **site.args}
    if site.second is not None:
        given["other_channels"] = site.second.channels
    undrawn = torch.empty(0).is_meta and device.type != "meta"  # there no numbers could be moved from
    with torch.device("cpu") if undrawn else contextlib.nullcontext():
        if location.old is None:
            block = registry.create_block(site.block, site.channels, **given)
        else:
            forward = base_class(location.old).forward
            block = registry.create_replacement(
                site.block, location.old, site.channels, forward=forward, **given
            )
    if any(t.device != device or t.dtype != dtype for t in (*block.parameters(), *block.buffers())):
        block.to(device=device, dtype=dtype)
    return block.train(location.carrier.training)
