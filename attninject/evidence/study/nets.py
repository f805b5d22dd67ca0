"""The nets: a frozen backbone as a chain of units, with a slot for a block behind each.

A frozen unit whose input does not change need not be run again. So a net is cut into an entry, units and an exit, and
what enters each unit is kept for all images: a training that has its first block behind unit k begins at unit k.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from attninject import api, models
from attninject.evidence import source_net
from attninject.evidence.methods import PAPERS_PLACES
from attninject.planning.plan import Plan
from attninject.recipe.rules import Recipe

from .design import SIZE

NAMES = {
    "lite0": ("timm/tf_efficientnet_lite0", "package"),
    "lite1": ("timm/tf_efficientnet_lite1", "package"),
    "lite0_random": ("timm/tf_efficientnet_lite0", "none"),
}
"""Net → model and weights."""


def bare(net: str, vit: Path | None = None) -> nn.Module:
    """The backbone in eval mode, nothing of it learning, with a head of ten classes that is never used."""
    if net == "vit" and vit is None:
        raise ValueError(
            "the ViT's weights are needed: --vit FILE, which attninject.evidence.source_net writes"
        )
    torch.manual_seed(0)
    if net == "vit":
        model = source_net.build(weights=vit)
    else:
        name, weights = NAMES[net]
        model = models.build(name, weights=weights, num_classes=10)
    return model.eval().requires_grad_(False)


def normalisation(model: Any) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation that the net was trained with."""
    return model.pretrained_cfg["mean"], model.pretrained_cfg["std"]


def calibrate(model: nn.Module, images: Tensor) -> None:
    """Batch norms take their statistics from these images: what a net with random weights lacks."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over batches
        norm.train()
    with torch.no_grad():
        for batch in images.split(64):
            model(batch)
    model.eval()


def fold_norms(model: nn.Module) -> nn.Module:
    """The same function with batch norms in eval mode folded into the convolutions before them, up to rounding."""
    for module in list(model.modules()):
        children = list(module.named_children())
        for (_, conv), (name, norm) in itertools.pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, timm.layers.BatchNormAct2d):
                assert norm.running_mean is not None
                assert norm.running_var is not None
                conv.weight, bias = fuse_conv_bn_weights(
                    conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
                )  # fmt: skip
                conv.bias = bias
                setattr(module, name, norm.act)
    return model.requires_grad_(False)


class Slot(nn.Module):
    """Where a block stands: the images of several runs come one run after the other, and each has its own block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[nn.Module | None] = []
        self.watching = False
        self.moved: list[list[Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        """x: (runs · B, …) → the same shape, changed by the block of each run that has one here."""
        if not any(block is not None for block in self.blocks):
            return x
        parts = x.chunk(len(self.blocks))
        out = [p if block is None else block(p) for p, block in zip(parts, self.blocks, strict=True)]
        if self.watching:
            for seen, before, after in zip(self.moved, parts, out, strict=True):
                seen.append(
                    ((after - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)).detach()
                )
        return torch.cat(out)

    def watch(self, on: bool) -> None:
        """Begin or end to note, per run and image, how far the block changes what passes, relative to its norm."""
        self.watching = on
        self.moved = [[] for _ in self.blocks] if on else self.moved


class Chain:
    """A net with slots.

    Attributes:
        model: bare, as `rank_sites` takes it.
        plan: of all candidate sites.
        units: in order; blocks of the net, of which some have slots in them.
        slots: one per site.
        unit_of: per site, the number of the unit that its slot is in.
    """

    def __init__(self, model: nn.Module, recipe: Recipe | None = None, **rule: Any) -> None:
        """Candidates by a recipe, or by the fields of one rule."""
        self.model = model
        example = torch.zeros(2, 3, SIZE, SIZE)
        self.plan: Plan = api.plan(model, recipe, example_inputs=example, **rule)
        self.net: Any = self._injected()
        names = [site.name for site in self.plan.sites]
        self.slots = [Slot() for _ in names]
        for name, slot in zip(names, self.slots, strict=True):
            self.net.set_submodule(name, slot)
        names = [n for n, m in self.net.named_modules() if n.startswith("blocks.") and _is_unit(n, self.net)]
        self.units = [self.net.get_submodule(n) for n in names]
        self.unit_of = [_within(site.path, names) for site in self.plan.sites]

    def _injected(self) -> nn.Module:
        example = torch.zeros(2, 3, SIZE, SIZE)
        return api.inject(copy.deepcopy(self.model), self.plan.recipe, example_inputs=example)

    def blocks(self, seed: int) -> list[nn.Module]:
        """Fresh blocks for all sites, drawn from a seed."""
        torch.manual_seed(seed)
        made = api.injected(self._injected())
        return [made[site.name].requires_grad_(True) for site in self.plan.sites]

    def usual(self) -> tuple[int, ...]:
        """Sites whose unit the block's paper would put one in: at token models all, else those with a residual sum."""
        block = self.plan.sites[0].block
        if not isinstance(block, str) or block not in PAPERS_PLACES or hasattr(self.net, "patch_embed"):
            return tuple(range(len(self.slots)))
        example = torch.zeros(2, 3, SIZE, SIZE)
        there = api.plan(self.model, block=block, place=PAPERS_PLACES[block], example_inputs=example)
        inside = tuple(s.path for s in there.sites)
        return tuple(
            i
            for i, s in enumerate(self.plan.sites)
            if any(p.partition("::")[0] == s.path or p.startswith(f"{s.path}.") for p in inside)
        )

    def enter(self, images: Tensor) -> Tensor:
        """What the first unit is given."""
        net = self.net
        if hasattr(net, "patch_embed"):
            out: Tensor = net.norm_pre(net.patch_drop(net._pos_embed(net.patch_embed(images))))
            return out
        return _laid(net.bn1(net.conv_stem(_laid(images))))

    def leave(self, x: Tensor) -> Tensor:
        """The head's features (n, d) from what the last unit gives."""
        net = self.net
        x = net.norm(x) if hasattr(net, "patch_embed") else net.bn2(net.conv_head(x))
        out: Tensor = net.forward_head(x, pre_logits=True)
        return out

    def features(self, x: Tensor, start: int) -> Tensor:
        """Features from what unit `start` is given; with `start` the number of units, from what the last one gives."""
        x = _laid(x)
        for unit in self.units[start:]:
            x = unit(x)
        return self.leave(x)

    def inputs(self, images: Tensor) -> list[Tensor]:
        """What each unit is given, and what the last one gives, all slots empty."""
        for slot in self.slots:
            slot.blocks = []
        parts: list[list[Tensor]] = [[] for _ in range(len(self.units) + 1)]
        with torch.no_grad():
            for batch in images.split(64):
                x = self.enter(batch)
                for seen, unit in zip(parts, self.units, strict=False):
                    seen.append(x)
                    x = unit(x)
                parts[-1].append(x)
        return [torch.cat(p) for p in parts]


def _is_unit(name: str, net: Any) -> bool:
    """`blocks.2.1` where stages hold units, `blocks.2` where they stand in a row."""
    return name.count(".") == (1 if hasattr(net, "patch_embed") else 2)


def _within(path: str, units: Sequence[str]) -> int:
    """The number of the unit that a path lies in."""
    return next(i for i, name in enumerate(units) if f"{path}.".replace("::", ".").startswith(f"{name}."))


def _laid(x: Tensor) -> Tensor:
    """Maps with channels last in memory, which is faster on a CPU; tokens as they are."""
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
