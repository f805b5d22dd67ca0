"""The fast form of scSE: one factor per channel and one per position, added."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attninject.blocks import gpu
from attninject.blocks.precision import full_precision

from .function import FastFunction, conduit
from .primitives import flat, laid_out_as, mix_channels, mix_positions, pieces, products, room, wide


class SqueezeProject(FastFunction):
    """x → its means over positions, w · x + b at each position, and conduits of g, c and s."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        """x: (B, C, *S), weight: (1, C, 1, …) → three conduits, (B, C, 1, …) and (B, 1, *S)."""
        mean = x.mean(tuple(range(2, x.ndim)), keepdim=True)
        z = mix_channels(flat(x), weight.flatten().expand(x.shape[:2])).view(x.shape[0], 1, *x.shape[2:])
        z = z if bias is None else z + bias.to(z.dtype)
        return conduit(x, x.shape), conduit(x, mean.shape), conduit(x, z.shape), mean, z

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep x, w and b."""
        FastFunction.keep(ctx, *inputs)

    @staticmethod
    def plain(ctx: Any, *inputs: Any) -> tuple[Tensor | None, ...]:
        """The same two descriptors."""
        x, weight, bias = inputs
        z = (x * weight.to(x.dtype)).sum(1, keepdim=True)
        z = z if bias is None else z + bias.to(z.dtype)
        return None, None, None, x.mean(tuple(range(2, x.ndim)), keepdim=True), z

    @staticmethod
    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """∂x = g · (c + s) + d_mean / N + w ∂zᵀ, ∂w = x ∂z."""
        g, c, s, d_mean, dz = grads
        x, weight, bias = ctx.saved_tensors
        dense, out = flat(x), None
        dw, db = _to_layer(x, weight, bias, dz)
        if ctx.needs_input_grad[0]:
            out = torch.empty_like(x)
            g = None if g is None else flat(laid_out_as(g, x))
            for part in pieces(dense):
                y = flat(out)[part]
                if g is None or c is None or s is None:
                    y.zero_()
                else:
                    torch.add(c.flatten(2)[part], s.flatten(2)[part], out=y).mul_(g[part])
                if dz is not None:
                    y.addcmul_(weight.to(x.dtype).flatten(2), dz.flatten(2)[part])
                if d_mean is not None:
                    y.add_(d_mean.flatten(2)[part] / dense.shape[2])
        return out, dw, db


def _to_layer(
    x: Tensor, weight: Tensor, bias: Tensor | None, dz: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of weight and bias of z = w · x + b. 1R."""
    if dz is None:
        return None, None
    dw = mix_positions(flat(x), dz.flatten(1)).sum(0).to(weight.dtype).view_as(weight)
    return dw, None if bias is None else dz.sum(dtype=wide(dz)).to(bias.dtype).view_as(bias)


class SqueezeProjectByKernels(SqueezeProject):
    """`SqueezeProject` on a GPU: 1R forward; ∂x 1R 1W."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        """As `SqueezeProject`."""
        mean, z = gpu.maps.mean_and_mixture(x, weight.flatten().to(x.dtype))
        z = z if bias is None else z + bias.to(z.dtype)
        return conduit(x, x.shape), conduit(x, mean.shape), conduit(x, z.shape), mean, z

    @staticmethod
    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """As `SqueezeProject`."""
        g, c, s, d_mean, dz = grads
        x, weight, bias = ctx.saved_tensors
        if g is None or dz is None or not ctx.needs_input_grad[0]:
            return SqueezeProject.gradient(ctx, *grads)
        base = None if d_mean is None else d_mean.float() / x.shape[2:].numel()
        out = gpu.maps.outer(laid_out_as(g, x), c, s, base, weight.to(x.dtype).flatten(), dz)
        return out, *_to_layer(x, weight, bias, dz)


class ScaleBySum(FastFunction):
    """y = x · (c + s); tells `SqueezeProject` what g, c and s are."""

    @staticmethod
    def forward(x: Tensor, c: Tensor, s: Tensor, *conduits: Tensor) -> Tensor:
        """x: (B, C, *S), c: (B, C, 1, …), s: (B, 1, *S), float32 or wider → y in x's dtype."""
        out = torch.empty_like(x)
        spare = room(flat(x), wide(x))
        for part in pieces(flat(x)):
            factor = spare[: part.stop - part.start]
            torch.add(c.flatten(2)[part], s.flatten(2)[part], out=factor)
            torch.mul(flat(x)[part], factor.to(x.dtype), out=flat(out)[part])
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep the three factors."""
        FastFunction.keep(ctx, *inputs[:3])

    @staticmethod
    def plain(ctx: Any, *inputs: Any) -> tuple[Tensor | None, ...]:
        """The formula."""
        x, c, s = inputs
        return (x * (c + s).to(x.dtype),)

    @staticmethod
    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """∂c = Σ_n g · x, ∂s = Σ_c g · x."""
        (given,) = grads
        x, c, s = ctx.saved_tensors
        assert given is not None
        given = laid_out_as(given, x)
        g, dense = flat(given), flat(x)
        dc, ds = products(g, dense, (2, 1))
        return None, dc.to(c.dtype).view_as(c), ds.to(s.dtype).view_as(s), given, c.to(x.dtype), s.to(x.dtype)


class ScaleBySumByKernels(ScaleBySum):
    """`ScaleBySum` on a GPU: 1R 1W forward, 2R backward."""

    @staticmethod
    def forward(x: Tensor, c: Tensor, s: Tensor, *conduits: Tensor) -> Tensor:
        """As `ScaleBySum`."""
        return gpu.maps.scaled(x, c, s, summed=True)

    @staticmethod
    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """As `ScaleBySum`."""
        (g,) = grads
        x, c, s = ctx.saved_tensors
        assert g is not None
        g = laid_out_as(g, x)
        dc, ds, _ = gpu.maps.products(g, x, across=True)
        assert dc is not None and ds is not None  # noqa: PT018
        return None, dc.to(c.dtype), ds.to(s.dtype), g, c.to(x.dtype), s.to(x.dtype)


Three = tuple[Tensor, Tensor, Tensor]


def squeeze_project(x: Tensor, conv: nn.Module) -> tuple[Three, tuple[Tensor, Tensor]]:
    """x: (B, C, *S) and a 1×1 convolution to one channel → conduits; means and the convolution's result."""
    with full_precision(x):
        g, c, s, mean, z = (SqueezeProjectByKernels if gpu.by_kernels() else SqueezeProject).apply(
            x, conv.weight, conv.bias
        )
    return (g, c, s), (mean, z)


def scale_by_sum(x: Tensor, c: Tensor, s: Tensor, conduits: Three) -> Tensor:
    """x · (c + s) in x's dtype."""
    y: Tensor = (ScaleBySumByKernels if gpu.by_kernels() else ScaleBySum).apply(x, c, s, *conduits)
    return y
