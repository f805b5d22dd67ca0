"""Fast forms of DANet's attentions: between positions, block by block, and between channels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from attninject.blocks.precision import full_precision

from .function import FastFunction
from .primitives import by_rows, columns, flat, laid_out_as

_BLOCK = 2**19
"""Logits of one block of queries on a CPU, which the cache should hold."""


class Attend(FastFunction):
    """y = v Pᵀ, P = softmax(qᵀ k), or x + γ v Pᵀ: a block of queries at a time; the backward makes P again."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, x: Tensor | None = None, gamma: Tensor | None = None
    ) -> Tensor:
        """Maps q: (B, d, *S), k: (B, d, *T), v: (B, e, *T), x: (B, e, *S), gamma: (1,) → as x, laid out so or as q."""
        out = _room(v, q) if x is None else x.clone()
        beta, factor = (0, 1.0) if x is None else (1, _number(gamma))
        q, k, v, y = (flat(t).mT for t in (q, k, v, out))  # a row per position, wherever it lies
        for sample, rows in _blocks(q):
            y[sample, rows].addmm_(_softmax(q[sample, rows], k[sample]), v[sample], beta=beta, alpha=factor)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep the three maps and γ, nothing of the matrix, nor of x."""
        q, k, v, x, gamma = inputs
        ctx.onto = x is not None
        FastFunction.keep(ctx, q, k, v, None, gamma)

    @staticmethod
    def plain(ctx: Any, *inputs: Any) -> tuple[Tensor | None, ...]:
        """The formula, with its matrix."""
        q, k, v = (t.flatten(2) for t in inputs[:3])
        y = torch.unflatten(v @ torch.softmax(q.mT @ k, 2).mT, 2, inputs[0].shape[2:])
        return (inputs[4] * y if ctx.onto else y,)

    @classmethod
    def differentiate(cls, ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        """As the base class; x, which the formula only adds, is not kept for it."""
        found = super().differentiate(ctx, grads)
        return *found[:3], grads[0] if ctx.onto else None, found[4]

    @staticmethod
    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """∂P = gᵀ v, ∂γ = Σ P ∂P, ∂l = γ P (∂P − Σ P ∂P), ∂q = k ∂lᵀ, ∂k = q ∂l, ∂v = γ g P, ∂x = g."""
        *maps, _, gamma = ctx.saved_tensors
        assert grads[0] is not None
        found = tuple(_empty(t) for t in maps)
        q, k, v, dq, dk, dv = (flat(t).mT for t in (*maps, *found))
        g = flat(grads[0]).mT  # of any strides: a copy at most
        factor = _number(gamma)
        dgamma = None if gamma is None else torch.zeros_like(gamma)
        for b, rows in _blocks(q):
            p, block = _softmax(q[b, rows], k[b]), g[b, rows]
            beta = 1 if rows.start else 0  # a sample's first block writes, the others add
            dv[b].addmm_(p.T, block, beta=beta, alpha=factor)
            dl = block @ v[b].T
            if dgamma is not None:
                dgamma += torch.dot(p.view(-1), dl.view(-1))
            torch.ops.aten._softmax_backward_data.out(dl, p, 1, p.dtype, grad_input=dl)
            dq[b, rows].addmm_(dl, k[b], beta=0, alpha=factor)
            dk[b].addmm_(dl.T, q[b, rows], beta=beta, alpha=factor)
        return *found, grads[0] if ctx.onto else None, dgamma


def _room(v: Tensor, q: Tensor) -> Tensor:
    """Memory for as many channels as v has, (B, e, *S), at the positions of q: (B, d, *S), and laid out as q."""
    if q.is_contiguous():
        return v.new_empty(v.shape[0], v.shape[1], *q.shape[2:])
    return v.new_empty(v.shape[0], *q.shape[2:], v.shape[1]).movedim(-1, 1)


def _number(gamma: Tensor | None) -> float:
    return 1.0 if gamma is None else gamma.item()


def _empty(t: Tensor) -> Tensor:
    """Memory laid out as t by rows or by columns, so that a flat view can be filled."""
    dense = t.is_contiguous() or t.movedim(1, -1).is_contiguous()
    return torch.empty_like(t) if dense else t.new_empty(t.shape)


def _blocks(q: Tensor) -> Iterator[tuple[int, slice]]:
    step = max(1, _BLOCK // q.shape[1])
    for sample in range(q.shape[0]):
        for start in range(0, q.shape[1], step):
            yield sample, slice(start, start + step)


def _softmax(q: Tensor, k: Tensor) -> Tensor:
    logits = q @ k.T
    return torch.softmax(logits, 1, out=logits)


def attend(
    q: Tensor, k: Tensor, v: Tensor, onto: Tensor | None = None, gamma: Tensor | None = None
) -> Tensor:
    """y_i = Σ_j softmax_j(q_iᵀ k_j) v_j, or `onto` + gamma · y: maps (B, d, *S), (B, d, *T), (B, e, *T), as y."""
    with full_precision(q):
        y: Tensor = Attend.apply(q, k, v, onto, gamma)
        return y


class Mix(FastFunction):
    """y = x + γ A X, A = softmax(± X Xᵀ), X = x with its positions in a row."""

    @staticmethod
    def forward(x: Tensor, gamma: Tensor, sign: float) -> tuple[Tensor, Tensor]:
        """x: (B, C, *S), float32 or wider, gamma: (1,) → y, and A: (B, C, C)."""
        dense = flat(x)
        energy = x.new_empty(x.shape[0], x.shape[1], x.shape[1])
        torch.baddbmm(energy, dense, dense.transpose(1, 2), beta=0, alpha=sign, out=energy)
        a = torch.softmax(energy, 2, out=energy)
        y = torch.empty_like(x)
        _multiply(dense, a, dense, gamma, flat(y))
        return y, a

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep x, γ and A."""
        x, gamma, ctx.sign = inputs
        ctx.mark_non_differentiable(output[1])
        FastFunction.keep(ctx, x, gamma, extra=[output[1]])

    @staticmethod
    def plain(ctx: Any, *inputs: Any) -> tuple[Tensor | None, ...]:
        """The formula."""
        x, gamma = inputs
        dense = x.flatten(2)
        a = torch.softmax(ctx.sign * (dense @ dense.transpose(1, 2)), 2)
        return x + gamma * (a @ dense).view(x.shape), None

    @staticmethod
    def gradient(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """∂A = γ g Xᵀ, ∂E = ± A (∂A − Σ A ∂A), ∂X = g + γ Aᵀ g + (∂E + ∂Eᵀ) X, ∂γ = Σ A ∘ g Xᵀ."""
        given = grads[0]
        x, gamma, a = ctx.saved_tensors
        assert given is not None
        dense, g = flat(x), flat(laid_out_as(given, x))
        da = torch.bmm(g, dense.transpose(1, 2))  # still without γ
        dgamma = torch.dot(a.view(-1), da.view(-1)).to(gamma.dtype).view_as(gamma)
        if not ctx.needs_input_grad[0]:
            return None, dgamma, None
        de = torch.ops.aten._softmax_backward_data.out(da, a, 2, a.dtype, grad_input=da)
        out = torch.empty_like(x)
        y = flat(out)
        _multiply(g, a.transpose(1, 2), g, gamma, y)
        _multiply(y, de + de.transpose(1, 2), dense, ctx.sign * gamma, y)
        return out, dgamma, None


def _multiply(x: Tensor, a: Tensor, z: Tensor, gamma: Tensor, out: Tensor) -> None:
    """out = x + γ a z for maps (B, C, N) of one layout and a: (B, C, C)."""
    if x.device.type == "cpu":
        factor = gamma.item()
    else:  # no waiting for the device
        factor, a = 1, gamma.to(a.dtype) * a
    if by_rows(x):
        torch.baddbmm(x, a, z, alpha=factor, out=out)
    else:
        torch.baddbmm(columns(x), columns(z), a.transpose(1, 2), alpha=factor, out=columns(out))


def mix(x: Tensor, gamma: Tensor, invert: bool) -> Tensor:
    """x + γ softmax(∓X Xᵀ) X for x: (B, C, *S), float32 or wider; the minus if `invert`."""
    with full_precision(x):
        y: Tensor = Mix.apply(x, gamma, -1.0 if invert else 1.0)[0]
        return y
