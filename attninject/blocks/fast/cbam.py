"""Fast forms of CBAM: one factor per channel, then one per position of what lies between, which is never kept.

The lean form puts `channel.Squeeze` in front. By kernels three Functions share the work so that x and g are read as
seldom as can be, 3R 1W forward and 5R 1W backward: `RescaleByKernels` sums what both factors get from one read of g
and x, `RefineByKernels` adds to it from one of x, and `TapByKernels` writes ∂x from one of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attninject.blocks import gpu
from attninject.blocks.precision import full_precision

from . import channel
from .function import FastFunction, conduit
from .primitives import channel_dot, flat, laid_out_as, mix_channels, pieces, room
from .spatial import add_descriptors, parts_of


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


# --- on a GPU ---------------------------------------------------------------------------------------


class TapByKernels(FastFunction):
    """`channel.SqueezeByKernels` with conduits of g, m, s, the maxima over channels, their share, and a shift."""

    @staticmethod
    def forward(x: Tensor, kinds: Sequence[str]) -> tuple[Tensor, ...]:
        """x: (B, C, *S) → six conduits, the descriptors, how often the maximum occurs."""
        g, m, *found = channel.SqueezeByKernels.forward(x, kinds)
        at = (x.shape[0], 1, *x.shape[2:])
        sums = [conduit(x, at, torch.float32) for _ in range(2)]
        return g, m, conduit(x, at), conduit(x, at), *sums, *found

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep x, its maxima and their ties."""
        x, ctx.kinds = inputs
        ctx.mark_non_differentiable(output[-1])
        maxima = [output[6 + ctx.kinds.index("max")], output[-1]] if "max" in ctx.kinds else []
        FastFunction.keep(ctx, x, extra=maxima)

    @staticmethod
    def plain(ctx: Any, *inputs: Any) -> tuple[Tensor | None, ...]:
        """The same descriptors."""
        return *(None,) * 4, *channel.Squeeze.plain(ctx, *inputs), None  # which has two conduits of its own

    @staticmethod
    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """∂x = m ∂z + what the descriptors send, ∂z = s g + shift + share at the maxima over channels of m x."""
        g, m, s, top, share, shift, *descriptors = grads[:-1]
        x, *maxima = ctx.saved_tensors
        d = channel.shares(ctx.kinds, descriptors, maxima, x.shape[2:].numel())
        if g is None or top is None or share is None:
            return gpu.maps.ascended(torch.zeros_like(x), x, **d), None
        return gpu.maps.ascended(g, x, m=m, s=s, across=(top, share), shift=shift, **d), None


class RefineByKernels(Refine):
    """As `Refine`, with a conduit of the share of ∂m that `Rescale` has summed."""

    @staticmethod
    def forward(x: Tensor, m: Tensor, *conduits: Tensor) -> tuple[Tensor, ...]:
        """x: (B, C, *S), m: (B, C, 1, …) → conduits of g, s and ∂m; maximum and mean: (B, 1, *S); ties."""
        mean, largest, ties = gpu.maps.pooled_across(x, m)
        g, s = conduit(x, x.shape), conduit(x, mean.shape)
        return g, s, conduit(x, m.shape, torch.float32), largest, mean, ties

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep x, m, the maxima and their ties."""
        ctx.mark_non_differentiable(output[5])
        FastFunction.keep(ctx, *inputs[:2], extra=[output[3], output[5]])

    @staticmethod
    def plain(ctx: Any, *inputs: Any) -> tuple[Tensor | None, ...]:
        """The same descriptors."""
        return None, *Refine.plain(ctx, *inputs), None

    @staticmethod
    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """∂m = Σ_n s g x, which `Rescale` has sent, + Σ_n (d_mean / C + d_max / k at the maxima) x."""
        g, s, dm, d_max, d_mean, _ = grads
        x, m, largest, ties = ctx.saved_tensors
        share, shift = parts_of(d_max, d_mean, ties, x.shape[1])
        rest = gpu.maps.descended(x, m, largest, share, shift)
        dm = rest if dm is None else dm + rest
        if g is None or s is None:
            g, s = torch.zeros_like(x), torch.zeros_like(largest)
        return None, dm.to(m.dtype), g, m, s, largest, share, shift


class RescaleByKernels(Rescale):
    """As `Rescale`: 1R 1W forward, 2R backward."""

    @staticmethod
    def forward(x: Tensor, m: Tensor, s: Tensor, *conduits: Tensor) -> Tensor:
        """As `Rescale`."""
        return gpu.maps.scaled(x, m, s)

    @staticmethod
    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """∂s = Σ_c m g x; Σ_n s g x is sent on."""
        (g,) = grads
        x, m, s = ctx.saved_tensors
        assert g is not None
        g = laid_out_as(g, x)
        dm, ds, _ = gpu.maps.products(g, x, across=True, m=m, s=s)
        assert ds is not None
        return None, None, ds.to(s.dtype), g, s, dm


Conduits = tuple[Tensor, ...]


def squeeze(x: Tensor, kinds: Sequence[str]) -> tuple[Conduits, list[Tensor]]:
    """x: (B, C, *S) → what `refine` needs, and the descriptors (B, C, 1, …) of the `kinds` avg and max."""
    if not gpu.by_kernels():
        return channel.squeeze(x, kinds)
    found = TapByKernels.apply(x, kinds)
    return found[:6], list(found[6:-1])


def refine(x: Tensor, m: Tensor, conduits: Conduits) -> tuple[Conduits, tuple[Tensor, Tensor]]:
    """`spatial.pool` of x · m, `m`: (B, C, 1, …) in x's dtype, from descriptors that came with the conduits."""
    if gpu.by_kernels():
        *on, largest, mean, _ = RefineByKernels.apply(x, m, *conduits)
        return tuple(on), (largest, mean)
    with full_precision(x):
        g, s, largest, mean = Refine.apply(x, m, *conduits)
    return (g, s), (largest, mean)


def rescale(x: Tensor, m: Tensor, factor: Tensor, conduits: Conduits) -> Tensor:
    """x · m · factor, `factor`: (B, 1, *S) from what `refine` gave with the conduits."""
    form = RescaleByKernels if gpu.by_kernels() else Rescale
    y: Tensor = form.apply(x, m, factor.to(x.dtype), *conduits)
    return y
