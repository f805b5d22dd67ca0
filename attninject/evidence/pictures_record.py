"""One run of a model on one image, and what its blocks were given, gave and attended to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from attninject import api
from attninject.attention import in_eval_uncompiled
from attninject.observe.snapshot import Snapshot, undoing
from attninject.planning.support import unwrapped
from attninject.surgery.injected_state import FLAG, sites_of

from .pictures_views import Bars, Heat, Panel, Scene, panels_of, scene_of

SMALL = 1e-9  # a map whose values differ by less, relative to the largest, is one value


@dataclass
class Look:
    """One call of one block on one image.

    Attributes:
        name: qualified name of the block, with the call's number from the second on.
        kind: the block's name in recipes.
        shape: of the block's input.
        panels: what is drawn.
        note: why something is missing, else "".
    """

    name: str
    kind: str
    shape: tuple[int, ...] = ()
    panels: list[Panel] = field(default_factory=list)
    note: str = ""


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[nn.Module]:
    """The model without its wrappers, in eval mode; on the way out everything in it is as it was.

    Modes, attributes, buffers, gradients and the random generators; weights are never written to.
    """
    inner = unwrapped(model)
    kept = [(b, b.detach().clone()) for b in inner.buffers()]
    grads = [(p, p.grad) for p in inner.parameters()]
    snapshot = Snapshot(inner)

    def put_back() -> None:
        snapshot.restore()
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)
        for parameter, grad in grads:
            parameter.grad = grad

    with undoing(put_back), in_eval_uncompiled(inner):
        for parameter, _ in grads:
            parameter.grad = None
        yield inner


def looks_of(inner: nn.Module, x: Tensor, at: tuple[float, float]) -> tuple[list[Look], Any]:
    """A run on x: (1, C, H, W) → a look for every call of a block, in the order of the run, and the output."""
    found: list[Look] = []
    blocks, sites = api.injected(inner), sites_of(inner)
    handles = []
    for name, block in blocks.items():
        watcher = _Watcher(name, getattr(sites[name], "layout", None), at, found)
        handles.append(block.register_forward_pre_hook(watcher.before))
        handles.append(block.register_forward_hook(watcher.after))

    def put_back() -> None:
        for handle in handles:
            handle.remove()

    with undoing(put_back), torch.no_grad():
        output = inner(x)
    ran = {look.name for look in found}
    for name, block in blocks.items():
        if name not in ran:
            why = "is disabled" if block.__dict__.get(FLAG) else "does not run on this image"
            found.append(Look(name, type(block).__name__, note=f"the block {why}"))
    return found, output


class _Watcher:
    """The hooks of one block."""

    def __init__(self, name: str, layout: Any, at: tuple[float, float], found: list[Look]) -> None:
        self.name, self.layout, self.at, self.found = name, layout, at, found
        self.calls = 0
        self.open: list[tuple[Look, Scene, Tensor]] = []

    def before(self, block: nn.Module, args: Any) -> None:
        """What the block attends to, from what it is given."""
        x: Tensor = args[0]
        self.calls += 1
        scene = scene_of(block, x, self.layout, self.at)
        look = Look(
            self.name if self.calls == 1 else f"{self.name}.{self.calls}", scene.block, tuple(x.shape)
        )
        self.found.append(look)
        of = getattr(block, "attention", None)
        attention: dict[str, Tensor] = dict(of(*args)) if callable(of) else {}
        for key, tensor in attention.items():
            look.panels += [_settled(panel) for panel in panels_of(key, tensor, scene)]
        if not look.panels:
            look.note = "this block does not say what it attends to; its maps before and after are shown"
        self.open.append((look, scene, x[0].detach().float().mean(0)))

    def after(self, block: nn.Module, args: Any, y: Any) -> None:
        """The channels' mean before and after the block, on one scale."""
        look, scene, before = self.open.pop()
        if not isinstance(y, Tensor):
            return
        after = y[0].detach().float().mean(0)
        both = torch.cat([before.flatten(), after.flatten()])
        low, high = float(both.min()), float(both.max())
        for name, text, values in (
            ("features.before", "the map before the block, mean over channels", before),
            ("features.after", "the map after the block, on the same scale", after),
        ):
            panel = replace(scene.heat(name, text, values), over=False, low=low, high=high)
            look.panels.append(_settled(panel))


def _settled(panel: Panel) -> Panel:
    """Off the device, out of any graph; a map that is one value but for rounding gets one colour."""
    values = panel.values.detach().float().cpu().clone()
    if isinstance(panel, Bars):
        return replace(panel, values=values)
    low, high = panel.range
    if not high - low > SMALL * max(abs(low), abs(high)):
        low = high
    return replace(panel, values=values, low=low, high=high)


def with_start(looks: list[Look], start: list[Look]) -> list[Look]:
    """The same looks; bars know where each was at the start, maps say it."""
    before = {(look.name, p.name): p for look in start for p in look.panels}
    return [
        replace(look, panels=[_since(panel, before.get((look.name, panel.name))) for panel in look.panels])
        for look in looks
    ]


def _since(panel: Panel, start: Panel | None) -> Panel:
    if isinstance(panel, Bars) and isinstance(start, Bars) and start.values.shape == panel.values.shape:
        return replace(panel, start=start.values)
    if isinstance(panel, Heat) and isinstance(start, Heat):
        return replace(panel, text=f"{panel.text} (before training {spread(start)})")
    return panel


def spread(panel: Panel) -> str:
    """The values in words: `0.43 to 0.61`, or `1 everywhere`."""
    low, high = (f"{float(end):.3g}" for end in (panel.values.min(), panel.values.max()))
    return f"{low} everywhere" if low == high else f"{low} to {high}"
