"""Which layout a block sees at a site: the measured one or the rule's own, if the block's mathematics allows it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from attninject.anatomy.dataflow import Spot
from attninject.blocks import registry
from attninject.errors import LayoutError
from attninject.layout import RANK, VECTOR, Layout
from attninject.observe.record import Call
from attninject.recipe.rules import Rule

from .scene import Scene


def layout_for(rule: Rule, scene: Scene, spot: Spot, label: str) -> Layout:
    """The layout that the rule's block sees at a spot.

    Raises:
        LayoutError: none can be told, or the block does not work on it; the message says what to do.
    """
    name, shape = scene.name(spot), scene.record.shape(spot.value)
    layout = scene.layout(spot)
    if rule.layout:
        layout = _overridden(layout, rule.layout, shape, f"{label}: layout {rule.layout}", name)
    else:
        _refuse_sequence_first(spot, f"{label}: {name}")
    if layout is None:
        raise LayoutError(f"{label}: the axes of {name}, {tuple(shape)}, {_unknown(scene, spot)}")
    spec = registry.resolve(rule.block)
    if spec.spatial and not layout.is_map:
        held = f"{shape[1]} tokens" if layout.kind == "NLC" else f"{layout.kind} {tuple(shape)}"
        lie = "that form no grid" if layout.ordered else "in windows or an order of the network's own"
        raise LayoutError(
            f"{label}: {name} holds {held} {lie}, and {spec.name} works on positions; take a block that works "
            "on tokens too, see `attninject list blocks`"
        )
    if layout.dims in spec.dims:
        return layout
    if layout.kind in ("NLC", "NCL") and 1 in spec.dims and not spec.spatial:
        return Layout(layout.kind, layout.prefix)  # positions in any order will do
    raise LayoutError(
        f"{label}: {spec.name} works on {' or '.join(f'{d}D' for d in spec.dims)} maps; "
        f"{name} is {layout} {tuple(shape)}"
    )


def layout_of_second(rule: Rule, scene: Scene, spot: Spot, here: Layout, label: str) -> Layout:
    """The layout in which the rule's block is given its second value.

    Args:
        rule: names the block.
        scene: the model.
        spot: of the second value.
        here: the layout that the block sees at its site.
        label: how messages call the rule.

    Raises:
        LayoutError: none can be told, or the block does not work on it beside its site; the message says what to do.
    """
    assert rule.with_ is not None
    name, shape = f"the second value, {scene.name(spot)}", scene.record.shape(spot.value)
    layout = scene.layout(spot)
    if rule.with_.layout:
        kind = rule.with_.layout
        layout = _overridden(layout, kind, shape, f"{label}: layout {kind}", name)
    elif len(shape) == 2:
        layout = Layout(VECTOR)
    if layout is None:
        raise LayoutError(f"{label}: the axes of {name}, {tuple(shape)}, {_unknown(scene, spot)}")
    spec = registry.resolve(rule.block)
    if spec.spatial and (not layout.is_map or layout.dims != here.dims):
        raise LayoutError(
            f"{label}: {name} is {layout} {tuple(shape)}, and {spec.name} wants a {here.dims}D map there as at its site"
        )
    return layout if spec.spatial or layout.kind not in ("NLC", "NCL") else Layout(layout.kind, layout.prefix)


def _refuse_sequence_first(spot: Spot, where: str) -> None:
    """Refuse what torch's attention works on with positions before the batch, which a block would mix.

    Raises:
        LayoutError: it is that; the message says what to build otherwise.
    """
    around: Any = spot.event if isinstance(spot.event, Call) else spot.owner
    while around is not None:
        whole = isinstance(around.module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer))
        attention = around.module.self_attn if whole else around.module
        if isinstance(attention, nn.MultiheadAttention) and not attention.batch_first:
            raise LayoutError(
                f"{where} has its positions before the batch, as {type(around.module).__name__} there wants them, and "
                "blocks want the batch first; build that with batch_first=True, or name a site outside"
            )
        around = around.parent


def _overridden(measured: Layout | None, kind: str, shape: tuple[int, ...], asked: str, name: str) -> Layout:
    """The layout that a rule asks for; the measured one where it is of this kind and says more."""
    if (rank := RANK.get(kind, len(VECTOR))) != len(shape):
        raise LayoutError(f"{asked} has {rank} axes; {name} has {shape}")
    return measured if measured and measured.kind == kind and measured.ordered else Layout(kind)


def _unknown(scene: Scene, spot: Spot) -> str:
    """Why the axes of a spot could not be told, and what to do."""
    found = scene.positions.find(spot.value)
    why = found.why if found and found.why else "do not say which are batch, channels and positions"
    known = len(scene.record.shape(spot.value)) in RANK.values()
    fix = "say it with layout:" if known else "blocks need 3 to 5 axes, so name a site before"
    return f"{why}; {fix}"


def packers(model: nn.Module) -> dict[int, nn.Module]:
    """The encoders of torch's that may hand nested tensors to their layers, by the id of each module in these."""
    encoders = [m for m in model.modules() if isinstance(m, nn.TransformerEncoder) and m.use_nested_tensor]
    if not torch.backends.mha.get_fastpath_enabled():
        return {}
    return {id(m): encoder for encoder in encoders for layer in encoder.layers for m in layer.modules()}
