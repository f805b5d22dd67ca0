"""What the tests know of the masks that are networks of their own."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from formula_parts import Weights, batch_norm, conv, gate
from torch import Tensor

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "residual_attention": [
        {"trunk": 0, "depth": 1, "units": 2},
        {"trunk": 1, "depth": 3, "reduction": 2},
    ],
    "recurrent_gate": [
        {"steps": 1, "reduction": 2},
        {"steps": 2, "kernel_size": 5, "bias": False, "gate": "tanh"},
    ],
}


def dead_recurrent_gate(args: dict[str, Any]) -> set[str]:
    """In the only step the state is 0, so the reset gate multiplies nothing."""
    return {"reset.weight", "reset.bias"} if args.get("steps") == 1 else set()


DEAD = {"recurrent_gate": dead_recurrent_gate}
SLOW_EXPORT = {"residual_attention"}
POOL = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}
MODE = {3: "linear", 4: "bilinear", 5: "trilinear"}


def units(x: Tensor, w: Weights, key: str, count: int, train: bool, first: int = 0) -> Tensor:
    """`count` pre-activation bottleneck units."""
    for i in range(first, first + count):
        y = x
        for j in range(3):
            y = batch_norm(y, w, f"{key}.{i}.{j}.norm", train).clamp(min=0)
            y = conv(y, w, f"{key}.{i}.{j}.conv")
        x = x + y
    return x


def residual_attention(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """Residual attention, eq. 3 and section 3.2, the mask as nested levels."""
    depth, per = a.get("depth", 2), a.get("units", 1)

    def level(y: Tensor, i: int) -> Tensor:
        """What comes back, at y's size, from the level below y."""
        below = units(POOL[y.ndim](y, 3, stride=2, padding=1), w, f"down.{i}", per, train)
        if i + 1 < depth:
            below = level(below, i + 1) + units(below, w, "skips", 1, train, first=i)
        up = units(below, w, f"up.{depth - 1 - i}", per, train)
        return F.interpolate(up, y.shape[2:], mode=MODE[y.ndim], align_corners=False)

    m = level(x, 0)
    for j in range(2):
        m = conv(batch_norm(m, w, f"mask.{j}.norm", train).clamp(min=0), w, f"mask.{j}.conv")
    return units(x, w, "trunk", a.get("trunk", 2), train) * gate(m, "sigmoid", identity, skip=True)


def recurrent_gate(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """The convolutional GRU, 1511.06432, in the loop of 1406.6247."""
    m: Tensor | float = 1.0
    h = torch.zeros_like(conv(x, w, "read"))
    for _ in range(a.get("steps", 3)):
        e = conv(x * m, w, "read")
        u = 1 / (1 + torch.exp(-conv(torch.cat([e, h], 1), w, "update")))
        r = 1 / (1 + torch.exp(-conv(torch.cat([e, h], 1), w, "reset")))
        c = 2 / (1 + torch.exp(-2 * conv(torch.cat([e, r * h], 1), w, "candidate"))) - 1
        h = (1 - u) * h + u * c
        m = gate(conv(h, w, "out"), a.get("gate", "sigmoid"), identity)
    return x * m


FORMULAS = {"residual_attention": residual_attention, "recurrent_gate": recurrent_gate}
APPLY = {
    "residual_attention": lambda block, x, a: block.trunk(x) * a["gate"],
    "recurrent_gate": lambda block, x, a: x * a["gate"],
}


def unit_macs(c: int, d: int) -> int:
    """The weights of a bottleneck unit's three convolutions, each used once per position."""
    return 2 * c * (c // 4) + 3**d * (c // 4) ** 2


COUNTS = {
    "residual_attention": lambda c, d: (
        7 * (2 * c + unit_macs(c, d) + 4 * (c // 4)) + (2 * c + c * c) + (2 * c + c * c + c)
    ),
    "recurrent_gate": lambda c, d: (
        (c * (c // 16) + c // 16) + 3 * (2 * 3**d * (c // 16) ** 2 + c // 16) + (c // 16 * c + c)
    ),
}
MACS = {
    # full size: two units of the trunk, two 1×1 layers; half: down, skip, up; a quarter: down, up
    "residual_attention": lambda c, *size: (
        math.prod(size) * (2 * unit_macs(c, len(size)) + 2 * c * c)
        + 3 * math.prod(-(-n // 2) for n in size) * unit_macs(c, len(size))
        + 2 * math.prod(-(-n // 4) for n in size) * unit_macs(c, len(size))
    ),
    "recurrent_gate": lambda c, *size: (
        3 * math.prod(size) * (2 * c * (c // 16) + 3 * 3 ** len(size) * 2 * (c // 16) ** 2)
    ),
}
