"""The fast form of coordinate attention: means along each axis, and one factor per channel and axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attninject.blocks import gpu
from attninject.blocks.gate import Gate
from attninject.blocks.precision import full_precision

from .dispatch import untouched
from .function import FastFunction, conduit
from .primitives import flat, laid_out_as, pieces, wide


class Strips(FastFunction):
    """x → for each axis its means over the other axes; conduits of g and of each axis' factor."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, ...]:
        """x: (B, C, *S) → conduit of g, the factors' conduits, then the means: (B, C, H, 1), (B, C, 1, W)."""
        means = _strips(x)
        return conduit(x, x.shape), *(conduit(x, mean.shape) for mean in means), *means

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Means need nothing of x but its shape."""
        ctx.shape, ctx.strides = inputs[0].shape, inputs[0].stride()
        FastFunction.keep(ctx)

    @classmethod
    def differentiate(cls, ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """Linear, and x is not kept."""
        axes, n = len(ctx.shape) - 2, ctx.shape[2:].numel()
        total = None
        for d in grads[1 + axes :]:
            if d is not None:
                part = (d / (n // d.shape[2:].numel())).expand(ctx.shape)
                total = part if total is None else total + part
        return (total,)

    @staticmethod
    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """∂x = g · Π factors + Σ d_i / (N / n_i)."""
        axes, n = len(ctx.shape) - 2, ctx.shape[2:].numel()
        g, factors, means = grads[0], grads[1 : 1 + axes], grads[1 + axes :]
        like = next(t for t in grads if t is not None)
        out = torch.empty_strided(ctx.shape, ctx.strides, dtype=like.dtype, device=like.device)
        g = None if g is None else laid_out_as(g, out)
        shifts = [None if d is None else _beside(d / (n // d.shape[2:].numel()), out) for d in means]
        spare = torch.empty_like(out[next(pieces(flat(out)))])
        for part in pieces(flat(out)):
            y, shift = out[part], _combined(torch.add, shifts, part, spare)
            if g is None:
                y.zero_() if shift is None else y.copy_(shift.expand_as(y))
                continue
            factor = _combined(torch.mul, factors, part, y)
            assert factor is not None
            if shift is None:
                torch.mul(factor, g[part], out=y)
            else:
                torch.addcmul(shift, g[part], factor, out=y)
        return (out,)


def _strips(x: Tensor) -> list[Tensor]:
    axes = range(2, x.ndim)
    if len(axes) == 1:
        return [x.clone()]  # its own strip; a result that is its argument would be a view of it
    n = x.shape[2:].numel()
    return [_sum_but(x, axis).div_(n // x.shape[axis]).to(x.dtype) for axis in axes]


def _combined(
    operation: Callable[..., Tensor], parts: Sequence[Tensor | None], part: slice, spare: Tensor
) -> Tensor | None:
    """The sum or product of what varies along one axis each, for a piece of the map, in `spare`.

    Formed before it meets the map, as short inner axes are slow: one operation over them instead of several.
    """
    given = [t[part] for t in parts if t is not None]
    if not given:
        return None
    first, *others = given
    for other in others[:-1]:
        first = operation(first, other)
    return operation(first, others[-1], out=spare[: part.stop - part.start]) if others else first


class ScaleAxes(FastFunction):
    """y = x · Π_i f_i, one factor per axis; tells `Strips` what g and the factors are."""

    @staticmethod
    def forward(x: Tensor, *factors_and_conduits: Tensor) -> Tensor:
        """x: (B, C, *S), factors (B, C, H, 1), (B, C, 1, W) of the same dtype, conduits → the product."""
        factors = factors_and_conduits[: x.ndim - 2]
        out = torch.empty_like(x)
        for part in pieces(flat(x)):
            factor = _combined(torch.mul, factors, part, out[part])
            assert factor is not None
            torch.mul(factor, x[part], out=out[part])
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep x and the factors."""
        FastFunction.keep(ctx, *inputs[: inputs[0].ndim - 1])

    @staticmethod
    def plain(ctx: Any, *inputs: Any) -> tuple[Tensor | None, ...]:
        """The product."""
        y, *factors = inputs
        for factor in factors:
            y = y * factor
        return (y,)

    @staticmethod
    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """∂f_i = Σ over the other axes of g · x · Π_{j≠i} f_j."""
        (given,) = grads
        x, *factors = ctx.saved_tensors
        assert given is not None
        g = laid_out_as(given, x)
        sums: list[list[Tensor]] = [[] for _ in factors]
        first = x[next(pieces(flat(x)))]
        product, weighted = torch.empty_like(first), torch.empty_like(first)
        for part in pieces(flat(x)):
            gx = torch.mul(g[part], x[part], out=product[: part.stop - part.start])
            for i in range(len(factors)):
                others = factors[:i] + factors[i + 1 :]
                t = gx
                for other in others:
                    t = torch.mul(t, other[part], out=weighted[: len(gx)])
                sums[i].append(_sum_but(t, i + 2))
        found = [torch.cat(s).to(f.dtype) for s, f in zip(sums, factors, strict=True)]
        return None, *found, g, *factors


