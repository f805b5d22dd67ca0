"""Fast forms of x · s with one factor per position, and of CBAM, which applies it behind one per channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attninject.blocks.precision import full_precision

from .channel import Scale
from .function import FastFunction, conduit
from .primitives import (
    channel_dot,
    flat,
    laid_out_as,
    maxima_shares,
    mix_channels,
    pieces,
    position_dot,
    room,
)


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


class Refine(FastFunction):
    """y = x · m, not kept → its maximum and mean over the channels, and conduits of g and s."""

    @staticmethod
    def forward(x: Tensor, m: Tensor, gy_conduit: Tensor, m_conduit: Tensor) -> tuple[Tensor, ...]:
        """x: (B, C, *S), m: (B, C, 1, …) → conduit of g, conduit of s, maximum and mean: (B, 1, *S)."""
        shape = (x.shape[0], 1, *x.shape[2:])
        largest, mean = x.new_empty(shape), x.new_empty(shape)
        dense, factor, spare = flat(x), m.flatten(2), room(flat(x))
        for part in pieces(dense):
            y = torch.mul(dense[part], factor[part], out=spare[: part.stop - part.start])
            torch.amax(y, 1, keepdim=True, out=largest.flatten(2)[part])
            torch.mean(y, 1, keepdim=True, out=mean.flatten(2)[part])
        return conduit(x, x.shape), conduit(x, shape), largest, mean

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep x, m and the maxima of y."""
        FastFunction.keep(ctx, *inputs[:2], extra=[output[2]])

    @staticmethod
    def plain(ctx: Any, *inputs: Any) -> tuple[Tensor | None, ...]:
        """The same descriptors."""
        y = inputs[0] * inputs[1]
        return None, None, y.amax(1, keepdim=True), y.mean(1, keepdim=True)

    @staticmethod
    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """∂y = g · s + d_mean / C + d_max at the maxima of y; ∂m = Σ_n ∂y · x; ∂y goes on to `Squeeze`."""
        g, s, d_max, d_mean = grads
        x, m, largest = ctx.saved_tensors
        g = None if g is None else flat(laid_out_as(g, x))
        gy = torch.empty_like(x)
        dense, factor, spare = flat(x), m.flatten(2), room(flat(x))
        dm = []
        for part in pieces(dense):
            y = torch.mul(dense[part], factor[part], out=spare[: part.stop - part.start])
            out = flat(gy)[part]
            add_descriptors(y, part, largest, d_max, d_mean, y)
            if g is not None and s is not None:
                torch.addcmul(y, g[part], s.flatten(2)[part], out=out)
            else:
                out.copy_(y)
            dm.append(channel_dot(out, dense[part]))
        return None, torch.cat(dm).to(m.dtype).view_as(m), gy, m


class Rescale(FastFunction):
    """y = x · m · s; tells `Refine` what g and s are."""

    @staticmethod
    def forward(x: Tensor, m: Tensor, s: Tensor, g_conduit: Tensor, s_conduit: Tensor) -> Tensor:
        """x: (B, C, *S), m: (B, C, 1, …), s: (B, 1, *S), of one dtype → the product."""
        out = torch.empty_like(x)
        for part in pieces(flat(x)):
            torch.mul(flat(x)[part], m.flatten(2)[part], out=flat(out)[part])
            flat(out)[part].mul_(s.flatten(2)[part])
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep the three factors."""
        FastFunction.keep(ctx, *inputs[:3])

    @staticmethod
    def plain(ctx: Any, *inputs: Any) -> tuple[Tensor | None, ...]:
        """The product."""
        x, m, s = inputs
        return (x * m * s,)

    @staticmethod
    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """∂s = Σ_c m · g · x; the rest of ∂x and ∂m is left to `Refine`."""
        (g,) = grads
        x, m, s = ctx.saved_tensors
        assert g is not None
        g = laid_out_as(g, x)
        ds = None
        if ctx.needs_input_grad[2]:
            dense, spare = flat(x), room(flat(x))
            parts = []
            for part in pieces(dense):
                gx = torch.mul(flat(g)[part], dense[part], out=spare[: part.stop - part.start])
                parts.append(mix_channels(gx, m.flatten(1)[part]))
            ds = torch.cat(parts).to(s.dtype).view_as(s)
        return None, None, ds, g, s


Carriers = tuple[Tensor, Tensor]


def pool(x: Tensor) -> tuple[Carriers, tuple[Tensor, Tensor]]:
    """x: (B, C, *S) → what `scale` needs, and maximum and mean over the channels (B, 1, *S)."""
    with full_precision(x):
        g, s, largest, mean = Pool.apply(x)
    return (g, s), (largest, mean)


def scale(x: Tensor, factor: Tensor, conduits: Carriers) -> Tensor:
    """x · factor in x's dtype, `factor`: (B, 1, *S) from the descriptors that came with the conduits."""
    y: Tensor = ScaleAt.apply(x, factor.to(x.dtype), *conduits)
    return y


def refine(x: Tensor, m: Tensor, conduits: Carriers) -> tuple[Carriers, tuple[Tensor, Tensor]]:
    """`pool` of x · m, `m`: (B, C, 1, …) in x's dtype, from descriptors that came with the conduits."""
    with full_precision(x):
        g, s, largest, mean = Refine.apply(x, m, *conduits)
    return (g, s), (largest, mean)


def rescale(x: Tensor, m: Tensor, factor: Tensor, conduits: Carriers) -> Tensor:
    """x · m · factor, `factor`: (B, 1, *S) from what `refine` gave with the conduits."""
    y: Tensor = Rescale.apply(x, m, factor.to(x.dtype), *conduits)
    return y
