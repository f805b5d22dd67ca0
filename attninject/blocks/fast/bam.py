"""The fast form of BAM's x · (1 + σ(c · s)): a gate per channel and position, which is never kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attninject.blocks import gpu
from attninject.blocks.precision import full_precision

from .function import FastFunction, conduit
from .primitives import (
    flat,
    laid_out_as,
    mix_channels,
    mix_positions,
    pieces,
    projected,
    projected_back,
    projected_back_onto,
    room,
    wide,
)


class Branch(FastFunction):
    """x → its means over positions and W x + b, a 1×1 convolution; a conduit of g · factor."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        """x: (B, C, *S), weight: (D, C, 1, …) → conduit, (B, C, 1, …), (B, D, *S)."""
        return conduit(x, x.shape), *_branches(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep x, W and b."""
        FastFunction.keep(ctx, *inputs)

    @staticmethod
    def plain(ctx: Any, *inputs: Any) -> tuple[Tensor | None, ...]:
        """The same two results."""
        return None, *_branches(*inputs)

    @staticmethod
    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """∂x = (g · factor) + Wᵀ ∂z + d_mean / N, summed where g · factor lies; ∂W = ∂z xᵀ."""
        scaled, d_mean, dz = grads
        x, weight, bias = ctx.saved_tensors
        dw, db, out = None, None, None
        if dz is not None:
            masks = [False, ctx.needs_input_grad[1], ctx.needs_input_grad[2]]
            n, sizes = x.ndim - 2, None if bias is None else [len(bias)]
            geometry = ([1] * n, [0] * n, [1] * n, False, [0] * n, 1)
            _, dw, db = torch.ops.aten.convolution_backward(
                dz, x, weight.to(x.dtype), sizes, *geometry, masks
            )
            dw = None if dw is None else dw.to(weight.dtype)
            db = None if db is None or bias is None else db.to(bias.dtype)
        if ctx.needs_input_grad[0]:
            out = torch.zeros_like(x) if scaled is None else scaled
            shift = None if d_mean is None else d_mean / x.shape[2:].numel()
            if dz is not None and shift is not None and not x.is_cpu:  # one pass over the map instead of two
                projected_back_onto(flat(out), weight.to(x.dtype).flatten(1), flat(dz), shift.flatten(1))
                return out, dw, db
            if shift is not None:
                out.add_(shift)
            if dz is not None:
                projected_back(flat(out), weight.to(x.dtype).flatten(1), flat(dz))
        return out, dw, db


def _branches(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    z = projected(flat(x), weight.to(x.dtype).flatten(1), None if bias is None else bias.to(x.dtype))
    return x.mean(tuple(range(2, x.ndim)), keepdim=True), torch.unflatten(z, 2, x.shape[2:])


class Modulate(FastFunction):
    """y = x · (a + k σ(z)), z = c · s or c + s; hands `Branch` the finished g · factor."""

    @staticmethod
    def forward(
        x: Tensor, c: Tensor, s: Tensor, conduit: Tensor, mode: str, constant: float, slope: float
    ) -> Tensor:
        """x: (B, C, *S), c: (B, C, 1, …), s: (B, 1, *S), float32 or wider; a, k → y in x's dtype."""
        out = torch.empty_like(x)
        dense, y, spare = flat(x), flat(out), room(flat(x), wide(x))
        for part in pieces(dense):
            _times(dense[part], _sigmoid(c, s, mode, part, spare), constant, slope, y[part])
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep x and both logits."""
        ctx.mode, ctx.constant, ctx.slope = inputs[4:]
        FastFunction.keep(ctx, *inputs[:3])

    @staticmethod
    def plain(ctx: Any, *inputs: Any) -> tuple[Tensor | None, ...]:
        """The formula."""
        x, c, s = inputs
        z = c * s if ctx.mode == "product" else c + s
        return (x * (ctx.constant + ctx.slope * torch.sigmoid(z)).to(x.dtype),)

    @staticmethod
    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """∂z = g · x · k σ(z)(1 − σ(z)); ∂c and ∂s are its sums, weighted by s and c in the product."""
        (given,) = grads
        x, c, s = ctx.saved_tensors
        assert given is not None
        scaled = torch.empty_like(x)
        dense, g, y = flat(x), flat(laid_out_as(given, x)), flat(scaled)
        gates, logits = room(dense, wide(x)), room(dense, wide(x))
        dc, ds = [], []
        for part in pieces(dense):
            sigma = _sigmoid(c, s, ctx.mode, part, gates)
            dz = torch.mul(g[part], dense[part], out=logits[: len(sigma)])
            torch.ops.aten.sigmoid_backward.grad_input(dz, sigma, grad_input=dz)
            if ctx.mode == "product":
                dc.append(mix_positions(dz, s.flatten(1)[part]))
                ds.append(mix_channels(dz, c.flatten(1)[part]))
            else:
                dc.append(dz.sum(2))
                ds.append(dz.sum(1))
            _times(g[part], sigma, ctx.constant, ctx.slope, y[part])
        dc, ds = (ctx.slope * torch.cat(t) for t in (dc, ds))
        return None, dc.view_as(c), ds.view_as(s), scaled, None, None, None


class ModulateByKernels(Modulate):
    """`Modulate` on a GPU: 1R 1W forward, 2R 1W backward."""

    @staticmethod
    def forward(
        x: Tensor, c: Tensor, s: Tensor, conduit: Tensor, mode: str, constant: float, slope: float
    ) -> Tensor:
        """As `Modulate`."""
        return gpu.maps.modulated(x, c, s, mode == "product", constant, slope)

    @staticmethod
    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """As `Modulate`."""
        (g,) = grads
        x, c, s = ctx.saved_tensors
        assert g is not None
        g, product = laid_out_as(g, x), ctx.mode == "product"
        scaled, dc, ds = gpu.maps.modulated_back(g, x, c, s, product, ctx.constant, ctx.slope)
        return None, dc.to(c.dtype), ds.to(s.dtype), scaled, None, None, None


def _sigmoid(c: Tensor, s: Tensor, mode: str, part: slice, spare: Tensor) -> Tensor:
    """σ of the logits of a piece, in `spare`."""
    out = spare[: part.stop - part.start]
    combine = torch.mul if mode == "product" else torch.add
    return combine(c.flatten(2)[part], s.flatten(2)[part], out=out).sigmoid_()


def _times(x: Tensor, sigma: Tensor, constant: float, slope: float, out: Tensor) -> None:
    """out = x · (a + k σ), a being 1 or 0; `sigma` is written on. Exactly x where a = 0, k = 2 and σ = 1/2."""
    if constant:
        torch.addcmul(x, x, sigma.to(x.dtype), value=slope, out=out)
    else:
        torch.mul(x, sigma.mul_(slope).to(x.dtype), out=out)


def branch(x: Tensor, conv: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """x: (B, C, *S) and a 1×1 convolution → what `modulate` needs, the means, the convolution's result."""
    with full_precision(x):
        found: tuple[Tensor, Tensor, Tensor] = Branch.apply(x, conv.weight, conv.bias)
        return found


def modulate(x: Tensor, c: Tensor, s: Tensor, conduit: Tensor, mode: str, identity: bool) -> Tensor:
    """x · (1 + σ(z)), or x · 2σ(z) under `identity`; z = c · s (`product`) or c + s (`sum`)."""
    constant, slope = (0.0, 2.0) if identity else (1.0, 1.0)
    y: Tensor = (ModulateByKernels if gpu.by_kernels() else Modulate).apply(
        x, c, s, conduit, mode, constant, slope
    )
    return y
