"""Attention of Twins: within windows, and from every position to a sub-sampled map."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attend import (
    Additive,
    attend,
    attention_rows,
    exporting,
    head_width,
    merge_heads,
    rows,
    split_heads,
    unrows,
)
from .base import CONV, Block, Facts, static_shape
from .gate import zero
from .options import Init, Int, given


class TwinsAttention(Additive):
    """Shared by both halves: normalise, attend with heads, mix, add."""

    if TYPE_CHECKING:
        proj: nn.Linear
        pre_norm: nn.LayerNorm | None

    def build(self, num_heads: int, norm: bool) -> None:
        """Make what both have: the norm in front and the output layer."""
        self.num_heads = num_heads
        self.scale = head_width(self.facts.name, self.channels, num_heads) ** -0.5
        self.pre_norm = nn.LayerNorm(self.channels) if norm else None
        self.proj = nn.Linear(self.channels, self.channels)

    def init_identity(self) -> None:
        """Zero the output layer."""
        zero(self.proj)

    def init_paper(self) -> None:
        """The released code's: linear weights of deviation 0.02, convolutions He by fan-out, zero biases."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
            elif isinstance(layer, CONV[self.dims]):
                deviation = math.sqrt(2 / layer.weight[0, 0].numel() / layer.out_channels)
                nn.init.normal_(layer.weight, std=deviation)
            else:
                continue
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def channels_last(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → (B, *S, C), normalised; in the dtype of x, which a norm under autocast leaves."""
        t = x.movedim(1, -1)
        return t if self.pre_norm is None else self.pre_norm(t).to(x.dtype)

    def heads(self, t: Tensor) -> Tensor:
        """(B, N, C) → (B, h, N, d)."""
        return split_heads(t, self.num_heads)


class TwinsLSA(TwinsAttention):
    """Locally-grouped self-attention: x + W [heads of softmax(Q Kᵀ / √d) V within each window].

    arXiv:2104.13840, section 3.2, eq. 4 (first line): x + LSA(LayerNorm(x)). Windows of `window_size` a side
    tile the map from its first corner. Options: `window_size`, `num_heads` (must divide C), `norm` (the
    LayerNorm), `residual`, `bias` of queries, keys and values.

    Where the window does not divide a side, the last ones hold fewer positions: they are filled up, and the
    filling is masked, so no position gives weight to anything outside the map. Memory is linear in the
    positions.

    Deviations: the released code (and timm's `LocallyGroupedAttn`, which is `residual=False, norm=False,
    init="paper"`, key by key) lets the filling take part in the softmax, so the two agree where the window
    divides the map. The paper's block goes on with an MLP, which is no attention.
    """

    facts = Facts(
        "twins_lsa", family="global", spatial=True, paper="arXiv:2104.13840", equation="4",
        summary="Twins' local half: multi-head attention within windows of any map size",
    )  # fmt: skip

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        window_size: Annotated[int, Int(min=1)] = 7,
        num_heads: Annotated[int, Int(min=1)] = 8,
        norm: bool = True,
        residual: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__(**given(locals()))
        self.build(num_heads, norm)
        self.window_size = window_size
        self.qkv = nn.Linear(channels, 3 * channels, bias=bias)
        self.initialise()

    def windows(self, x: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """x: (B, C, *S) → queries, keys, values: (B · W, h, L, d), L positions in each of W windows; a mask.

        The mask is (B · W, 1, 1, L), True inside the map; None where the windows fit.
        """
        t = self.channels_last(x)
        qkv = self.qkv(partition(t, self.window_size)).chunk(3, 2)
        inside: Tensor | None = None
        if may_miss(static_shape(x)[2:], self.window_size):
            ones = torch.ones_like(t[:1, ..., :1], dtype=torch.bool).expand(list(t.shape[:-1]) + [1])  # noqa: RUF005
            inside = partition(ones, self.window_size).transpose(1, 2).unsqueeze(1)
        return [self.heads(part) for part in qkv], inside

    def branch(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → the attended values, the same shape."""
        qkv, inside = self.windows(x)
        q, k, v = qkv
        return self.mix(attend(q, k, v, self.scale, inside), x)

    def mix(self, heads: Tensor, x: Tensor) -> Tensor:
        """Windows' heads (B · W, h, L, d) → W of them at their places in x: (B, C, *S)."""
        return assemble(self.proj(merge_heads(heads)), x, self.window_size)

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """x: (B, C, *S) → `rows`: (B, W, h, L, L), per window and head; 0 outside the map."""
        (q, k, _), inside = self.windows(x)
        weights = attention_rows(q, k, self.scale, inside)
        windows = math.prod(-(-n // self.window_size) for n in static_shape(x)[2:])
        return {"rows": torch.unflatten(weights, 0, (x.shape[0], windows)).to(x.dtype)}


class TwinsGSA(TwinsAttention):
    """Global sub-sampled attention: x + W [heads of softmax(Q Kᵀ / √d) V], K and V from a coarser map.

    arXiv:2104.13840, section 3.2, eq. 4 (third line): x + GSA(LayerNorm(x)); keys and values are linear in
    LayerNorm(convolution of kernel and stride `sr_ratio`). Options: `sr_ratio` (1: none, plain multi-head
    attention), `num_heads` (must divide C), `norm` (the LayerNorm in front), `residual`, `bias` of queries,
    keys and values.

    Where `sr_ratio` does not divide a side, zeros fill the last cell, so every position is summarised and
    any size ≥ 1 works. Memory is linear in the positions.

    Deviations: the released code drops the positions of a last, incomplete cell. timm's
    `GlobalSubSampleAttn` is `residual=False, norm=False, init="paper"`, key by key. The paper's block goes
    on with an MLP, which is no attention.
    """

    facts = Facts(
        "twins_gsa", family="global", spatial=True, paper="arXiv:2104.13840", equation="4",
        summary="Twins' global half: attention from every position to a sub-sampled map",
    )  # fmt: skip

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        sr_ratio: Annotated[int, Int(min=1)] = 4,
        num_heads: Annotated[int, Int(min=1)] = 8,
        norm: bool = True,
        residual: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__(**given(locals()))
        self.build(num_heads, norm)
        self.sr_ratio = sr_ratio
        self.q = nn.Linear(channels, channels, bias=bias)
        self.kv = nn.Linear(channels, 2 * channels, bias=bias)
        self.sr = CONV[dims](channels, channels, sr_ratio, stride=sr_ratio) if sr_ratio > 1 else None
        self.norm = nn.LayerNorm(channels) if sr_ratio > 1 else None
        self.initialise()

    def match(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: (B, C, *S) → queries (B, h, N, d), keys and values (B, h, M, d)."""
        t = self.channels_last(x)
        coarse = t.flatten(1, -2)
        q = self.heads(self.q(coarse))
        if self.sr is not None and self.norm is not None:
            coarse = self.norm(rows(self.sr(filled(t, self.sr_ratio).movedim(-1, 1))))
        k, v = self.kv(coarse).chunk(2, 2)
        return q, self.heads(k), self.heads(v)

    def branch(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → the attended values, the same shape."""
        q, k, v = self.match(x)
        return unrows(self.proj(merge_heads(attend(q, k, v, self.scale))), x)

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """x: (B, C, *S) → `rows`: (B, h, N, M), per head, over the M cells; they sum to 1."""
        q, k, _ = self.match(x)
        return {"rows": attention_rows(q, k, self.scale).to(x.dtype)}


class Twins(Block):
    """Twins-SVT's pair: y = x + LSA(LayerNorm(x)), then y + GSA(LayerNorm(y)).

    arXiv:2104.13840, eq. 4, first and third line. Options: those of `TwinsLSA` and `TwinsGSA`, the shared
    ones for both halves.

    Deviations: those of the halves; the paper has an MLP behind each.
    """

    facts = Facts(
        "twins", family="global", spatial=True, paper="arXiv:2104.13840", equation="4",
        summary="Twins' pair: windows, then the sub-sampled map",
    )  # fmt: skip

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        window_size: Annotated[int, Int(min=1)] = 7,
        sr_ratio: Annotated[int, Int(min=1)] = 4,
        num_heads: Annotated[int, Int(min=1)] = 8,
        norm: bool = True,
        residual: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__(**given(locals()))
        inner = self.init_of_parts
        self.lsa = TwinsLSA(
            channels, dims=dims, init=inner,
            window_size=window_size, num_heads=num_heads, norm=norm, residual=residual, bias=bias,
        )  # fmt: skip
        self.gsa = TwinsGSA(
            channels, dims=dims, init=inner,
            sr_ratio=sr_ratio, num_heads=num_heads, norm=norm, residual=residual, bias=bias,
        )  # fmt: skip
        self.initialise()

    def needs_blend(self) -> bool:
        """Without residuals no layer's zero gives x."""
        return not self.args["residual"]

    def transform(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → the same shape."""
        return self.gsa(self.lsa(x))

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """x: (B, C, *S) → `local` and `global`: each half's rows, the second's for the first's output."""
        return {
            "local": self.lsa.attention(x)["rows"],
            "global": self.gsa.attention(self.lsa(x))["rows"],
        }


def may_miss(size: list[int], side: int) -> bool:
    """Whether `side` does not divide some of the sizes; in an export, where they are free, it may always be so."""
    if exporting():
        return True
    return any([n % side > 0 for n in size])  # noqa: C419 (TorchScript has no generators)


def filled(t: Tensor, side: int) -> Tensor:
    """(B, *S, C) → zeros behind the end of each axis of S up to a multiple of `side`."""
    size = static_shape(t)[1:-1]
    if not may_miss(size, side):
        return t
    padding = [0, 0]
    for n in size[::-1]:
        padding += [0, -n % side]
    return F.pad(t, padding)


def partition(t: Tensor, side: int) -> Tensor:
    """(B, *S, C) → (B · W, L, C): W windows of L = side^dims positions, the last ones filled with zeros."""
    t = filled(t, side)
    dims = t.ndim - 2
    for axis in range(dims):
        t = torch.unflatten(t, 1 + 2 * axis, (-1, side))
    order = [0] + list(range(1, 2 * dims, 2)) + list(range(2, 2 * dims + 1, 2)) + [2 * dims + 1]  # noqa: RUF005
    return t.permute(order).flatten(1 + dims, -2).flatten(0, dims)


def assemble(t: Tensor, x: Tensor, side: int) -> Tensor:
    """Undo `partition`: (B · W, L, C) → (B, C, *S), the shape of x, the filling cut off."""
    size = static_shape(x)[2:]
    dims = len(size)
    t = t.reshape([x.shape[0]] + [-(-n // side) for n in size] + [side] * dims + [t.shape[2]])
    order = [0, 2 * dims + 1]
    for axis in range(dims):
        order += [1 + axis, 1 + dims + axis]
    t = t.permute(order)
    for axis, n in enumerate(size):
        t = t.flatten(2 + axis, 3 + axis).narrow(2 + axis, 0, n)
    return t
