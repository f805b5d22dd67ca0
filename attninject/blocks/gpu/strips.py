"""The kernels of `strip_kernels.py`, called: maps (B, C, H, W) of either layout, one factor per row and column.

Factors, means and gradients of an axis are (B, C, H, 1) and (B, C, 1, W), and lie as the map does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import strip_kernels as kernels
from .maps import TILE, on, power, warps

Pair = tuple[Tensor, Tensor]


class Tiles:
    """How one map is cut: strides of map and strips, tiles, parts of the sums over the columns."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        b, c, h, w = self.shape = x.shape
        self.columns = min(64, power(w))
        self.block = min(TILE // self.columns, power(c))
        self.parts, self.blocks = -(-w // self.columns), -(-c // self.block)
        self.rows = x.is_contiguous()
        strides = (h * w, w, 1, h, 1, w, 1) if self.rows else (1, w * c, c, 1, c, 1, c)
        self.strides = (c * h * w, *strides)
        self.programs = b * self.blocks * self.parts

    def launch(self, kernel: Any, *tensors: Tensor) -> None:
        """Run it."""
        with on(self.x):
            kernel[(self.programs,)](
                *tensors, *self.shape[1:], *self.strides, self.blocks, self.parts, BC=self.block, BW=self.columns,
                num_warps=warps(self.block * self.columns),
            )  # fmt: skip

    def added(self, left: Tensor) -> Tensor:
        """The parts of a sum over the columns: (parts, B, C, H, 1) → (B, C, H, 1)."""
        return left[0] if self.parts == 1 else left.sum(0)

    def room(self) -> tuple[Tensor, Tensor]:
        """For sums over the columns, (parts, B, C, H, 1), and over the rows, (B, C, 1, W); float32, laid out as x."""
        b, c, h, w = self.shape
        sizes = ((self.parts, b, c, h), (b, c, w)) if self.rows else ((self.parts, b, h, c), (b, w, c))
        left, down = (torch.empty(size, dtype=torch.float32, device=self.x.device) for size in sizes)
        if not self.rows:
            left, down = left.mT, down.mT
        return left.unsqueeze(4), down.unsqueeze(2)


def pooled(x: Tensor) -> Pair:
    """Means over the columns and over the rows, in x's dtype. 1R."""
    t = Tiles(x)
    left, down = t.room()
    t.launch(kernels.pool, x, left, down)
    return (t.added(left) / x.shape[3]).to(x.dtype), (down / x.shape[2]).to(x.dtype)


def products(g: Tensor, x: Tensor, p: Tensor, q: Tensor) -> Pair:
    """Σ_w g x q and Σ_h g x p, float32; g lies as x. 2R."""
    t = Tiles(x)
    left, down = t.room()
    t.launch(kernels.products, g, x, p, q, left, down)
    return t.added(left), down


def scaled(x: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """x · p · q in x's dtype and layout. 1R 1W."""
    t, out = Tiles(x), torch.empty_like(x)
    t.launch(kernels.scale, x, p, q, out)
    return out


def ascended(g: Tensor, p: Tensor, q: Tensor, left: Tensor, down: Tensor) -> Tensor:
    """g p q + left + down in g's dtype and layout; the latter two float32. 1R 1W."""
    t, out = Tiles(g), torch.empty_like(g)
    t.launch(kernels.ascend, g, p, q, left, down, out)
    return out
