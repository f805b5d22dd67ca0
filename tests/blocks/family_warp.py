"""What the tests know of the spatial transformer and the crop."""

from __future__ import annotations

import math
from typing import Any

import torch
from formula_parts import Weights, conv
from torch import Tensor

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "stn": [
        {"mode": "attention", "padding": "border", "reduction": 4},
        {"kernel_size": 1, "bias": False, "reduction": 2, "padding": "border"},
    ],
    "crop": [{"sharpness": 1, "kernel_size": 1, "bias": False, "reduction": 2}],
}
PAPER_IS_IDENTITY = {"stn"}
SLOW_EXPORT = {"crop"}
NO_LOGITS = {
    "stn",
    "stn-mode=attention-padding=border-reduction=4",
    "stn-kernel_size=1-bias=False-reduction=2-padding=border",
    "crop",
    "crop-sharpness=1-kernel_size=1-bias=False-reduction=2",
}


def located(x: Tensor, w: Weights) -> Tensor:
    """The localisation net's numbers."""
    f = conv(x, w, "conv").clamp(min=0)
    axes = [torch.linspace(-1 + 1 / n, 1 - 1 / n, n, dtype=x.dtype) for n in x.shape[2:]]
    grids = torch.meshgrid(*axes, indexing="ij")
    s = torch.cat([(f * g).flatten(2).mean(2) for g in (torch.ones_like(grids[0]), *grids)], 1)
    s = (s @ w["fc1.weight"].T + w.get("fc1.bias", 0)).clamp(min=0)
    return s @ w["fc2.weight"].T + w.get("fc2.bias", 0)


def theta(x: Tensor, w: Weights, a: dict[str, Any]) -> Tensor:
    """A and t themselves, (B, dims, dims + 1)."""
    dims, out = x.ndim - 2, located(x, w)
    unit = torch.eye(dims, dims + 1, dtype=x.dtype)
    if a.get("mode") == "attention":
        scaled = out[:, :1, None] * unit
        return unit + scaled + torch.nn.functional.pad(out[:, 1:, None], (dims, 0))
    return unit + out.reshape(-1, dims, dims + 1)


def stn(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """Spatial transformer, eq. 1, 2 and 5, each step with the product of the homogeneous matrices so far."""
    last = torch.eye(x.ndim - 1, dtype=x.dtype)[-1:].expand(x.shape[0], 1, -1)
    total, y = torch.eye(x.ndim - 1, dtype=x.dtype), x
    for _ in range(a.get("steps", 1)):
        total = total @ torch.cat([theta(y, w, a), last], 1)
        y = warped(x, total[:, :-1], a)
    return x + w["alpha"] * (y - x) if "alpha" in w else y


def warped(x: Tensor, matrix: Tensor, a: dict[str, Any]) -> Tensor:
    """x seen through A and t: every output position sums over all input positions."""
    size = x.shape[2:]
    axes = [torch.linspace(-1 + 1 / n, 1 - 1 / n, n, dtype=x.dtype) for n in size]
    grid = torch.stack([*torch.meshgrid(*axes, indexing="ij"), torch.ones(size, dtype=x.dtype)]).flatten(1)
    source = matrix @ grid  # (B, dims, N), in normalised coordinates
    kernel: Tensor | float = 1.0
    numbers = torch.meshgrid(*(torch.arange(n, dtype=x.dtype) for n in size), indexing="ij")
    for d, n in enumerate(size):
        pixel = ((source[:, d] + 1) * n - 1) / 2
        if a.get("padding") == "border":
            pixel = pixel.clamp(0, n - 1)
        kernel = kernel * (1 - (pixel.unsqueeze(2) - numbers[d].flatten()).abs()).clamp(min=0)
    return torch.einsum("bij,bcj->bci", kernel, x.flatten(2)).reshape(x.shape)


def crop(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """RA-CNN's window in pixels: from the edge centre − half to the edge centre + half on each axis."""
    z, y = located(x, w), x
    half = 1 / (1 + torch.exp(-z[:, -1]))
    for d, n in enumerate(x.shape[2:]):
        centre = 2 / (1 + torch.exp(-2 * z[:, d])) - 1
        pixels = torch.arange(n, dtype=x.dtype) + 0.5
        edges = [n * (1 + centre + side * half) / 2 for side in (-1, 1)]
        rise, fall = (1 / (1 + torch.exp(a.get("sharpness", 10) * (e[:, None] - pixels))) for e in edges)
        y = y * (rise - fall).view(-1, 1, *[1] * d, n, *[1] * (x.ndim - 3 - d))
    return x + w["alpha"] * (y - x) if "alpha" in w else y


def apply_crop(block: Any, x: Tensor, a: dict[str, Tensor]) -> Tensor:
    """x times the window, blended or not."""
    return x * a["gate"] if block.alpha is None else x + block.alpha * (x * a["gate"] - x)


def apply_stn(block: Any, x: Tensor, a: dict[str, Tensor]) -> Tensor:
    """Eq. 5 at p + offset: every output position sums over all input positions."""
    size, kernel = x.shape[2:], torch.ones((), dtype=x.dtype)
    places = torch.meshgrid(*(torch.arange(n, dtype=x.dtype) for n in size), indexing="ij")
    for d, n in enumerate(size):
        pixel = (a["offset"][:, d] + places[d]).flatten(1)
        pixel = pixel.clamp(0, n - 1) if block.padding == "border" else pixel
        kernel = kernel * (1 - (pixel.unsqueeze(2) - places[d].flatten()).abs()).clamp(min=0)
    return torch.einsum("bij,bcj->bci", kernel, x.flatten(2)).reshape(x.shape)


FORMULAS = {"stn": stn, "crop": crop}
APPLY = {"stn": apply_stn, "crop": apply_crop}


def means(c: int, d: int) -> int:
    """How many numbers the localisation net sums a map up in: each feature's mean, and one per axis."""
    return (c // 16) * (1 + d)


COUNTS = {
    "crop": lambda c, d: (3**d * c + 1) * (c // 16) + (means(c, d) + 1) * (means(c, d) + d + 1),
    "stn": lambda c, d: (3**d * c + 1) * (c // 16) + (means(c, d) + 1) * (means(c, d) + d * (d + 1)),
}
MACS = {
    "crop": lambda c, *size: (
        3 ** len(size) * c * (c // 16) * math.prod(size)
        + means(c, len(size)) * (means(c, len(size)) + len(size) + 1)
    ),
    "stn": lambda c, *size: (
        3 ** len(size) * c * (c // 16) * math.prod(size)
        + means(c, len(size)) * (means(c, len(size)) + len(size) * (len(size) + 1))
    ),
}
