"""Attention between positions in memory linear in their number, and its matrix where somebody asks for it.

torch's fused attention never forms the N×N matrix, neither forward nor backward, but only where queries, keys
and values have equal head sizes and contiguous last dimensions; else it silently takes the quadratic path.
The functions here see to both. Not linear: second derivatives and forward mode, which have the matrix.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attninject.errors import TooFewChannelsError

from .base import Block, static_shape
from .fused import attention, softmax_rows
from .gate import at_least_float32
from .precision import MANY, full_precision, product


def rows(t: Tensor) -> Tensor:
    """(B, d, *S) → (B, N, d), one contiguous row per position."""
    return t.flatten(2).transpose(1, 2).contiguous()


def unrows(t: Tensor, like: Tensor) -> Tensor:
    """(B, N, d) → (B, d, *S), the positions of `like`: (B, C, *S)."""
    return torch.unflatten(t.transpose(1, 2), 2, like.shape[2:])


def split_heads(t: Tensor, heads: int) -> Tensor:
    """(B, N, heads · d) → (B, heads, N, d)."""
    return torch.unflatten(t, 2, (heads, -1)).transpose(1, 2)


def merge_heads(t: Tensor) -> Tensor:
    """(B, heads, N, d) → (B, N, heads · d)."""
    return t.transpose(1, 2).flatten(2)


def head_width(block: str, channels: int, heads: int) -> int:
    """channels / heads, which must be a whole number."""
    if channels % heads:
        fits = ", ".join(str(h) for h in range(1, min(channels, 64) + 1) if channels % h == 0)
        raise TooFewChannelsError(
            f"block {block!r}: {channels} channels cannot be split into {heads} heads of equal size; "
            f"choose num_heads among {fits}"
        )
    return channels // heads


WIDEST = 256
"""The largest head that torch's flash kernels take, which are for half precision on a GPU."""


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """softmax(scale · q kᵀ) v, fused. q: (B, h, N, d), k: (B, h, M, d), v: (B, h, M, e) → (B, h, N, e).

    The narrower of d and e is filled up with zeros, which change neither a logit nor another column. Where the flash
    kernels would serve but for the width of v, `in_pieces` lets them.
    `mask`: boolean, broadcastable to (B, h, N, M); True where a key takes part.
    """
    q, k = bounded(q, scale), bounded(k, scale)
    width = static_shape(v)[3]
    if mask is None and only_too_wide(q, v):
        return in_pieces(q, k, v, scale)
    missing = width - static_shape(q)[3]
    if missing > 0:
        q, k = F.pad(q, (0, missing)), F.pad(k, (0, missing))
    elif missing < 0:
        v = F.pad(v, (0, -missing))
    y = attention(q, k, v, scale, mask)
    return y.narrow(3, 0, width) if missing < 0 else y


def only_too_wide(q: Tensor, v: Tensor, widest: int = WIDEST) -> bool:
    """Whether the flash kernels would take one head of q and v, were v not wider than the widest (a default, since
    TorchScript knows no global names).
    """
    half = v.dtype == torch.float16 or v.dtype == torch.bfloat16
    one = v.is_cuda and half and static_shape(v)[1] == 1
    return one and static_shape(q)[3] <= widest < static_shape(v)[3]


