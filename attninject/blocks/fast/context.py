"""Fast forms of global context: a weighted mean for all positions, scaled or added."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attninject.blocks import gpu
from attninject.blocks.gate import at_least_float32
from attninject.blocks.precision import full_precision

from .function import FastFunction, conduit
from .primitives import channel_dot, flat, laid_out_as, mix_channels, mix_positions, pieces


class Context(FastFunction):
    """x → Σ_j softmax_j(w · x_j + b) x_j, and conduits of g and of the factor."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        """x: (B, C, *S), weight: (1, C, 1, …) → conduits, the context (B, C, 1, …), the weights (B, N)."""
        dense = flat(x)
        weights = _weights(dense, weight, bias)
        context = mix_positions(dense, weights).view(*x.shape[:2], *(1,) * (x.ndim - 2))
        return conduit(x, x.shape), conduit(x, context.shape), context, weights

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep x, w, b and the weights."""
        ctx.mark_non_differentiable(output[3])
        FastFunction.keep(ctx, *inputs, extra=[output[3]])

    @staticmethod
    def plain(ctx: Any, *inputs: Any) -> tuple[Tensor | None, ...]:
        """The same context."""
        x, weight, bias = inputs
        rows = x.flatten(2)
        logits = at_least_float32((rows * weight.to(x.dtype).flatten(2)).sum(1))
        logits = logits if bias is None else logits + bias
        context = (rows * torch.softmax(logits, 1).to(x.dtype).unsqueeze(1)).sum(2)
        return None, None, context.view(*x.shape[:2], *(1,) * (x.ndim - 2)), None

    @staticmethod
    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """∂a = xᵀ ds, ∂l = a (∂a − Σ a ∂a), ∂w = x ∂l, ∂x = g · f + ds aᵀ + w ∂lᵀ."""
        g, f, ds, _ = grads
        x, weight, bias, a = ctx.saved_tensors
        dense = flat(x)
        ds = a.new_zeros(dense.shape[:2]) if ds is None else ds.flatten(1)
        da = mix_channels(dense, ds).to(a.dtype)
        dl = a * (da - (a * da).sum(1, keepdim=True))
        dw = mix_positions(dense, dl).sum(0).to(weight.dtype).view_as(weight)
        db = None if bias is None else dl.sum().to(bias.dtype).view_as(bias)
        out = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        if out is not None:
            y = flat(out)
            rank_one = [(ds, a), (weight.flatten().expand_as(ds), dl)]
            terms = [(u.to(x.dtype).unsqueeze(2), v.to(x.dtype).unsqueeze(1)) for u, v in rank_one]
            g = None if g is None else flat(laid_out_as(g, x))
            for part in pieces(dense):
                source = _scaled(g, f, part, y[part])
                for u, v in terms:
                    source = torch.addcmul(source, u[part], v[part], out=y[part])
        return out, dw, db


class ContextByKernels(Context):
    """`Context` on a GPU: 1R forward; 2R 1W backward, if what is read twice in a row is found in the cache."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        """As `Context`; then the context in float32."""
        a, context = gpu.maps.gathered(x, weight.flatten().to(x.dtype), bias)
        return conduit(x, x.shape), conduit(x, context.shape), context.to(x.dtype, copy=True), a, context

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep x, w, b, the weights, and the context in float32."""
        ctx.mark_non_differentiable(*output[3:])
        FastFunction.keep(ctx, *inputs, extra=output[3:])

    @staticmethod
    def plain(ctx: Any, *inputs: Any) -> tuple[Tensor | None, ...]:
        """The same context."""
        return *Context.plain(ctx, *inputs), None

    @staticmethod
    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """As `Context`."""
        g, f, ds, *_ = grads
        x, weight, bias, a, context = ctx.saved_tensors
        ds = torch.zeros_like(context) if ds is None else ds
        dl, dw = gpu.maps.gathered_back(x, a, context, ds)
        dw = dw.to(weight.dtype).view_as(weight)
        db = None if bias is None else dl.sum().to(bias.dtype).view_as(bias)
        if not ctx.needs_input_grad[0]:
            return None, dw, db
        g = torch.zeros_like(x) if g is None else laid_out_as(g, x)
        return gpu.maps.outer(g, f, None, None, weight.to(x.dtype).flatten(), dl, ds, a), dw, db


