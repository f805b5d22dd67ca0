"""Fast forms of x · f with one factor per channel: pooled descriptors of x, and scaling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attninject.blocks import gpu
from attninject.blocks.precision import full_precision

from .function import FastFunction, conduit
from .primitives import affine, channel_dot, flat, laid_out_as, maxima_shares, pieces, room


class Squeeze(FastFunction):
    """x → its means and maxima over positions, and two conduits: for g, of x's shape, and for the factor."""

    @staticmethod
    def forward(x: Tensor, kinds: Sequence[str]) -> tuple[Tensor, ...]:
        """x: (B, C, *S) → conduit of g, conduit of f, and (B, C, 1, …) for each of `kinds`, avg or max."""
        pooled = _pooled(x, kinds)
        return (conduit(x, x.shape), conduit(x, pooled[0].shape), *pooled)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Means need nothing of x; maxima need x and themselves."""
        x, ctx.kinds = inputs
        ctx.shape, ctx.strides = x.shape, x.stride()
        if "max" in ctx.kinds:
            FastFunction.keep(ctx, x, extra=[output[2 + ctx.kinds.index("max")]])
        else:
            FastFunction.keep(ctx)

    @classmethod
    def differentiate(cls, ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """As the base class, but means without x."""
        if "max" in ctx.kinds:
            return super().differentiate(ctx, grads)
        return (None if grads[2] is None else (grads[2] / ctx.shape[2:].numel()).expand(ctx.shape)), None

    @staticmethod
    def plain(ctx: Any, *inputs: Any) -> tuple[Tensor | None, ...]:
        """The same descriptors."""
        return None, None, *_pooled(inputs[0], ctx.kinds)

    @staticmethod
    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """∂x = g · f + d_avg / N + d_max at the maxima."""
        g, f, *descriptors = grads
        like = next(t for t in grads if t is not None)
        d = dict(zip(ctx.kinds, descriptors, strict=True))
        out = torch.empty_strided(ctx.shape, ctx.strides, dtype=like.dtype, device=like.device)
        y = flat(out)
        mean = d.get("avg")
        shift = None if mean is None else mean.flatten(1) / y.shape[2]
        if g is None:
            y.zero_() if shift is None else y.copy_(shift.unsqueeze(2).expand_as(y))
        elif f is None:
            y.copy_(flat(g)) if shift is None else torch.add(flat(g), shift.unsqueeze(2), out=y)
        elif shift is None:
            torch.mul(flat(laid_out_as(g, out)), f.flatten(2), out=y)
        else:
            affine(flat(laid_out_as(g, out)), f.flatten(1), shift, y)
        largest = d.get("max")
        if largest is not None:
            x, maxima = ctx.saved_tensors
            add_at_maxima(y, flat(x), maxima.flatten(2), largest.flatten(2))
        return out, None


def _pooled(x: Tensor, kinds: Sequence[str]) -> list[Tensor]:
    axes = tuple(range(2, x.ndim))
    return [x.mean(axes, keepdim=True) if kind == "avg" else x.amax(axes, keepdim=True) for kind in kinds]


def add_at_maxima(y: Tensor, x: Tensor, maxima: Tensor, d: Tensor) -> None:
    """y += d where x has its maxima over positions: y, x: (B, C, N), maxima, d: (B, C, 1)."""
    spare = room(x)
    for part in pieces(x):
        mask = spare[: part.stop - part.start]
        shares = maxima_shares(x[part], maxima[part], d[part], 2, mask)
        y[part].addcmul_(mask, shares)


class Scale(FastFunction):
    """y = x · f, f: one factor per channel; tells `Squeeze` what g and f are. See also `spatial.ScaleAt`."""

    @staticmethod
    def forward(x: Tensor, f: Tensor, g_conduit: Tensor, f_conduit: Tensor) -> Tensor:
        """x: (B, C, *S), f: (B, C, 1, …) of the same dtype → x · f."""
        return x * f

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep both factors."""
        FastFunction.keep(ctx, *inputs[:2])

    @staticmethod
    def plain(ctx: Any, *inputs: Any) -> tuple[Tensor | None, ...]:
        """The product."""
        return (inputs[0] * inputs[1],)

    @staticmethod
    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """∂f = Σ_n g · x; the rest of ∂x is left to `Squeeze`."""
        (g,) = grads
        x, f = ctx.saved_tensors
        assert g is not None
        g = laid_out_as(g, x)
        df = channel_dot(flat(g), flat(x)).to(f.dtype).view_as(f) if ctx.needs_input_grad[1] else None
        return None, df, g, f


