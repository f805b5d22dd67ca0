"""Pieces of the papers' formulas, written from elementary operations and apart from the library's own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]
CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def flat(w: Tensor) -> Tensor:
    """A 1×1 convolution's weight as a matrix."""
    return w.reshape(w.shape[0], w.shape[1])


def linear(s: Tensor, w: Weights, key: str) -> Tensor:
    """s: (B, C) → W s + b."""
    y = s @ flat(w[key + ".weight"]).T
    return y + w[key + ".bias"] if key + ".bias" in w else y


def batch_norm(x: Tensor, w: Weights, key: str, train: bool) -> Tensor:
    """(x − mean) / √(var + ε) · γ + β, over everything but the channels."""
    axes = [0, *range(2, x.ndim)]
    column = (1, -1, *[1] * (x.ndim - 2))
    if train:
        mean, var = x.mean(axes, keepdim=True), x.var(axes, unbiased=False, keepdim=True)
    else:
        mean, var = w[key + ".running_mean"].view(column), w[key + ".running_var"].view(column)
    return (x - mean) / (var + 1e-5).sqrt() * w[key + ".weight"].view(column) + w[key + ".bias"].view(column)


def conv(x: Tensor, w: Weights, key: str, dilation: int = 1) -> Tensor:
    """Size-keeping convolution."""
    weight = w[key + ".weight"]
    padding = dilation * (weight.shape[-1] // 2)
    return CONV[x.ndim](x, weight, w.get(key + ".bias"), padding=padding, dilation=dilation)


def gate(z: Tensor, kind: str, identity: bool, skip: bool = False) -> Tensor:
    """The published gate or its identity form, from elementary functions."""
    sigmoid = 1 / (1 + torch.exp(-z))
    published = {
        "sigmoid": sigmoid,
        "hard_sigmoid": (z / 6 + 0.5).clamp(0, 1),
        "tanh": 2 / (1 + torch.exp(-2 * z)) - 1,
        "relu": z.clamp(min=0),
    }
    if not identity:
        return published[kind] + skip
    return {**published, "sigmoid": 2 * sigmoid, "hard_sigmoid": (z / 3 + 1).clamp(0, 2),
            "tanh": 1 + published["tanh"], "relu": (1 + z).clamp(min=0)}[kind]  # fmt: skip


def descriptor(x: Tensor, kind: str) -> Tensor:
    """x: (B, C, *S) → (B, C): avg, max, or the mean of both."""
    rows = x.flatten(2)
    avg, top = rows.sum(2) / rows.shape[2], rows.max(2).values
    return {"avg": avg, "max": top, "both": (avg + top) / 2}[kind]


def mlp(s: Tensor, w: Weights, key: str = "") -> Tensor:
    """W₂ relu(W₁ s)."""
    return linear(linear(s, w, key + "fc1").clamp(min=0), w, key + "fc2")


def column(z: Tensor, x: Tensor) -> Tensor:
    """(B, C) → (B, C, 1, …) beside x."""
    return z.reshape(*z.shape, *[1] * (x.ndim - 2))
