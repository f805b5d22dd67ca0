"""Each injected block as a rule that finds its one site again, and such rules resolved on another model.

Plain data, fit for JSON: nothing in it is ever imported, evaluated or fetched. Blocks go by their registered names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from attninject import api, plugins
from attninject.blocks import registry
from attninject.errors import AttnInjectError, DeltaError, RecipeError, UnsupportedModelError
from attninject.planning.plan import Plan
from attninject.planning.planned_site import SecondValue, Site
from attninject.surgery import injected_state


def recorded(model: nn.Module) -> list[dict[str, Any]]:
    """Every injected block: `qualified` name, `mechanism`, `layout` and `rule`; several at a site stay in order.

    One that stands at an earlier site too `shares` the block of that name.

    Raises:
        DeltaError: a block was replaced, or its class has the name of another block.
    """
    sites = injected_state.sites_of(model)
    found = []
    first: dict[int, str] = {}  # id of a block -> its first name
    for name, carrier, insertion in injected_state.insertions(model):
        site = sites[name]
        if site is None:
            raise DeltaError(
                f"{name} was replaced since its injection, so nobody knows how to make it; eject it first"
            )
        found.append(
            {
                "qualified": site.name,
                "mechanism": site.mechanism,
                "layout": str(site.layout),
                "rule": _rule(site, insertion),
            }
        )
        earlier = first.setdefault(id(getattr(carrier, insertion.name)), site.name)
        found[-1] |= {"shares": earlier} if earlier != site.name else {}
    return found


def check_form(sites: Any) -> None:
    """Whether what was read has the form that `recorded` gives.

    Raises:
        ValueError, KeyError, TypeError: it has not.
    """
    if not isinstance(sites, list) or not sites:
        raise ValueError("no sites")
    for site in sites:
        texts = (site["qualified"], site["layout"], site["mechanism"])
        if not all(isinstance(text, str) for text in texts) or not isinstance(site["rule"], dict):
            raise ValueError("a site without a name or a rule")
        if not isinstance(site.get("shares", ""), str):
            raise ValueError("a site that shares what has no name")


def planned(
    model: nn.Module,
    sites: Sequence[Mapping[str, Any]],
    source: object,
    example_inputs: Any,
    made_with: Sequence[str] = (),
) -> Plan:
    """The rules of `recorded` resolved on a model: the same names in the same layouts.

    Args:
        model: without blocks.
        sites: what `recorded` gave.
        source: where it was read, for messages.
        example_inputs: see `plan`.
        made_with: names of the plugins that may have its blocks, for messages.

    Raises:
        DeltaError: a rule finds nothing here, a block is not registered, or a site is another one.
    """
    rules = [site["rule"] for site in sites]
    try:
        plan = api.plan(model, {"name": "delta", "rules": rules}, example_inputs=example_inputs)
    except UnsupportedModelError:
        raise
    except AttnInjectError as error:
        register = isinstance(error, RecipeError) and "unknown block" in str(error)
        raise DeltaError(
            f"{source}: its recipe does not fit this model: {'; '.join(str(error).splitlines())}"
            + ("; register the missing block first (ai.register_block)" if register else "")
            + (plugins.made_with(made_with) if register else "")
        ) from error
    found = {site.name: str(site.layout) for site in plan.sites}
    wanted = {site["qualified"]: site["layout"] for site in sites}
    if found != wanted:
        other = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
        raise DeltaError(
            f"{source}: {other[0]} was {wanted.get(other[0], 'absent')} when it was saved and is "
            f"{found.get(other[0], 'absent')} in this model; give the example_inputs of the injection"
        )
    shares = {site["qualified"]: site.get("shares", "") for site in sites}
    return replace(plan, sites=tuple(_sharing(plan.sites, shares, source)))


def _sharing(sites: Sequence[Site], shares: Mapping[str, str], source: object) -> Iterator[Site]:
    """The sites of a plan, those marked that have the block of an earlier one.

    Raises:
        DeltaError: there is no such block, or it is another one.
    """
    own: dict[str, Site] = {}
    for site in sites:
        name = shares[site.name]
        if not name:
            own[site.name] = site
            yield site
        elif name in own and _form(own[name]) == _form(site):
            yield replace(site, shares=name, parameters=0)
        else:
            raise DeltaError(
                f"{source}: {site.name} shares the block {name}, which is none that would fit it here"
            )


def _form(site: Site) -> tuple[Any, ...]:
    second = site.second.channels if site.second else None
    return site.block, site.args, site.init, site.channels, site.layout.dims, second


def _rule(site: Site, insertion: injected_state.Insertion) -> dict[str, Any]:
    rule: dict[str, Any] = {
        "block": block_name(site),
        site.position: site.path,
        "args": site.args,
        "init": site.init,
        "name": insertion.name,
        "layout": insertion.layout.kind,
    }
    if "::" not in site.path and site.position != "replace":
        rule["call"] = site.call
    if site.input not in (None, 0):
        rule["input"] = site.input
    if site.output is not None:
        rule["output"] = site.output
    if site.second is not None and insertion.second is not None:
        rule["with"] = _second(site.second, insertion.second.layout.kind)
    return rule


def _second(second: SecondValue, layout: str) -> dict[str, Any]:
    given: dict[str, Any] = {second.position: second.path, "layout": layout}
    if "::" not in second.path:
        given["call"] = second.call
    if second.input is not None:
        given["input"] = second.input
    if second.output is not None:
        given["output"] = second.output
    return given


def block_name(site: Site) -> str:
    """The name that a reader will look up; a class that is not registered is stored by its own."""
    if isinstance(site.block, str):
        return site.block
    spec = registry.resolve(site.block)
    if spec.name in registry.list_blocks() and registry.get(spec.name).cls is site.block:
        return spec.name
    name = site.block.__name__
    if name in registry.list_blocks():
        raise DeltaError(
            f"{site.name}: its class {name} is not registered, and {name!r} is another block; register the "
            f"class under a name of its own (ai.register_block) before saving"
        )
    return name
