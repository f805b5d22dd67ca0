"""The operations on whole maps that the fast forms are made of: sums, scaling, pieces that fit the cache.

Maps are `(B, C, N)` views of `(B, C, *S)`, N the number of positions, and lie in memory either by rows
(contiguous: a channel's positions side by side) or by columns (channels_last: a position's channels side by
side). Every function here takes both and is told by the strides which it has.

Two of torch's batch-norm kernels are the fastest of their kind on a CPU, for maps that lie by rows. In
evaluation with mean 0, variance 1 and ε = 0, the gradient of a batch norm's weight is the sum of g · x over
everything but the channel, in one pass and without a product in memory; and the norm itself is x · w + b.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from attninject.blocks.precision import MANY

_aten: Any = torch.ops.aten
_PIECE = 2**19
"""Elements of one piece on a CPU: a few of them together stay in a core's second-level cache."""
_PIECES_ON_CUDA = 4


def flat(x: Tensor) -> Tensor:
    """(B, C, *S) → (B, C, N), a view of a map of either layout."""
    return x.flatten(2)


def by_rows(x: Tensor) -> bool:
    """Whether a map (B, C, N) lies by rows; else it lies by columns."""
    return x.is_contiguous()


def columns(x: Tensor) -> Tensor:
    """A map (B, C, N) that lies by columns, as the contiguous (B, N, C)."""
    return x.transpose(1, 2)


def laid_out_as(g: Tensor, x: Tensor) -> Tensor:
    """g with the dtype and memory layout of x, both (B, C, *S): g itself, or a copy."""
    if g.dtype == x.dtype and (
        g.is_contiguous() if x.is_contiguous() else g.movedim(1, -1).is_contiguous()
    ):  # not by comparing strides: those of sides of length 1 say nothing
        return g
    return torch.empty_like(x).copy_(g)


