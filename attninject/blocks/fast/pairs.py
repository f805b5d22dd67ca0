"""Fast attention between a few positions: several 1×1 convolutions of one map, and the whole softmax at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attninject.blocks.precision import full_precision

from .function import FastFunction
from .primitives import projected, projected_back


def product(a: Tensor, b: Tensor, by_rows: bool) -> Tensor:
    """a b, batches of matrices, lying in memory by rows or by columns."""
    return a @ b if by_rows else (b.mT @ a.mT).mT


def lies_by_rows(t: Tensor) -> bool:
    """Whether a batch of matrices is better read by rows."""
    return t.is_contiguous() or not t.mT.is_contiguous()


class Gather(FastFunction):
    """y = v Pᵀ, P = softmax(scale · qᵀ k) by rows, for maps with their positions in a row."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """q: (B, d, N), k: (B, d, M), v: (B, e, M) → y: (B, e, N), which lies as q, and P: (B, N, M)."""
        p = q.new_empty(q.shape[0], q.shape[2], k.shape[2])
        torch.baddbmm(p, q.mT, k, beta=0, alpha=scale, out=p)
        torch.softmax(p, 2, out=p)
        return product(v, p.mT, lies_by_rows(q)), p

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep the three maps and P."""
        q, k, v, ctx.scale = inputs
        ctx.mark_non_differentiable(output[1])
        FastFunction.keep(ctx, q, k, v, extra=[output[1]])

    @staticmethod
    def plain(ctx: Any, *inputs: Any) -> tuple[Tensor | None, ...]:
        """The formula."""
        q, k, v = inputs
        return v @ torch.softmax(ctx.scale * (q.mT @ k), 2).mT, None

    @staticmethod
    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """∂v = g P, ∂P = gᵀ v, ∂l = P (∂P − Σ P ∂P), ∂q = scale · k ∂lᵀ, ∂k = scale · q ∂l."""
        q, k, v, p = ctx.saved_tensors
        g = grads[0]
        assert g is not None
        dl = torch.bmm(g.mT, v)
        torch.ops.aten._softmax_backward_data.out(dl, p, 2, p.dtype, grad_input=dl)
        if ctx.scale != 1:
            dl.mul_(ctx.scale)
        dq, dk = product(k, dl.mT, lies_by_rows(q)), product(q, dl, lies_by_rows(k))
        return dq, dk, product(g, p, lies_by_rows(v)), None


def gather(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Σ_j softmax_j(scale · q_iᵀ k_j) v_j: (B, d, N), (B, d, M), (B, e, M) → (B, e, N), float32 or wider."""
    with full_precision(q):
        y: Tensor = Gather.apply(q, k, v, scale)[0]
        return y


class Project(FastFunction):
    """W_k x + b_k for several k: one gradient of x, which every product adds to where it lies."""

    @staticmethod
    def forward(x: Tensor, *layers: Tensor | None) -> tuple[Tensor, ...]:
        """x: (B, C, N), then each W: (d, C) and b: (d,) or None in turn → (B, d, N) each, which lie as x."""
        found = []
        for w, b in zip(layers[::2], layers[1::2], strict=True):
            assert w is not None
            found.append(projected(x, w, b))
        return tuple(found)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep x and the weights."""
        FastFunction.keep(ctx, *inputs)

    @staticmethod
    def plain(ctx: Any, *inputs: Any) -> tuple[Tensor | None, ...]:
        """The formula."""
        x, *layers = inputs
        pairs = zip(layers[::2], layers[1::2], strict=True)
        return tuple(w @ x if b is None else w @ x + b.unsqueeze(1) for w, b in pairs)

    @staticmethod
    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """∂x = Σ_k W_kᵀ g_k, ∂W_k = g_k xᵀ over all samples, ∂b_k = Σ g_k."""
        x, *layers = ctx.saved_tensors
        needs = ctx.needs_input_grad
        found: list[Tensor | None] = [None] * (1 + len(layers))
        for k, g in enumerate(grads):
            w = layers[2 * k]
            if g is None:
                continue
            if needs[0]:
                beta, dx = (0, torch.empty_like(x)) if found[0] is None else (1, found[0])
                projected_back(dx, w, g, beta)
                found[0] = dx
            if needs[1 + 2 * k]:
                found[1 + 2 * k] = _to_weight(g, x)
            if needs[2 + 2 * k]:
                found[2 + 2 * k] = g.sum((0, 2))
        return tuple(found)


def _to_weight(g: Tensor, x: Tensor) -> Tensor:
    """g xᵀ, summed over the samples."""
    if not x.is_contiguous():
        return g.mT.reshape(-1, g.shape[1]).T @ x.mT.reshape(-1, x.shape[1])
    out = g[0] @ x[0].T
    for sample in range(1, x.shape[0]):
        out.addmm_(g[sample], x[sample].T)
    return out


def project(x: Tensor, layers: Sequence[nn.Module]) -> list[Tensor]:
    """What each of these 1×1 convolutions makes of the map x: (B, C, *S), float32 or wider → (B, d, *S)."""
    weights: list[Tensor | None] = []
    for layer in layers:
        weights += [layer.weight.flatten(1), layer.bias]  # type: ignore[operator,list-item]
    with full_precision(x):
        return [torch.unflatten(y, 2, x.shape[2:]) for y in Project.apply(x.flatten(2), *weights)]
