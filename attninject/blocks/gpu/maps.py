"""The kernels of `map_kernels.py`, called: maps (B, C, *S) of either layout, factors and sums beside them.

R and W count how often a map is read and written. Factors and shifts are (B, C, …) per channel, (B, 1, *S) or (B, N)
per position; float32 where they are gradients, as x where they are factors.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from . import map_kernels as kernels

TILE = 2**12
"""Elements of a tile: 16 of each map for each of 256 threads, which leaves every kernel its registers."""


class Tiles:
    """How one map is cut: strides, tiles, rows of partial sums."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.batch, self.channels = x, x.shape[0], x.shape[1]
        self.count = x.shape[2:].numel()
        self.positions = min(128 if x.is_contiguous() else 64, power(self.count))
        self.block = min(TILE // self.positions, power(self.channels))
        self.rows = -(-self.count // self.positions)
        size = self.channels * self.count
        self.strides = (size, self.count, 1) if x.is_contiguous() else (size, 1, self.channels)

    def launch(self, kernel: Any, *tensors: Tensor | float | None, **flags: bool) -> None:
        """Run it; for None, which a flag leaves unread, the map itself stands."""
        given = [self.x if t is None else t for t in tensors]
        with on(self.x):
            kernel[(self.batch * self.rows,)](
                *given, self.channels, self.count, *self.strides, self.rows, **flags, BC=self.block, BN=self.positions,
                num_warps=warps(self.block * self.positions),
            )  # fmt: skip

    def partial(self, wanted: bool = True) -> Tensor | None:
        """Room for one number per channel and row: (B, rows, C)."""
        shape = (self.batch, self.rows, self.channels)
        return torch.empty(shape, dtype=torch.float32, device=self.x.device) if wanted else None

    def per_position(self, wanted: bool = True, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """Room for one number per position: (B, 1, *S)."""
        shape = (self.batch, 1, *self.x.shape[2:])
        return torch.empty(shape, dtype=dtype, device=self.x.device) if wanted else None

    def summed(self, rows: Tensor | None) -> Tensor:
        """The rows of a partial sum added up: (B, C, 1, …), float32."""
        assert rows is not None
        return rows.sum(1).view(self.batch, self.channels, *(1,) * (self.x.ndim - 2))


def power(n: int) -> int:
    """The least power of two that is no less than n."""
    return 1 << (n - 1).bit_length()


def warps(elements: int) -> int:
    """Warps for a tile of so many elements."""
    return max(1, min(8, elements // 512))


def on(x: Tensor) -> AbstractContextManager[object]:
    """x's card as the current one, on which Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    """In memory as the kernels read what is not a map: (B, C) or (B, N), one number behind the other."""
    return [None if t is None else t.contiguous() for t in tensors]


def _float(*tensors: Tensor | None) -> list[Tensor | None]:
    return _dense(*(None if t is None else t.float() for t in tensors))


def pooled(x: Tensor, mean: bool, top: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and maximum over positions in x's dtype, and how often the maximum occurs: (B, C, 1, …) each. 1R.

    What is not asked for is empty. Float32 sums; a NaN makes the maximum NaN, with 0 occurrences.
    """
    t = Tiles(x)
    sums, tops, ties = t.partial(mean), t.partial(top), t.partial(top)
    t.launch(kernels.pool, x, None, None, sums, tops, ties, None, None, None, None,
             SCALED=False, SUM=mean, TOP=top, ACROSS=False, MIX=False)  # fmt: skip
    none = x.new_empty(0)
    means = (t.summed(sums) / t.count).to(x.dtype) if mean else none
    if tops is None or ties is None:
        return means, none, none
    largest = tops.amax(1, keepdim=True)
    found = t.summed(ties * (tops == largest))
    return means, largest.view(found.shape).to(x.dtype), found


def pooled_across(x: Tensor, m: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and maximum over the channels of x, or of x · m, in x's dtype, and ties: (B, 1, *S) each. 1R."""
    t = Tiles(x)
    mean, top, ties = t.per_position(dtype=x.dtype), t.per_position(dtype=x.dtype), t.per_position()
    (factor,) = _dense(m)
    t.launch(kernels.pool, x, factor, None, None, None, None, mean, top, ties, None,
             SCALED=m is not None, SUM=False, TOP=False, ACROSS=True, MIX=False)  # fmt: skip
    assert mean is not None and top is not None and ties is not None  # noqa: PT018
    return mean, top, ties


def mean_and_mixture(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Means over positions (B, C, 1, …) and Σ_c w_c x_c (B, 1, *S), w: (C,), in x's dtype. 1R."""
    t = Tiles(x)
    sums, mixed = t.partial(), t.per_position(dtype=x.dtype)
    t.launch(kernels.pool, x, None, w.contiguous(), sums, None, None, None, None, None, mixed,
             SCALED=False, SUM=True, TOP=False, ACROSS=False, MIX=True)  # fmt: skip
    assert mixed is not None
    return (t.summed(sums) / t.count).to(x.dtype), mixed


def products(
    g: Tensor, x: Tensor, *, channels: bool = True, across: bool = False, total: bool = False,
    m: Tensor | None = None, s: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Σ_n s g x (`channels`): (B, C, 1, …), Σ_c m g x (`across`): (B, 1, *S), Σ_n g (`total`), float32. 2R.

    Without s, m: 1. g lies as x.
    """
    t = Tiles(x)
    dots, totals, dot = t.partial(channels), t.partial(total), t.per_position(across)
    t.launch(kernels.products, g, x, *_dense(m, s), dots, totals, dot,
             CHANNELS=channels, WEIGHED=s is not None, SUM=total, ACROSS=across, SCALED=m is not None)  # fmt: skip
    return t.summed(dots) if channels else None, dot, t.summed(totals) if total else None


def descended(x: Tensor, m: Tensor, top: Tensor, share: Tensor, shift: Tensor) -> Tensor:
    """Σ_n (shift + [x m = top] share) x: (B, C, 1, …), float32; m: (B, C, …), the others (B, 1, *S). 1R."""
    t = Tiles(x)
    rows = t.partial()
    t.launch(kernels.descended, x, *_dense(m, top), *_float(share, shift), rows)
    return t.summed(rows)


def scaled(x: Tensor, m: Tensor | None, s: Tensor | None = None, *, summed: bool = False) -> Tensor:
    """x · m · s, of which one may be missing, or x · (m + s) (`summed`), in x's dtype and layout. 1R 1W."""
    t, out = Tiles(x), torch.empty_like(x)
    t.launch(kernels.scale, x, *_dense(m, s), out, SCALED=m is not None, WEIGHED=s is not None, SUMMED=summed)
    return out


Peaks = tuple[Tensor, Tensor]
"""Maxima, and what each element that is one gets of their gradient."""


def ascended(
    g: Tensor, x: Tensor | None, *, m: Tensor | None = None, s: Tensor | None = None, across: Peaks | None = None,
    shift: Tensor | None = None, base: Tensor | None = None, peaks: Peaks | None = None,
) -> Tensor:  # fmt: skip
    """m d + base + [x = peaks] part, d = s g + shift + [x m = across] share, in g's dtype and layout.

    m, base, peaks: (B, C, …), s, shift, across: (B, 1, *S); `shift` comes with `across`. x only where there are maxima.
    1R 1W, with them 2R 1W.
    """
    t, out = Tiles(g), torch.empty_like(g)
    top, share = across or (None, None)
    peak, part = peaks or (None, None)
    t.launch(
        kernels.ascend, g, x, *_dense(m, s, top), *_float(share, shift), *_dense(peak), *_float(part, base), out,
        SCALED=m is not None, WEIGHED=s is not None, ACROSS=across is not None, SHIFTED=base is not None,
        PEAKED=peaks is not None,
    )  # fmt: skip
    return out


def outer(
    g: Tensor, f: Tensor | None, s: Tensor | None, base: Tensor | None, w: Tensor, r: Tensor,
    u: Tensor | None = None, v: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """g · (f + s) + base + w rᵀ + u vᵀ as g lies; f, base, u: (B, C, …), w: (C,), s, r, v: (B, N). 1R 1W."""
    t, out = Tiles(g), torch.empty_like(g)
    t.launch(
        kernels.outer, g, *_dense(f, s), *_float(base), *_dense(u, v, w, r), out,
        SCALED=f is not None, WEIGHED=s is not None, SHIFTED=base is not None, SECOND=u is not None,
    )  # fmt: skip
    return out


def gathered(x: Tensor, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """a = softmax_n(Σ_c w_c x_cn + bias): (B, N), and Σ_n a_n x_cn: (B, C, 1, …), float32. 1R, and 1R of the cache.

    w: (C,); the bias changes nothing but what is not finite.
    """
    t = Tiles(x)
    logits, sums, rows = t.per_position(), t.partial(), (t.batch, t.rows)
    assert logits is not None and sums is not None  # noqa: PT018
    tops, totals = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    t.launch(kernels.gather, x, w.contiguous(), logits, tops, totals, sums)
    top = tops.amax(1, keepdim=True)
    share = torch.exp(tops - top)
    total = (totals * share).sum(1, keepdim=True)
    total = total if bias is None else total + 0 * bias.float()
    a = torch.exp(logits.flatten(1) - top) / total
    return a, t.summed(sums * (share / total).unsqueeze(2))


def gathered_back(x: Tensor, a: Tensor, context: Tensor, ds: Tensor) -> tuple[Tensor, Tensor]:
    """From the context's gradient, ds: (B, C, …), the logits', (B, N), and w's, (C,). 1R, and 1R of the cache.

    ∂l = a (∂a − Σ a ∂a), so Σ_n ∂l x = Σ_n a ∂a x − (Σ a ∂a) · context. All but x float32.
    """
    t = Tiles(x)
    da, rows = t.per_position(), t.partial()
    assert da is not None
    t.launch(kernels.gather_back, x, *_float(ds, a), da, rows)
    da = da.flatten(1)
    mean = (a * da).sum(1, keepdim=True)
    return a * (da - mean), (t.summed(rows).flatten(1) - mean * context.flatten(1)).sum(0)


def modulated(x: Tensor, p: Tensor, s: Tensor, product: bool, constant: float, slope: float) -> Tensor:
    """x (constant + slope σ(t)), t = p s (`product`) or p + s; p: (B, C, …), s: (B, 1, *S), float32. 1R 1W."""
    t, out = Tiles(x), torch.empty_like(x)
    t.launch(kernels.modulate, x, None, *_float(p, s), out, None, None, constant, slope,
             PRODUCT=product, BACKWARD=False)  # fmt: skip
    return out


def modulated_back(
    g: Tensor, x: Tensor, p: Tensor, s: Tensor, product: bool, constant: float, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Its gradients: g · factor, and those of p: (B, C, 1, …) and s: (B, 1, *S), float32. 2R 1W."""
    t, out = Tiles(x), torch.empty_like(x)
    rows, dot = t.partial(), t.per_position()
    t.launch(
        kernels.modulate, g, x, *_float(p, s), out, rows, dot, constant, slope, PRODUCT=product, BACKWARD=True
    )
    assert dot is not None
    return out, t.summed(rows), dot