def pieces(x: Tensor) -> Iterator[slice]:
    """Ranges of samples of a map (B, C, N), each small enough that several passes find it in the cache.

    On a GPU, where every operation costs a launch, a few large ranges, which only bound the memory.
    """
    samples, on_gpu = x.shape[0], x.device.type == "cuda"
    step = -(-samples // _PIECES_ON_CUDA) if on_gpu else max(1, _PIECE // (x.shape[1] * x.shape[2]))
    for start in range(0, samples, step):
        yield slice(start, min(start + step, samples))


def room(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised memory for the largest of `pieces(x)`, laid out as x; take `[: n]` of it for n samples."""
    first = next(pieces(x))
    return torch.empty_like(x[first], dtype=dtype)


def wide(x: Tensor) -> torch.dtype:
    """The dtype in which sums over a map of x's dtype are kept."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def channel_dot(g: Tensor, x: Tensor) -> Tensor:
    """Σ_n g · x: two maps (B, C, N) → (B, C), float32 or wider."""
    b, c, n = x.shape
    if by_rows(x) and x.is_cpu:
        return _dot(g.view(1, b * c, n), x.view(1, b * c, n)).view(b, c)
    return products(g, x, (2,))[0]


def position_dot(g: Tensor, x: Tensor) -> Tensor:
    """Σ_c g · x: two maps (B, C, N) → (B, N), float32 or wider."""
    return products(g, x, (1,))[0]


def products(g: Tensor, x: Tensor, axes: Sequence[int]) -> list[Tensor]:
    """The sums of g · x over each of some axes, 1 or 2: two maps (B, C, N) → (B, N) or (B, C)."""
    spare = room(x)
    sums: list[list[Tensor]] = [[] for _ in axes]
    for part in pieces(x):
        product = torch.mul(g[part], x[part], out=spare[: part.stop - part.start])
        for found, axis in zip(sums, axes, strict=True):
            found.append(product.sum(axis, dtype=wide(x)))
    return [torch.cat(found) for found in sums]


def _dot(g: Tensor, x: Tensor) -> Tensor:
    """Σ g · x over all axes but axis 1."""
    one = torch.ones(x.shape[1], dtype=wide(x), device=x.device)
    zero = torch.zeros_like(one)
    wanted = [False, True, False]
    found: tuple[Tensor, ...] = _aten.native_batch_norm_backward(
        g, x, one, zero, one, None, None, False, 0.0, wanted
    )
    return found[1]


def mix_channels(x: Tensor, v: Tensor) -> Tensor:
    """Σ_c v_c x_c: a map (B, C, N) and weights (B, C) → (B, N) in x's dtype."""
    v = v.to(x.dtype)
    if by_rows(x):
        return torch.bmm(v.unsqueeze(1), x).squeeze(1)
    return torch.bmm(columns(x), v.unsqueeze(1).mT).squeeze(2)  # strides that BLAS takes for a vector


def mix_positions(x: Tensor, w: Tensor) -> Tensor:
    """Σ_n w_n x_n: a map (B, C, N) and weights (B, N) → (B, C) in x's dtype; see `attend.means`."""
    if x.dtype == torch.float16 and x.shape[2] >= MANY:
        return torch.cat([mix_positions(x[p].float(), w[p]) for p in pieces(x)]).to(x.dtype)
    w = w.to(x.dtype)
    if by_rows(x):
        return torch.bmm(x, w.unsqueeze(1).mT).squeeze(2)
    return torch.bmm(w.unsqueeze(1), columns(x)).squeeze(1)


def projected(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """W x + b, a 1×1 convolution: a map (B, C, N), w: (D, C), b: (D,) → (B, D, N), which lies as x."""
    if by_rows(x):
        y = torch.bmm(w.expand(x.shape[0], -1, -1), x)
        return y if b is None else y.add_(b.unsqueeze(1))
    dense = x.mT.reshape(-1, x.shape[1])
    y = dense @ w.T if b is None else torch.addmm(b, dense, w.T)
    return y.view(x.shape[0], -1, w.shape[0]).mT


def projected_back(out: Tensor, w: Tensor, g: Tensor, beta: int = 1) -> None:
    """out = β · out + Wᵀ g, the gradient of `projected`: maps out: (B, C, N), g: (B, D, N), w: (D, C)."""
    if by_rows(out):
        out.baddbmm_(w.T.expand(out.shape[0], -1, -1), g, beta=beta)
    else:
        out.mT.view(-1, out.shape[1]).addmm_(g.mT.reshape(-1, w.shape[0]), w, beta=beta)


def projected_back_onto(out: Tensor, w: Tensor, g: Tensor, shift: Tensor) -> None:
    """out += Wᵀ g + shift, shift: (B, C), as one product: W has a row more in each sample, g a channel of ones."""
    rows = torch.cat([w.expand(len(g), -1, -1), shift.to(w.dtype).unsqueeze(1)], 1)
    more = torch.cat([g, torch.ones_like(g[:, :1])], 1)
    if by_rows(out):
        out.baddbmm_(rows.mT, more)
    else:
        out.mT.baddbmm_(more.mT, rows)


def affine(g: Tensor, f: Tensor, d: Tensor, out: Tensor) -> None:
    """out = g · f + d, per channel: maps (B, C, N), f and d: (B, C)."""
    b, c, n = g.shape
    if by_rows(g) and g.is_cpu:
        f, d = (t.to(wide(g)).reshape(b * c) for t in (f, d))
        one = torch.ones(b * c, dtype=f.dtype, device=g.device)
        empty = one.new_empty(0)
        _aten.native_batch_norm.out(
            g.view(1, b * c, n), f, d, torch.zeros_like(one), one, False, 0.0, 0.0,
            out=out.view(1, b * c, n), save_mean=empty, save_invstd=torch.empty_like(empty),
        )  # fmt: skip
    else:
        f, d = (t.to(g.dtype).unsqueeze(2) for t in (f, d))
        torch.addcmul(d, g, f, out=out)


def maxima_shares(x: Tensor, largest: Tensor, d: Tensor, axis: int, out: Tensor) -> Tensor:
    """Where maxima were taken, as a mask, and what each tied element gets of their gradient.

    x: a map (B, C, N), `largest` its maxima over `axis` (kept as 1), d their gradient, the same shape. Fills
    `out` with 1 where x is the maximum and 0 elsewhere; returns d over the number of ones, so that the
    gradient is divided evenly among ties, as torch's `amax` does.
    """
    torch.eq(x, largest, out=out)
    return d / out.sum(axis, keepdim=True, dtype=wide(x)).to(d.dtype)
