"""Reference formulas, in float64, of coordinate, strip, triplet and EMA attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from formula_parts import CONV, Weights, batch_norm, conv, flat, gate
from torch import Tensor

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "coord": [
        {"reduction": 4, "min_width": 1, "gate": "hard_sigmoid"},
        {"reduction": 2, "bias": False, "gate": "tanh"},
    ],
    "strip": [{"kernel_size": 5}, {"norm": False, "gate": "tanh"}],
    "triplet": [{"kernel_size": 3, "gate": "hard_sigmoid"}, {"spatial": False}],
    "ema_attn": [{"groups": 4}, {"groups": 3, "gate": "tanh"}],
}
# a bias in front of a batch norm is subtracted again
DEAD = {"coord": lambda args: {"conv1.bias"} if args.get("bias", True) else set()}
JOINT_NORM = {"coord", "triplet"}  # the norm sees all strips, or a plane in which one axis is the channels


def strip(x: Tensor, axis: int) -> Tensor:
    """(B, C, *S) → (B, C, L): the mean over every spatial axis but one."""
    rows = x.movedim(axis, 2).flatten(3) if x.ndim > 3 else x.unsqueeze(3)
    return rows.sum(3) / rows.shape[3]


def spread(s: Tensor, x: Tensor, axis: int) -> Tensor:
    """(B, C, L) → (B, C, *S) along an axis."""
    return s.reshape(*s.shape[:2], *[-1 if i == axis else 1 for i in range(2, x.ndim)])


def matrix(s: Tensor, w: Weights, key: str) -> Tensor:
    """A 1×1 convolution of a sequence, as a matrix product."""
    y = torch.einsum("oc,bcl->bol", flat(w[key + ".weight"]), s)
    return y + w[key + ".bias"].view(1, -1, 1) if key + ".bias" in w else y


def coord(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """Coordinate attention, eq. 4-9."""
    axes = range(2, x.ndim)
    f = matrix(torch.cat([strip(x, axis) for axis in axes], 2), w, "conv1")
    r = a.get("reduction", 32)
    assert f.shape[1] == max(a.get("min_width", 8), int(x.shape[1] * r if r < 1 else x.shape[1] / r))
    f = batch_norm(f, w, "norm", train)
    f = f * (f + 3).clamp(0, 6) / 6
    y, start = x, 0
    for i, axis in enumerate(axes):
        part = f[:, :, start : start + x.shape[axis]]
        y = y * spread(gate(matrix(part, w, f"excite.{i}"), a.get("gate", "sigmoid"), identity), x, axis)
        start += x.shape[axis]
    return y


def strip_pooling(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """Strip pooling, eq. 2-5, with the released code's norms and relu unless `norm` is false."""
    y, k = torch.zeros_like(x), a.get("kernel_size", 3)
    for i, axis in enumerate(range(2, x.ndim)):
        weight = w[f"convs.{i}.weight"].flatten(2)
        s = CONV[3](strip(x, axis), weight, w.get(f"convs.{i}.bias"), padding=k // 2)
        y = y + spread(batch_norm(s, w, f"norms.{i}", train) if a.get("norm", True) else s, x, axis)
    y = y.clamp(min=0) if a.get("norm", True) else y
    return x * gate(conv(y, w, "fuse"), a.get("gate", "sigmoid"), identity)


def triplet(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """Triplet attention, section 3.2: the mean of the maps that each branch scales."""
    scaled = []
    for i, axis in enumerate([*range(2, x.ndim), *([1] if a.get("spatial", True) else [])]):
        pooled = torch.stack([x.max(axis).values, x.sum(axis) / x.shape[axis]], 1)
        z = batch_norm(conv(pooled, w, f"planes.{i}.conv"), w, f"planes.{i}.norm", train)
        scaled.append(x * gate(z, a.get("gate", "sigmoid"), identity)[:, 0].unsqueeze(axis))
    return sum(scaled[1:], scaled[0]) / len(scaled)


def channel_softmax(x: Tensor) -> Tensor:
    """(B, C, *S) → (B, C): softmax over the channels of the mean."""
    e = torch.exp(x.flatten(2).mean(2))
    return e / e.sum(1, keepdim=True)


def ema_attn(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """EMA attention, section 3, one group of channels after the other."""
    groups, axes, outputs = math.gcd(a.get("groups", 32), x.shape[1]), range(2, x.ndim), []
    for part in x.chunk(groups, 1):
        x1 = part
        for axis in axes:
            x1 = x1 * spread(1 / (1 + torch.exp(-matrix(strip(part, axis), w, "conv1x1"))), x, axis)
        rows = x1.flatten(2)
        centred = rows - rows.mean(2, keepdim=True)
        rows = centred / ((centred**2).mean(2, keepdim=True) + 1e-5) ** 0.5
        x1 = (rows * w["norm.weight"][:, None] + w["norm.bias"][:, None]).reshape(x1.shape)
        x2 = conv(part, w, "conv3x3")
        z = torch.einsum("bc,bcn->bn", channel_softmax(x1), x2.flatten(2))
        z = z + torch.einsum("bc,bcn->bn", channel_softmax(x2), x1.flatten(2))
        outputs.append(part * gate(z.reshape(-1, 1, *x.shape[2:]), a.get("gate", "sigmoid"), identity))
    return torch.cat(outputs, 1)


def apply_coord(block: Any, x: Tensor, a: Mapping[str, Tensor]) -> Tensor:
    """Coordinate attention from its gates, whatever the axes are called."""
    return x * math.prod(a.values())


def apply_groups(block: Any, x: Tensor, a: Mapping[str, Tensor]) -> Tensor:
    """One gate for each group of neighbouring channels."""
    return x * a["gate"].repeat_interleave(x.shape[1] // a["gate"].shape[1], 1)


FORMULAS = {"coord": coord, "strip": strip_pooling, "triplet": triplet, "ema_attn": ema_attn}
APPLY = {
    "coord": apply_coord,
    "strip": lambda block, x, a: x * a["gate"],
    "triplet": lambda block, x, a: x * a["gate"],
    "ema_attn": apply_groups,
}

COUNTS = {
    "coord": lambda c, d: (1 + d) * c * max(8, c // 32) + 3 * max(8, c // 32) + d * c,
    "strip": lambda c, d: d * (3 * c * c + 2 * c) + c * c + c,
    "triplet": lambda c, d: (d + 1) * (2 * 7**d + 2),
    "ema_attn": lambda c, d: (3**d + 1) * (c // 32) ** 2 + 4 * (c // 32),
}
MACS = {
    # the strips in a row are sum(size) long
    "coord": lambda c, *size: 2 * c * max(8, c // 32) * sum(size),
    "strip": lambda c, *size: 3 * c * c * sum(size) + c * c * math.prod(size),
    "triplet": lambda c, *size: (
        2 * 7 ** len(size) * (sum(c * math.prod(size) // n for n in size) + math.prod(size))
    ),
    "ema_attn": lambda c, *size: 32 * (c // 32) ** 2 * (sum(size) + 3 ** len(size) * math.prod(size)),
}
