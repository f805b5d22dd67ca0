"""What the tests know of hard attention and of attention along time."""

from __future__ import annotations

import math
from typing import Any

import torch
from formula_parts import CONV, Weights, batch_norm, conv, gate
from torch import Tensor

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "hard_attention": [{"k": 5, "kernel_size": 3, "temperature": 0.5}],
    "temporal": [{"kernel_size": 5, "norm": False, "bias": True, "divisor": 8, "gate": "tanh"}],
}
STRAIGHT_THROUGH = {"hard_attention"}


def hard_attention(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """x where fewer than k scores are larger; the gradient of k times the softmax."""
    s = conv(x, w, "score").flatten(1)
    n, k = s.shape[1], a.get("k", 0.25)
    k = min(k, n) if k >= 1 else max(1, int(k * n))
    soft = torch.exp(s / a.get("temperature", 1))
    soft = k * soft / soft.sum(1, keepdim=True)
    taken = ((s.unsqueeze(1) > s.unsqueeze(2)).sum(2) < k).to(x.dtype)
    y = x * (taken + soft - soft.detach()).reshape(x.shape[0], 1, *x.shape[2:])
    return x + w["alpha"] * (y - x) if "alpha" in w else y


def temporal(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """TAM's local branch: frame by frame; a map is a clip of one frame."""
    s = x.flatten(2).mean(2, keepdim=True) if x.ndim == 4 else x.reshape(*x.shape[:3], -1).mean(3)
    z = CONV[3](s, w["conv1.weight"], w.get("conv1.bias"), padding=w["conv1.weight"].shape[2] // 2)
    z = (batch_norm(z, w, "norm", train) if a.get("norm", True) else z).clamp(min=0)
    z = gate(CONV[3](z, w["conv2.weight"], w.get("conv2.bias")), a.get("gate", "sigmoid"), identity)
    return x * z.reshape(*z.shape, *[1] * (x.ndim - 3))


def apply_hard(block: Any, x: Tensor, a: dict[str, Tensor]) -> Tensor:
    """x times the mask, blended or not."""
    return x * a["gate"] if block.alpha is None else x + block.alpha * (x * a["gate"] - x)


FORMULAS = {"hard_attention": hard_attention, "temporal": temporal}
APPLY = {"hard_attention": apply_hard, "temporal": lambda block, x, a: x * a["gate"]}
COUNTS = {
    "hard_attention": lambda c, d: c,
    "temporal": lambda c, d: 3 * c * (c // 4) + 2 * (c // 4) + c // 4 * c,
}
MACS = {
    "hard_attention": lambda c, *size: c * math.prod(size),
    "temporal": lambda c, *size: (1 if len(size) == 2 else size[0]) * 4 * c * (c // 4),
}