class SqueezeByKernels(Squeeze):
    """`Squeeze` on a GPU: mean and maximum from one read; ∂x 1R 1W, with a maximum 2R 1W."""

    @staticmethod
    def forward(x: Tensor, kinds: Sequence[str]) -> tuple[Tensor, ...]:
        """As `Squeeze`; then how often each maximum occurs, empty without maxima."""
        mean, top, ties = gpu.maps.pooled(x, "avg" in kinds, "max" in kinds)
        pooled = [mean if kind == "avg" else top for kind in kinds]
        return conduit(x, x.shape), conduit(x, pooled[0].shape), *pooled, ties

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """As `Squeeze`, and the ties."""
        Squeeze.setup_context(ctx, inputs, output)
        ctx.mark_non_differentiable(output[-1])
        if "max" in ctx.kinds:
            FastFunction.keep(ctx, inputs[0], extra=[output[2 + ctx.kinds.index("max")], output[-1]])

    @classmethod
    def differentiate(cls, ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """As `Squeeze`, to which the ties are no result."""
        return super().differentiate(ctx, grads[:-1])

    @staticmethod
    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """∂x = g · f + d_avg / N + d_max / k at the maxima; without both letters by torch's operations."""
        g, f, *descriptors = grads[:-1]
        if g is None or f is None:
            return Squeeze.gradient(ctx, *grads[:-1])
        x, *maxima = ctx.saved_tensors or (None,)
        d = shares(ctx.kinds, descriptors, maxima, ctx.shape[2:].numel())
        return gpu.maps.ascended(g, x, m=f, **d), None


def shares(
    kinds: Sequence[str], descriptors: Sequence[Tensor | None], maxima: Sequence[Tensor], count: int
) -> dict[str, Any]:
    """The gradients of a channel's mean and maximum as `maps.ascended` takes them; `maxima`: these, and their ties."""
    d = dict(zip(kinds, descriptors, strict=True))
    mean, top = d.get("avg"), d.get("max")
    return {
        "base": None if mean is None else mean.float() / count,
        "peaks": None if top is None else (maxima[0], top.float() / maxima[1]),
    }


class ScaleByKernels(Scale):
    """`Scale` on a GPU: 1R 1W forward, 2R backward."""

    @staticmethod
    def forward(x: Tensor, f: Tensor, g_conduit: Tensor, f_conduit: Tensor) -> Tensor:
        """As `Scale`."""
        return gpu.maps.scaled(x, f)

    @staticmethod
    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """As `Scale`."""
        (g,) = grads
        x, f = ctx.saved_tensors
        assert g is not None
        g = laid_out_as(g, x)
        df = gpu.maps.products(g, x)[0] if ctx.needs_input_grad[1] else None
        return None, None if df is None else df.to(f.dtype), g, f


def squeeze(x: Tensor, kinds: Sequence[str]) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    """x: (B, C, *S) → what `scale` needs, and the descriptors (B, C, 1, …) of the `kinds` avg and max."""
    with full_precision(x):
        g_conduit, f_conduit, *pooled = (SqueezeByKernels if gpu.by_kernels() else Squeeze).apply(x, kinds)
    return (g_conduit, f_conduit), pooled[: len(kinds)]


def scale(x: Tensor, factor: Tensor, conduits: tuple[Tensor, Tensor]) -> Tensor:
    """x · factor in x's dtype, `factor`: (B, C, 1, …) from the descriptors that came with the conduits."""
    y: Tensor = (ScaleByKernels if gpu.by_kernels() else Scale).apply(x, factor.to(x.dtype), *conduits)
    return y