def _sum_but(t: Tensor, axis: int) -> Tensor:
    """Sums over all spatial axes but one, which stay as 1, float32 or wider; t: (b, C, *S) of either layout."""
    axes = [other for other in range(2, t.ndim) if other != axis]
    if not axes:
        return t.to(wide(t), copy=True)
    if not t.is_contiguous():  # torch's reductions walk through memory in the order of the axes
        moved = t.movedim(1, -1)
        return moved.sum([other - 1 for other in axes], keepdim=True, dtype=wide(t)).movedim(-1, 1)
    if axes == [t.ndim - 1] and t.dtype == wide(t):  # short rows: a product with ones is faster than a sum
        return torch.mv(t.view(-1, t.shape[-1]), t.new_ones(t.shape[-1])).view(*t.shape[:-1], 1)
    return t.sum(axes, keepdim=True, dtype=wide(t))


class StripsByKernels(Strips):
    """`Strips` of maps on a GPU: both means from one read; ∂x 1R 1W."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, ...]:
        """As `Strips`; x: (B, C, H, W)."""
        means = gpu.strips.pooled(x)
        return conduit(x, x.shape), *(conduit(x, mean.shape) for mean in means), *means

    @staticmethod
    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """As `Strips`."""
        g, p, q, left, down = grads
        if g is None or p is None or q is None:
            return Strips.gradient(ctx, *grads)
        left = torch.zeros_like(p) if left is None else left
        down = torch.zeros_like(q) if down is None else down
        shifts = (_beside(d.float() / n, g) for d, n in ((left, ctx.shape[3]), (down, ctx.shape[2])))
        return (gpu.strips.ascended(g, p, q, *shifts),)


class ScaleAxesByKernels(ScaleAxes):
    """`ScaleAxes` of maps on a GPU: 1R 1W forward, 2R backward."""

    @staticmethod
    def forward(x: Tensor, *factors_and_conduits: Tensor) -> Tensor:
        """As `ScaleAxes`; x: (B, C, H, W)."""
        return gpu.strips.scaled(x, *factors_and_conduits[:2])

    @staticmethod
    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """As `ScaleAxes`."""
        (g,) = grads
        x, *factors = ctx.saved_tensors
        assert g is not None
        g = laid_out_as(g, x)
        found = gpu.strips.products(g, x, *factors)
        return None, *(d.to(f.dtype) for d, f in zip(found, factors, strict=True)), g, *factors


class DoubleSigmoid(FastFunction):
    """f = 2σ(z), of which only f is kept, as `ScaleAxes` keeps it too; torch would keep σ(z) beside it."""

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        """z → 2σ(z)."""
        return torch.sigmoid(z).mul_(2)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep f."""
        FastFunction.keep(ctx, extra=[output])

    @classmethod
    def differentiate(cls, ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """In f, whose own gradient comes back here."""
        (f,) = ctx.saved_tensors
        assert grads[0] is not None
        return (grads[0] * f * (1 - f / 2),)

    @staticmethod
    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """∂z = g · 2σ(1 − σ) = g · f (1 − f / 2)."""
        return DoubleSigmoid.differentiate(ctx, grads)


def opened(gate: nn.Module, z: Tensor, x: Tensor) -> Tensor:
    """gate(z), laid out as x, so that it need not be copied, and kept, once more."""
    z = _beside(z, x)
    bare = type(gate) is Gate and gate.kind == "sigmoid" and gate.identity and untouched(gate)
    y: Tensor = DoubleSigmoid.apply(z) if bare else gate(z)
    return y


def strips(x: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """x: (B, C, *S) → what `scale` needs, and the means along each axis: (B, C, H, 1), (B, C, 1, W)."""
    with full_precision(x):
        found = (StripsByKernels if gpu.by_kernels() and x.ndim == 4 else Strips).apply(x)
    split = 1 + x.ndim - 2
    return found[:split], list(found[split:])


def scale(x: Tensor, factors: Sequence[Tensor], conduits: Sequence[Tensor]) -> Tensor:
    """x · Π factors in x's dtype, from the means that came with the conduits."""
    form = ScaleAxesByKernels if gpu.by_kernels() and x.ndim == 4 else ScaleAxes
    y: Tensor = form.apply(x, *(_beside(factor.to(x.dtype), x) for factor in factors), *conduits)
    return y


def _beside(t: Tensor, x: Tensor) -> Tensor:
    """t with its channels where x has them: a map and a strip in different layouts are slow to combine."""
    return t.contiguous() if x.is_contiguous() else t.movedim(1, -1).contiguous().movedim(-1, 1)
