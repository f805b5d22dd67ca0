"""What the tests know of the non-local blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from formula_parts import Weights, batch_norm, conv
from torch import Tensor

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "nonlocal": [
        {"sub_sample": True, "norm": False, "scale": True},
        {"reduction": 4, "bias": False},
        {"mode": "gaussian", "scale": True},
        {"mode": "gaussian", "sub_sample": True, "norm": False, "reduction": 0.5},
        {"mode": "dot_product"},
        {"mode": "dot_product", "sub_sample": True, "norm": False, "scale": True},
        {"mode": "concatenation"},
        {"mode": "concatenation", "sub_sample": True, "norm": False, "scale": True, "bias": False},
    ],
}
PAPER_IS_IDENTITY = {"nonlocal"}
NO_LOGITS = {
    "nonlocal-mode=dot_product",
    "nonlocal-mode=dot_product-sub_sample=True-norm=False-scale=True",
    "nonlocal-mode=concatenation",
    "nonlocal-mode=concatenation-sub_sample=True-norm=False-scale=True-bias=False",
}


def dead_nonlocal(args: dict[str, Any]) -> set[str]:
    """The tensors whose gradient is zero by mathematics.

    - under a softmax the keys' bias: it adds the same to every logit of a row;
    - under a softmax, with a norm behind W, the values' bias: rows sum to 1, so it shifts whole channels;
    - W's own bias in front of the norm.
    """
    norm, mode = args.get("norm", True), args.get("mode", "embedded_gaussian")
    softmax = mode in ("embedded_gaussian", "gaussian")
    dead = {"out.bias"} if norm else set()
    return dead | ({"phi.bias"} if softmax else set()) | ({"g.bias"} if softmax and norm else set())


DEAD = {"nonlocal": dead_nonlocal}


def max_pooled(t: Tensor) -> Tensor:
    """Max over cells of 2 positions a side (3D: 1×2×2)."""
    pool = {
        3: lambda: F.max_pool1d(t, 2),
        4: lambda: F.max_pool2d(t, 2),
        5: lambda: F.max_pool3d(t, (1, 2, 2)),
    }
    return pool[t.ndim]()


def nonlocal_(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """Non-local, eq. 1-6, with the N×M matrix written out."""
    mode = a.get("mode", "embedded_gaussian")
    theta, phi = (x, x) if mode == "gaussian" else (conv(x, w, "theta"), conv(x, w, "phi"))
    g = conv(x, w, "g")
    if a.get("sub_sample"):
        phi, g = max_pooled(phi), max_pooled(g)
    theta, phi, g = (t.flatten(2) for t in (theta, phi, g))
    d = theta.shape[1]
    if mode == "concatenation":
        pairs = [theta.unsqueeze(3).expand(-1, -1, -1, phi.shape[2]),
                 phi.unsqueeze(2).expand(-1, -1, theta.shape[2], -1)]  # fmt: skip
        f = torch.einsum("c,bcij->bij", w["concat.weight"][0], torch.cat(pairs, 1)).clamp(min=0)
    else:
        f = torch.einsum("bdi,bdj->bij", theta, phi)
    if a.get("scale"):
        f = f / d**0.5
    if mode in ("embedded_gaussian", "gaussian"):
        f = torch.exp(f - f.max(2, keepdim=True).values)
        f = f / f.sum(2, keepdim=True)
    else:
        f = f / phi.shape[2]
    y = conv(torch.einsum("bij,bdj->bdi", f, g).reshape(x.shape[0], -1, *x.shape[2:]), w, "out")
    return x + (batch_norm(y, w, "norm", train) if a.get("norm", True) else y)


def apply_nonlocal(block: Any, x: Tensor, a: Mapping[str, Tensor]) -> Tensor:
    """The non-local block from its rows."""
    _, _, g = block.embed(x)
    y = block.out((a["rows"] @ g).transpose(1, 2).reshape(x.shape[0], -1, *x.shape[2:]))
    return x + (y if block.norm is None else block.norm(y))


FORMULAS = {"nonlocal": nonlocal_}
APPLY = {"nonlocal": apply_nonlocal}

COUNTS = {
    "nonlocal": lambda c, d: 3 * (c * (c // 2) + c // 2) + (c // 2 * c + c) + 2 * c,
}
MACS = {
    "nonlocal": lambda c, *size: math.prod(size) * 4 * c * (c // 2) + 2 * math.prod(size) ** 2 * (c // 2),
}
