"""What can be targeted: every call of every module, with its shape and layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from attninject.anatomy.dataflow import Spot
from attninject.errors import NoMatchError
from attninject.layout import Layout
from attninject.notebook import html_table
from attninject.observe.probe import probe
from attninject.recipe.patterns import compile_pattern
from attninject.recipe.targets import as_ending
from attninject.surgery import injected_state
from attninject.wording import aligned, nearest_hint

from . import support
from .scene import Scene


@dataclass(frozen=True)
class SiteInfo:
    """What can be targeted: one call of one module.

    `shape` and `layout` are those of its result; None where that is no single tensor of a known layout.
    """

    path: str
    call: int
    calls: int
    type: str
    shape: tuple[int, ...] | None
    layout: Layout | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        layout = None if self.layout is None else str(self.layout)
        return {**self.__dict__, "shape": self.shape and list(self.shape), "layout": layout}


class SiteList(tuple[SiteInfo, ...]):
    """A tuple of `SiteInfo` that prints as a table."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n".join(aligned([HEADER, *map(_row, self)]))

    def _repr_html_(self) -> str:
        return html_table(HEADER, map(_row, self))


HEADER = ("path", "call", "type", "shape", "layout")


def _row(site: SiteInfo) -> tuple[str, ...]:
    """The cells of a call, under `HEADER`."""
    shape = "×".join(map(str, site.shape)) if site.shape else "no tensor"
    call = str(site.call) if site.calls == 1 else f"{site.call} of {site.calls}"
    return (site.path or "(the model)", call, site.type, shape, str(site.layout or ""))


def sites(model: nn.Module, pattern: str = "**", *, root: str = "", example_inputs: Any = None) -> SiteList:
    """Every call that a pattern can target, in call order: path, call, shape, layout. Touches nothing.

    Raises:
        NoMatchError: the pattern matches no module; the nearest names are given.
    """
    support.refuse_unsupported(model)
    support.check_root(model, root)
    wanted = compile_pattern(pattern)
    with injected_state.as_original(model):
        record, _ = probe(model, example_inputs, partial=True)
    scene = Scene(model, record, root, lambda how: None)
    names = {id(m): n for n, m in reversed(scene.names.items()) if wanted.matches(n)}
    if not names:
        there = [n for n in scene.names if n]
        near = as_ending(pattern, there) or nearest_hint(pattern, there)
        raise NoMatchError(f"no module matches {pattern!r}{near}")
    found = []
    for call in record.calls:
        if id(call.module) in names:
            calls = call.parent.runs[id(call.module)] if call.parent else 1
            value = call.outs[0] if len(call.outs) == 1 else None
            shape = None if value is None else record.shape(value)
            layout = None if value is None else scene.layout(Spot(call, "after", value))
            kind = injected_state.base_class(call.module).__name__
            found.append(SiteInfo(scene.path(call.module), call.number, calls, kind, shape, layout))
    return SiteList(found)