def in_pieces(q: Tensor, k: Tensor, v: Tensor, scale: float, widest: int = WIDEST) -> Tensor:
    """`attend` of one head: the columns of v as heads of at most the widest, which share q and k."""
    width = static_shape(v)[3]
    pieces = -(-width // widest)
    size = max(-(-width // pieces), static_shape(q)[3])
    pieces = -(-width // size)
    v = split_heads(F.pad(v.squeeze(1), (0, pieces * size - width)), pieces)
    missing = size - static_shape(q)[3]
    q, k = (
        F.pad(q, (0, missing)).expand(-1, pieces, -1, -1),
        F.pad(k, (0, missing)).expand(-1, pieces, -1, -1),
    )
    return merge_heads(attention(q, k, v, scale, None)).narrow(2, 0, width).unsqueeze(1)


def bounded(t: Tensor, scale: float) -> Tensor:
    """Queries or keys (…, d) of half precision, each number cut so that no logit exceeds 2²⁴.

    The fused backward recomputes the logits in float32. Beyond 2²⁴ their rounding errors reach the range of
    exp, and a probability of infinity times a zero gradient is NaN. Such logits make a softmax a mere argmax,
    and float16 reaches them: its inputs of 10⁴ give 10⁸ · d.
    """
    if t.dtype not in (torch.float16, torch.bfloat16):
        return t
    limit = 2**12 / (static_shape(t)[-1] * scale) ** 0.5
    return t.clamp(-limit, limit)


def attention_rows(q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """softmax(scale · q kᵀ): q: (…, N, d), k: (…, M, d) → (…, N, M), float32 or wider. Quadratic memory."""
    return softmax_rows(bounded(q, scale), bounded(k, scale), scale, mask)


def means(x: Tensor, weights: Tensor, many: int = MANY) -> Tensor:
    """Σ_n w_kn x_cn: x: (B, C, N), weights: (B, K, N) that sum to 1, float32 or wider → (B, C, K) in x's dtype.

    Weights are about 1 / N, and float16 has no numbers between the multiples of 2⁻²⁴: sums over many positions, which
    would be wrong by percents and be 0 in the end, are formed in float32.
    """
    few = x.dtype == torch.float16 and not exporting() and static_shape(x)[2] < many
    if few or x.dtype == torch.bfloat16:
        return x @ weights.to(x.dtype).transpose(1, 2)
    return product(at_least_float32(x), weights.transpose(1, 2)).to(x.dtype)


def saturated(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t in `dtype`; what is too large for it becomes its largest number instead of infinity."""
    if dtype not in (torch.float16, torch.bfloat16) or t.dtype == dtype:
        return t.to(dtype)
    limit = 65504.0 if dtype == torch.float16 else 3.3895313892515355e38
    return t.clamp(-limit, limit).to(dtype)


def wide(layer: nn.Linear, t: Tensor) -> Tensor:
    """A linear layer in float32, whatever its weights' dtype: t: (B, N, e), float32 or wider → (B, N, d)."""
    with full_precision(t):
        return layer(t) if layer.weight.dtype == t.dtype else linear(t, layer.weight, layer.bias)


def project(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, t: Tensor, like: Tensor) -> Tensor:
    """A 1×1 convolution in float32, whatever its weights' dtype: t: (B, N, d), float32 → (B, C, *S).

    For rows that half precision might not hold; the result is saturated to the dtype of `like`.
    """
    with full_precision(t):
        same = layer.weight.dtype == t.dtype
        y = layer(unrows(t, like)) if same else unrows(linear(t, layer.weight, layer.bias), like)
    return saturated(y, like.dtype)


def linear(t: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer or 1×1 convolution of rows in their own dtype: t: (B, N, e) → (B, N, d)."""
    return F.linear(t, weight.flatten(1).to(t.dtype), None if bias is None else bias.to(t.dtype))


def relu_of_sums(a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    """Σ_j relu(a_i + b_j) g_j: a: (B, N), b: (B, M), g: (B, M, d) → (B, N, d).

    In O(N log N) and linear memory. Pair (i, j) counts where b_j > −a_i, so with b in falling order the j of
    each i are a prefix, whose sums of g_j and b_j g_j are read off cumulative sums: a_i Σ g_j + Σ b_j g_j.
    The gradient follows by itself, because within a small step no pair changes sides. b is centred first: a
    large common part of a and b would cancel between the two sums and take the digits with it.
    """
    center = b.detach().mean(1, keepdim=True)
    a, b = a + center, b - center
    b, order = b.sort(dim=1, descending=True)
    g = g.gather(1, order.unsqueeze(2).expand_as(g))
    count = torch.searchsorted(-b.detach(), a.detach().contiguous())  # of j with b_j > −a_i
    index = count.unsqueeze(2).expand(-1, -1, g.shape[2])
    return a.unsqueeze(2) * _sums(g, index) + _sums(b.unsqueeze(2) * g, index)


def _sums(t: Tensor, count: Tensor) -> Tensor:
    """Of the first `count` rows: t: (B, M, d), count: (B, N, d) → (B, N, d)."""
    return F.pad(t.cumsum(1), (0, 0, 1, 0)).gather(1, count)


def exporting() -> bool:
    """Whether torch.export is at work; where torch cannot tell it from compiling, whether that is."""
    if torch.jit.is_scripting():
        return False
    known = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
    return bool(known())


class Additive(Block):
    """A block that adds what it gathers from other positions: x + branch(x).

    Under `residual=False` it is the branch alone, which only blending can start as the identity.
    """

    def needs_blend(self) -> bool:
        """Without a residual no layer's zero gives x."""
        return not self.residual

    def branch(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → what is added, the same shape."""
        raise NotImplementedError

    def transform(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → the same shape."""
        y = self.branch(x).to(x.dtype)
        if self.residual:
            return x + y
        return torch.empty_like(x).copy_(y)  # in the memory format of x
