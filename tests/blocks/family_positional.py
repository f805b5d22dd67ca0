"""Reference formulas, in float64, of pointwise SAM, SimAM, SGE, LKA, GAM and scSE."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from formula_parts import CONV, Weights, batch_norm, column, conv, descriptor, gate, mlp
from torch import Tensor

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "sam_pointwise": [
        {"kernel_size": 3, "bias": False, "gate": "hard_sigmoid"},
        {"norm": True, "gate": "tanh"},
    ],
    "simam": [{"e_lambda": 0.1}],
    "sge": [{"groups": 4}, {"groups": 6, "gate": "tanh"}],
    "lka": [{"kernel_size": 7, "dilation": 2}, {"kernel_size": 5, "dilation": 1}],
    "gam": [{"kernel_size": 3, "reduction": 2, "bias": False, "gate": "hard_sigmoid"}],
    "scse": [{"mode": "max", "reduction": 4}, {"mode": "multiply"}, {"bias": False}],
}
DEAD = {"sam_pointwise": lambda args: {"conv.bias"} if args.get("norm") else set()}  # the norm subtracts it
NO_LOGITS = {"lka", "lka-kernel_size=7-dilation=2", "lka-kernel_size=5-dilation=1"}
CONSTANT = {
    "simam": {"identity", "paper", "blend"},
    "sge": {"identity", "paper", "blend"},
    "sam_pointwise": {"identity"},
}


def blended(x: Tensor, y: Tensor, w: Weights) -> Tensor:
    """x + α(y − x) where the block has an α."""
    return x + w["alpha"] * (y - x) if "alpha" in w else y


def sam_pointwise(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """YOLOv4, figure 5."""
    z = conv(x, w, "conv")
    z = batch_norm(z, w, "norm", train) if a.get("norm") else z
    return x * gate(z, a.get("gate", "sigmoid"), identity)


def simam(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """SimAM, eq. 5 and 6, with the released code's N − 1."""
    rows = x.flatten(2)
    mean = rows.sum(2, keepdim=True) / rows.shape[2]
    variance = ((rows - mean) ** 2).sum(2, keepdim=True) / (rows.shape[2] - 1)
    lam = a.get("e_lambda", 1e-4)
    energy = 4 * (variance + lam) / ((rows - mean) ** 2 + 2 * variance + 2 * lam)
    return blended(x, x * gate(1 / energy, "sigmoid", False).reshape(x.shape), w)


def sge(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """SGE, section 3, one group after the other."""
    outputs = []
    for i, part in enumerate(x.chunk(math.gcd(a.get("groups", 64), x.shape[1]), 1)):
        c = (column(descriptor(part, "avg"), x) * part).sum(1, keepdim=True)
        rows = c.flatten(2)
        mean = rows.mean(2, keepdim=True)
        deviation = ((rows - mean) ** 2).mean(2, keepdim=True) ** 0.5
        z = w["weight"][i] * (rows - mean) / (deviation + 1e-5) + w["bias"][i]
        outputs.append(part * gate(z.reshape(c.shape), a.get("gate", "sigmoid"), identity))
    return torch.cat(outputs, 1)


def lka(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """VAN, eq. 3-4: the two depthwise convolutions, then all channels together."""
    d, z = a.get("dilation", 3), x
    large = math.ceil(a.get("kernel_size", 21) / d)
    for key, k, step in (("conv0", 2 * d - 1, 1), ("conv_spatial", large + 1 - large % 2, d)):
        assert w[key + ".weight"].shape[2:] == (k,) * (x.ndim - 2)
        z = CONV[x.ndim](
            z, w[key + ".weight"], w[key + ".bias"], padding=k // 2 * step, dilation=step, groups=x.shape[1]
        )
    return x * conv(z, w, "conv1")


def gam(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """GAM, eq. 1-2."""
    kind = a.get("gate", "sigmoid")
    y = x * gate(conv(conv(x, w, "fc1").clamp(min=0), w, "fc2"), kind, identity)
    z = batch_norm(conv(y, w, "conv1"), w, "norm1", train).clamp(min=0)
    return y * gate(batch_norm(conv(z, w, "conv2"), w, "norm2", train), kind, identity)


def scse(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """scSE: two scaled maps, then their sum (in its identity form half of it), maximum or product."""
    mode = a.get("mode", "add")
    doubled = identity and "alpha" not in w
    channel = x * gate(column(mlp(descriptor(x, "avg"), w, "channel."), x), "sigmoid", doubled)
    spatial = x * gate(conv(x, w, "spatial"), "sigmoid", doubled)
    if mode == "add":
        return (channel + spatial) / (2 if doubled else 1)
    if mode == "max":
        return torch.where(channel > spatial, channel, spatial)
    return blended(x, channel * spatial, w)


def apply_blended(block: Any, x: Tensor, a: Mapping[str, Tensor]) -> Tensor:
    """SimAM from its gate."""
    y = x * a["gate"]
    return y if block.alpha is None else x + block.alpha * (y - x)


def apply_groups(block: Any, x: Tensor, a: Mapping[str, Tensor]) -> Tensor:
    """One gate for each group of neighbouring channels."""
    return x * a["gate"].repeat_interleave(x.shape[1] // a["gate"].shape[1], 1)


def apply_scse(block: Any, x: Tensor, a: Mapping[str, Tensor]) -> Tensor:
    """scSE from its two gates."""
    channel, spatial = x * a["channel"], x * a["spatial"]
    y = {"add": channel + spatial, "max": torch.maximum(channel, spatial), "multiply": channel * spatial}
    return y[block.mode] if block.alpha is None else x + block.alpha * (y[block.mode] - x)


FORMULAS = {"sam_pointwise": sam_pointwise, "simam": simam, "sge": sge, "lka": lka, "gam": gam, "scse": scse}
APPLY = {
    "sam_pointwise": lambda block, x, a: x * a["gate"],
    "simam": apply_blended,
    "sge": apply_groups,
    "lka": lambda block, x, a: x * a["gate"],
    "gam": lambda block, x, a: x * a["channel"] * a["spatial"],
    "scse": apply_scse,
}

COUNTS = {
    "sam_pointwise": lambda c, d: c * c + c,
    "simam": lambda c, d: 0,
    "sge": lambda c, d: 2 * math.gcd(64, c),
    "lka": lambda c, d: (5**d * c + c) + (7**d * c + c) + (c * c + c),
    "gam": lambda c, d: (2 * c * (c // 4) + c // 4 + c) + 2 * 7**d * c * (c // 4) + 2 * (c // 4) + 2 * c,
    "scse": lambda c, d: (2 * c * (c // 2) + c // 2 + c) + (c + 1),
}
MACS = {
    "sam_pointwise": lambda c, *size: c * c * math.prod(size),
    "simam": lambda c, *size: 0,
    "sge": lambda c, *size: 0,
    "lka": lambda c, *size: c * (5 ** len(size) + 7 ** len(size) + c) * math.prod(size),
    "gam": lambda c, *size: 2 * c * (c // 4) * (1 + 7 ** len(size)) * math.prod(size),
    "scse": lambda c, *size: 2 * c * (c // 2) + c * math.prod(size),
}
