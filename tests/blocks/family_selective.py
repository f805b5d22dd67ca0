"""What the tests know of the blocks that choose: among kernels, scales, positions."""

from __future__ import annotations

import math
from typing import Any

import torch
from formula_parts import CONV, Weights, batch_norm, conv, descriptor, flat, gate
from torch import Tensor

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "sk": [
        {"branches": [[1, 1], [3, 1], [5, 2]], "groups": 1, "reduction": 2, "min_width": 4},
        {"groups": 4, "reduction": 0.5, "divisor": 8},
    ],
    "multiscale_spatial": [
        {"branches": [[3, 1], [3, 2]], "fuse": "conv", "norm": False, "bias": True},
        {"branches": [[1, 1], [3, 1], [3, 3]], "fuse": "mean", "gate": "tanh"},
    ],
    "dynamic_capacity": [
        {"k": 5, "reduction": 4, "kernel_size": 1, "gate": "tanh"},
        {"k": 1000, "reduction": 2, "fine_reduction": 1, "bias": False},
    ],
}


def residual(x: Tensor, y: Tensor, w: Weights) -> Tensor:
    """x + α(y − x) where the block blends, else y."""
    return x + w["alpha"] * (y - x) if "alpha" in w else y


def grouped(x: Tensor, w: Weights, key: str, dilation: int) -> Tensor:
    """Size-keeping convolution; the weight's shape says how many groups there are."""
    weight = w[key + ".weight"]
    padding = dilation * (weight.shape[-1] // 2)
    groups = x.shape[1] // weight.shape[1]
    return CONV[x.ndim](x, weight, padding=padding, dilation=dilation, groups=groups)


def sk(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """SKNet, eq. 1-6."""
    ones = [1] * (x.ndim - 2)
    u = []
    for i, (_, dilation) in enumerate(a.get("branches", [[3, 1], [3, 2]])):
        y = grouped(x, w, f"paths.{i}.conv", dilation)
        u.append(batch_norm(y, w, f"paths.{i}.norm", train).clamp(min=0))
    s = descriptor(sum(u), "avg") @ flat(w["fc_reduce.weight"]).T
    z = batch_norm(s, w, "norm", train).clamp(min=0)
    logits = (z @ flat(w["fc_select.weight"]).T).split(x.shape[1], 1)  # one chunk of C per branch
    e = [torch.exp(t) for t in logits]
    y = sum((t / sum(e)).reshape(*t.shape, *ones) * ui for t, ui in zip(e, u, strict=True))
    return residual(x, y, w)


def multiscale_spatial(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """CBAM's eq. 3 at several scales, fused as in DeepLab."""
    pooled = torch.cat([x.max(1, keepdim=True).values, x.sum(1, keepdim=True) / x.shape[1]], 1)
    z = []
    for i, (_, dilation) in enumerate(a.get("branches", [[3, 1], [5, 1], [7, 1], [3, 4]])):
        t = conv(pooled, w, f"scales.{i}.conv", dilation)
        z.append(batch_norm(t, w, f"scales.{i}.norm", train) if a.get("norm", True) else t)
    kind = a.get("gate", "sigmoid")
    if a.get("fuse") == "mean":
        return x * sum(gate(t, kind, identity) for t in z) / len(z)
    if a.get("fuse") == "conv":
        weights = w["fuse.weight"].flatten()
        return x * gate(sum(c * t for c, t in zip(weights, z, strict=True)) + w["fuse.bias"], kind, identity)
    return x * gate(sum(z), kind, identity)


def dynamic_capacity(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """Both paths everywhere, the fine one as a convolution; then the salient positions take it."""
    n, k = math.prod(x.shape[2:]), a.get("k", 0.25)
    k = min(k, n) if k >= 1 else max(1, int(k * n))
    c = conv(x, w, "coarse1")
    coarse, s = conv(c.clamp(min=0), w, "coarse2"), conv(c, w, "score")
    edge = a.get("kernel_size", 3)
    first = w["fine1.weight"].reshape(-1, x.shape[1], *[edge] * (x.ndim - 2))
    hidden = CONV[x.ndim](x, first, w.get("fine1.bias"), padding=edge // 2).clamp(min=0)
    second = w["fine2.weight"].reshape(x.shape[1], -1, *[1] * (x.ndim - 2))
    fine = CONV[x.ndim](hidden, second, w.get("fine2.bias"))
    least = s.flatten(1).sort(1, descending=True).values[:, k - 1].reshape(-1, *[1] * (x.ndim - 1))
    share = 1 / (1 + torch.exp(-s))
    z = torch.where(s >= least, (1 - share) * coarse + share * fine, coarse)
    return x * gate(z, a.get("gate", "sigmoid"), identity)


def apply_sk(block: Any, x: Tensor, a: dict[str, Tensor]) -> Tensor:
    """The branches' features, weighed."""
    u = torch.stack([path(x) for path in block.paths], 1)
    y = (u * a["branches"]).sum(1)
    return y if block.alpha is None else x + block.alpha * (y - x)


FORMULAS = {"sk": sk, "multiscale_spatial": multiscale_spatial, "dynamic_capacity": dynamic_capacity}
APPLY = {
    "sk": apply_sk,
    "multiscale_spatial": lambda block, x, a: x * a["gate"],
    "dynamic_capacity": lambda block, x, a: x * a["gate"],
}

COUNTS = {
    "sk": lambda c, d: 2 * (3**d * c * (c // 32) + 2 * c) + (c * 32 + 2 * 32) + 2 * c * 32,
    "multiscale_spatial": lambda c, d: 2 * (3**d + 5**d + 7**d + 3**d) + 4 * 2,
    "dynamic_capacity": lambda c, d: (
        (2 * c * (c // 16) + c // 16 + c) + (c // 16 + 1) + (3**d + 1) * c * (c // 4) + c // 4 + c
    ),
}
MACS = {
    "sk": lambda c, *size: 2 * 3 ** len(size) * c * (c // 32) * math.prod(size) + 3 * c * 32,
    "multiscale_spatial": lambda c, *size: 2 * sum(k ** len(size) for k in (3, 5, 7, 3)) * math.prod(size),
    # the fine path at a quarter of the positions only
    "dynamic_capacity": lambda c, *size: (
        math.prod(size) * (2 * c + 1) * (c // 16) + math.prod(size) // 4 * (3 ** len(size) + 1) * c * (c // 4)
    ),
}