def _weights(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x: (B, C, N) → softmax over the positions of w · x + b: (B, N), float32 or wider."""
    logits = at_least_float32(mix_channels(x, weight.flatten().expand(x.shape[:2])))
    return torch.softmax(logits if bias is None else logits + bias.to(logits.dtype), 1)


def _scaled(g: Tensor | None, f: Tensor | None, part: slice, spare: Tensor) -> Tensor:
    """g · f in one piece, in `spare` unless it is g itself; f: (B, C, 1, …), None for 1; zero without g."""
    if g is None:
        return spare.zero_()
    return g[part] if f is None else torch.mul(g[part], f.flatten(2)[part], out=spare)


class Affine(FastFunction):
    """y = x · f + b with a factor and a summand per channel, either of which may be missing."""

    @staticmethod
    def forward(
        x: Tensor, f: Tensor | None, b: Tensor | None, g_conduit: Tensor, f_conduit: Tensor
    ) -> Tensor:
        """x: (B, C, *S), f, b: (B, C, 1, …) of the same dtype → x · f + b."""
        y = x if f is None else x * f
        if b is None:
            return y
        return x + b if f is None else y.add_(b)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep x only where a factor needs it."""
        x, f, b = inputs[:3]
        ctx.summand = b is not None
        FastFunction.keep(ctx, *((None, None) if f is None else (x, f)))

    @classmethod
    def differentiate(cls, ctx: Any, grads: Any) -> tuple[Tensor | None, ...]:
        """By hand, since b is not kept: the formula is linear in it."""
        (g,) = grads
        x, f = ctx.saved_tensors
        axes = tuple(range(2, g.ndim))
        db = g.sum(axes, keepdim=True) if ctx.summand else None
        if f is None:
            return g, None, db, None, None
        return g * f, (g * x).sum(axes, keepdim=True), db, None, None

    @staticmethod
    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """∂f = Σ_n g · x, ∂b = Σ_n g; the rest of ∂x is left to whoever pooled x."""
        (g,) = grads
        x, f = ctx.saved_tensors
        assert g is not None
        axes, df = tuple(range(2, g.ndim)), None
        if f is not None:
            df = channel_dot(flat(laid_out_as(g, x)), flat(x)).to(f.dtype).view_as(f)
        db = g.sum(axes, keepdim=True) if ctx.summand else None
        return None, df, db, g, f


class AffineByKernels(Affine):
    """`Affine` on a GPU: 1R 1W forward, 2R backward; without a factor as it is."""

    @staticmethod
    def forward(
        x: Tensor, f: Tensor | None, b: Tensor | None, g_conduit: Tensor, f_conduit: Tensor
    ) -> Tensor:
        """As `Affine`, rounded once."""
        if f is None:
            return Affine.forward(x, f, b, g_conduit, f_conduit)
        return gpu.maps.ascended(x, None, m=f, base=b)

    @staticmethod
    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """As `Affine`."""
        (g,) = grads
        x, f = ctx.saved_tensors
        assert g is not None
        if f is None:
            return Affine.gradient(ctx, *grads)
        g = laid_out_as(g, x)
        df, _, db = gpu.maps.products(g, x, total=ctx.summand)
        assert df is not None
        return None, df.to(f.dtype), None if db is None else db.to(g.dtype), g, f


def context(x: Tensor, conv: nn.Module) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """x: (B, C, *S) and a 1×1 convolution to one channel → what `affine_of` needs, and the context."""
    with full_precision(x):
        g, f, pooled, *_ = (ContextByKernels if gpu.by_kernels() else Context).apply(
            x, conv.weight, conv.bias
        )
    return (g, f), pooled


def affine_of(x: Tensor, f: Tensor | None, b: Tensor | None, conduits: tuple[Tensor, Tensor]) -> Tensor:
    """x · f + b in x's dtype, from a descriptor that came with the conduits."""
    f, b = (None if t is None else t.to(x.dtype) for t in (f, b))
    y: Tensor = (AffineByKernels if gpu.by_kernels() else Affine).apply(x, f, b, *conduits)
    return y
