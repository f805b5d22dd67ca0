"""Fast forms of x · s with one factor per position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attninject.blocks import gpu
from attninject.blocks.precision import full_precision

from .channel import Scale
from .function import FastFunction, conduit
from .primitives import flat, laid_out_as, maxima_shares, pieces, position_dot


class Pool(FastFunction):
    """x → its maximum and mean over the channels, and two conduits: for g, and for the factor s."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, ...]:
        """x: (B, C, *S) → conduit of g, conduit of s, maximum and mean: (B, 1, *S)."""
        largest, mean = x.amax(1, keepdim=True), x.mean(1, keepdim=True)
        return conduit(x, x.shape), conduit(x, mean.shape), largest, mean

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep x and its maxima."""
        FastFunction.keep(ctx, *inputs, extra=[output[2]])

    @staticmethod
    def plain(ctx: Any, *inputs: Any) -> tuple[Tensor | None, ...]:
        """The same descriptors."""
        x = inputs[0]
        return None, None, x.amax(1, keepdim=True), x.mean(1, keepdim=True)

    @staticmethod
    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """∂x = g · s + d_mean / C + d_max at the maxima."""
        g, s, d_max, d_mean = grads
        x, largest = ctx.saved_tensors
        out = torch.empty_like(x)
        y, dense = flat(out), flat(x)
        g = None if g is None else flat(laid_out_as(g, x))
        for part in pieces(dense):
            add_descriptors(dense[part], part, largest, d_max, d_mean, y[part])
            if g is not None and s is not None:
                y[part].addcmul_(g[part], s.flatten(2)[part])
        return (out,)


def add_descriptors(
    y: Tensor, part: slice, largest: Tensor, d_max: Tensor | None, d_mean: Tensor | None, out: Tensor
) -> None:
    """out = d_mean / C + d_max at the maxima of y over the channels; y, out: a piece (b, C, N) of a map.

    The rest are (B, 1, *S), of which `part` belongs to y.
    """
    shift = None if d_mean is None else d_mean.flatten(2)[part] / y.shape[1]
    if d_max is None:
        out.zero_() if shift is None else out.copy_(shift.expand_as(out))
        return
    shares = maxima_shares(y, largest.flatten(2)[part], d_max.flatten(2)[part], 1, out)
    if shift is None:
        out.mul_(shares)
    else:
        torch.addcmul(shift, out, shares, out=out)


class ScaleAt(Scale):
    """y = x · s, s: (B, 1, *S), one factor per position; tells `Pool` what g and s are."""

    @staticmethod
    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """∂s = Σ_c g · x; the rest of ∂x is left to `Pool`."""
        (g,) = grads
        x, s = ctx.saved_tensors
        assert g is not None
        g = laid_out_as(g, x)
        ds = position_dot(flat(g), flat(x)).to(s.dtype).view_as(s) if ctx.needs_input_grad[1] else None
        return None, ds, g, s


class PoolByKernels(Pool):
    """`Pool` on a GPU: 1R forward, 2R 1W backward."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, ...]:
        """As `Pool`; then how often each maximum occurs."""
        mean, largest, ties = gpu.maps.pooled_across(x)
        return conduit(x, x.shape), conduit(x, mean.shape), largest, mean, ties

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep x, its maxima and their ties."""
        ctx.mark_non_differentiable(output[4])
        FastFunction.keep(ctx, *inputs, extra=[output[2], output[4]])

    @staticmethod
    def plain(ctx: Any, *inputs: Any) -> tuple[Tensor | None, ...]:
        """The same descriptors."""
        return *Pool.plain(ctx, *inputs), None

    @staticmethod
    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """As `Pool`."""
        g, s, d_max, d_mean, _ = grads
        x, largest, ties = ctx.saved_tensors
        g = torch.zeros_like(x) if g is None else laid_out_as(g, x)
        share, shift = parts_of(d_max, d_mean, ties, x.shape[1])
        return (gpu.maps.ascended(g, x, s=s, across=(largest, share), shift=shift),)


def parts_of(
    d_max: Tensor | None, d_mean: Tensor | None, ties: Tensor, channels: int
) -> tuple[Tensor, Tensor]:
    """What each maximum gets of d_max, and each channel of d_mean, float32; None for zero."""
    none = torch.zeros_like(ties)
    share = none if d_max is None else d_max.float() / ties
    return share, none if d_mean is None else d_mean.float() / channels


class ScaleAtByKernels(ScaleAt):
    """`ScaleAt` on a GPU: 1R 1W forward, 2R backward."""

    @staticmethod
    def forward(x: Tensor, f: Tensor, g_conduit: Tensor, f_conduit: Tensor) -> Tensor:
        """As `ScaleAt`."""
        return gpu.maps.scaled(x, None, f)

    @staticmethod
    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """As `ScaleAt`."""
        (g,) = grads
        x, s = ctx.saved_tensors
        assert g is not None
        g = laid_out_as(g, x)
        ds = gpu.maps.products(g, x, channels=False, across=True)[1] if ctx.needs_input_grad[1] else None
        return None, None if ds is None else ds.to(s.dtype), g, s


Carriers = tuple[Tensor, Tensor]


def pool(x: Tensor) -> tuple[Carriers, tuple[Tensor, Tensor]]:
    """x: (B, C, *S) → what `scale` needs, and maximum and mean over the channels (B, 1, *S)."""
    with full_precision(x):
        g, s, largest, mean, *_ = (PoolByKernels if gpu.by_kernels() else Pool).apply(x)
    return (g, s), (largest, mean)


def scale(x: Tensor, factor: Tensor, conduits: Carriers) -> Tensor:
    """x · factor in x's dtype, `factor`: (B, 1, *S) from the descriptors that came with the conduits."""
    y: Tensor = (ScaleAtByKernels if gpu.by_kernels() else ScaleAt).apply(x, factor.to(x.dtype), *conduits)
    return y
