"""Parameter groups: injected blocks, head and backbone, each with and without weight decay.

No decay for whatever acts as a factor or an offset: biases, norms, gates, layer scales. They are told by
shape (at most one extent above 1: (C,), (1, C, 1, 1), (1,)), by the model's own `no_weight_decay()`, and in a
block by not being the weight of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from attninject import api
from attninject.planning import support

from .heads import head_of

LAYERS = (nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.modules.conv._ConvNd, nn.modules.rnn.RNNBase)


def param_groups(
    model: nn.Module,
    lr: float = 1e-4,
    attn_lr: float | None = None,
    head_lr: float | None = None,
    weight_decay: float = 0.05,
    layer_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Groups for any torch or timm optimizer: blocks, head, backbone; parameters that learn only.

    Args:
        model: injected or not, wrapped or not.
        lr: of the backbone.
        attn_lr: of the injected blocks; None: `lr`.
        head_lr: of the head; None: `lr`.
        weight_decay: of weight matrices and kernels; biases, norms and gates have none.
        layer_decay: timm's: the backbone's k-th layer from the end learns at lr · layer_decay^k. The factor
            is multiplied into the group's `lr`, so that torch's own schedulers keep it. Blocks and head are
            new, they learn at their full rate.

    Returns:
        Dicts with `params`, `lr`, `weight_decay` and `name`; every learning parameter is in exactly one.

    Raises:
        NoHeadError: name the head with `freeze(model, what, head=…)` before.
    """
    model = support.unwrapped(model)
    kinds, still = _kinds(model), _undecayed(model)
    scales = {} if layer_decay is None else _layer_scales(model, layer_decay, kinds)
    members: dict[tuple[str, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = bool(weight_decay) and name not in still
            members.setdefault((kinds[name], scales.get(name, 1.0), decayed), []).append(parameter)
    rates = {
        "backbone": lr,
        "blocks": lr if attn_lr is None else attn_lr,
        "head": lr if head_lr is None else head_lr,
    }
    order = list(rates)
    return [
        {
            "params": members[key],
            "lr": rates[kind] * scale,
            "weight_decay": weight_decay if decayed else 0.0,
            "name": kind + (f" ×{scale:.3g}" if scale != 1 else "") + ("" if decayed else ", no decay"),
        }
        for key in sorted(members, key=lambda key: order.index(key[0]))
        for kind, scale, decayed in [key]
    ]


def extend_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, **rates: Any) -> list[str]:
    """Add the parameters of `model` that learn and that the optimizer does not have yet.

    For blocks injected, or layers unfrozen, after the optimizer was made. `rates` are the arguments of
    `param_groups`. Returns the names of the groups added. A scheduler that keeps its own list of groups
    (torch's LRScheduler) must be made after this.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    added = []
    for group in param_groups(model, **rates):
        group["params"] = [p for p in group["params"] if id(p) not in held]
        if group["params"]:
            optimizer.add_param_group(group)
            added.append(group["name"])
    return added


def _kinds(model: nn.Module) -> dict[str, str]:
    """Parameter name → blocks, head or backbone."""
    blocks = [f"{n}." for n in api.injected(model)]
    names = [n for n, _ in model.named_parameters()]
    head = [f"{n}." for n in head_of(model)]
    return {
        n: "blocks" if n.startswith(tuple(blocks)) else "head" if n.startswith(tuple(head)) else "backbone"
        for n in names
    }


def _undecayed(model: nn.Module) -> set[str]:
    said: Any = getattr(model, "no_weight_decay", None)
    listed = set(said()) if callable(said) else set()
    blocks = [f"{n}." for n in api.injected(model)]
    layers = {id(p) for m in model.modules() if isinstance(m, LAYERS) for p in m.parameters()}
    found = set()
    for name, p in model.named_parameters():
        factor = sum(extent > 1 for extent in p.shape) <= 1
        own = name.startswith(tuple(blocks)) and id(p) not in layers
        if factor or own or name in listed or name.endswith(".bias"):
            found.add(name)
    return found


class _Base:
    """What timm's layer decay asks of a model, without the blocks, which would make layers of their own."""

    def __init__(self, model: nn.Module, kinds: dict[str, str]) -> None:
        self._model, self._kinds = model, kinds
        head = {n.rpartition(".")[0] for n, kind in kinds.items() if kind == "head"}
        self.pretrained_cfg = {"classifier": tuple(head) or ("\0",)}  # empty would mean: everything
        if hasattr(model, "group_matcher"):
            self.group_matcher = model.group_matcher

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Those of backbone and head, learning or not, in order."""
        return ((n, p) for n, p in self._model.named_parameters() if self._kinds[n] != "blocks")


def _layer_scales(model: nn.Module, layer_decay: float, kinds: dict[str, str]) -> dict[str, float]:
    """Name → factor of the backbone's learning parameters by timm's layers, of which the head is the last."""
    from timm.optim import param_groups_layer_decay

    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay: expected a factor above 0, at most 1, found {layer_decay!r}")
    base: Any = _Base(model, kinds)
    groups = param_groups_layer_decay(base, weight_decay=0.0, layer_decay=layer_decay)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    return {
        n: scales[id(p)] for n, p in base.named_parameters() if kinds[n] == "backbone" and id(p) in scales
    }
