"""Blocks that look along the axes one by one: coordinate, strip, triplet, efficient multi-scale attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attninject.blocks.fast.dispatch import SMALL
from attninject.blocks.fast.pointwise import pointwise

from .base import (
    BATCH_NORM,
    CONV,
    Block,
    Facts,
    GateBlock,
    GroupGateBlock,
    column,
    he_init,
    hidden_width,
    pool,
    positions,
)
from .fast import axes as fast
from .gate import Gate, GateKind, Normed, added, at_least_float32, lies_last, normalize, scale, zero
from .options import Backend, Init, Int, Odd, Reduction, given

AXES = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}
"""Spatial dimensions → what each axis is called in `attention`."""


def _vmapped() -> bool:
    """Whether torch.func is at work, whose vmap cannot say whether a tensor is in channels_last."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def reduce_axes(x: Tensor, kind: str, axes: list[int]) -> Tensor:
    """`mean` or `amax` over some axes, which stay as 1.

    In channels_last the axes are permuted first: torch's reductions then walk through memory in order, about
    eight times as fast.
    """
    if torch.jit.is_scripting():
        return _reduced(x, kind, axes)
    if _vmapped() or lies_last(x) is None:
        return _reduced(x, kind, axes)
    moved = [axis - 1 if axis > 1 else x.ndim - 1 for axis in axes]
    return _reduced(x.movedim(1, -1), kind, moved).movedim(-1, 1)


def _reduced(x: Tensor, kind: str, axes: list[int]) -> Tensor:
    return x.mean(axes, keepdim=True) if kind == "mean" else x.amax(axes, keepdim=True)


def strips(x: Tensor) -> list[Tensor]:
    """The mean of x: (B, C, *S) over all spatial axes but one, for each: (B, C, H, 1) and (B, C, 1, W)."""
    axes = positions(x)
    if len(axes) == 1:
        return [x]
    return [reduce_axes(x, "mean", axes[:i] + axes[i + 1 :]) for i in range(len(axes))]


def joined(parts: list[Tensor]) -> Tensor:
    """Strips in one row, so that one layer serves all: → (B, C, ΣS, 1, …), of as many axes as the strips."""
    if len(parts) == 2:  # the same in fewer operations
        return torch.cat([parts[0], parts[1].transpose(2, 3)], 2)
    row = torch.cat([part.flatten(2) for part in parts], 2)
    return row.view(list(row.shape) + [1] * (parts[0].ndim - 3))


def parted(row: Tensor, x: Tensor) -> list[Tensor]:
    """The inverse of `joined` for x: (B, C, *S): each strip along its own axis again."""
    sizes = list(x.shape[2:])  # not fixed, even by torch.jit.trace
    if len(sizes) == 2:
        first, second = torch.split(row, sizes, 2)
        return [first, second.transpose(2, 3)]
    parts = []
    for axis, part in enumerate(torch.split(row.flatten(2), sizes, 2)):
        shape = [1] * len(sizes)
        shape[axis] = sizes[axis]
        parts.append(torch.unflatten(part, 2, shape))
    return parts


class Coordinate(Block, Normed):
    """Coordinate attention: x · g(F_h f_h) · g(F_w f_w), f = hswish(BN(F₁ [z_h, z_w])).

    arXiv:2103.02907, eq. 4-5 (z_h, z_w: means of x along the other axis), 6 (F₁ to a width of
    max(`min_width`, C / `reduction`), the strips side by side), 7-8 (one layer per axis), 9. In 3D there are
    three strips and gates, in 1D one, which is x itself. `bias` is that of all layers.

    Deviations: none from the released code. timm's `CoordAttn` has no biases, another width, and keys
    `bn1`, `conv_h`, `conv_w` for our `norm`, `excite.0`, `excite.1`; with equal widths the outputs agree.
    In train mode the norm takes all strips together, so that even one position gives it one value per axis.
    """

    facts = Facts(
        "coord", family="both", spatial=True, paper="arXiv:2103.02907", equation="4-9",
        summary="coordinate attention: a gate per channel along each axis",
    )  # fmt: skip
    fast_from = SMALL

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        reduction: Annotated[float, Reduction()] = 32,
        min_width: Annotated[int, Int(min=1)] = 8,
        bias: bool = True,
        gate: GateKind = "sigmoid",
        backend: Backend = "auto",
    ) -> None:
        super().__init__(**given(locals()))
        hidden, conv = max(min_width, hidden_width(channels, reduction)), CONV[dims]
        self.conv1 = conv(channels, hidden, 1, bias=bias)
        self.norm = BATCH_NORM[dims](hidden)
        self.excite = nn.ModuleList(conv(hidden, channels, 1, bias=bias) for _ in range(dims))
        self.gate = Gate(gate, identity=self.identity)
        self.initialise()

    def init_identity(self) -> None:
        """Zero the last layer of every axis: all gates are 1, and each passes the others' gradient on."""
        zero(*self.excite)

    def read(self, means: list[Tensor], x: Tensor, quick: bool = False) -> list[Tensor]:
        """The strips of x → logits of one gate per axis, of the strip's shape, float32 or wider.

        `quick`: by `pointwise`.
        """
        row = joined(means)
        row = pointwise(self.conv1, row) if quick and not torch.jit.is_scripting() else self.conv1(row)
        parts = parted(F.hardswish(self.normed(row)), x)
        for i, layer in enumerate(self.excite):
            z = pointwise(layer, parts[i]) if quick and not torch.jit.is_scripting() else layer(parts[i])
            parts[i] = at_least_float32(z)
        return parts

    def gates(self, x: Tensor) -> list[Tensor]:
        """x: (B, C, *S) → one gate per axis, (B, C, H, 1) and (B, C, 1, W) in 2D, float32 or wider."""
        return [self.gate(z) for z in self.read(strips(x), x)]

    def transform(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → x · the gates."""
        y = x
        for gate in self.gates(x):
            y = scale(y, gate)
        return y

    def fast_transform(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → x · the gates."""
        conduits, means = fast.strips(x)
        factors = [fast.opened(self.gate, z, x) for z in self.read(means, x, quick=True)]
        return fast.scale(x, factors, conduits)

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """x: (B, C, *S) → `height`: (B, C, H, 1) and `width`: (B, C, 1, W); `depth` in 3D, `length` in 1D."""
        return {name: g.to(x.dtype) for name, g in zip(AXES[self.dims], self.gates(x), strict=True)}


class Strip(GateBlock):
    """Strip pooling: x · g(F relu(BN(conv(mean over W)) + BN(conv(mean over H)))), both broadcast to the map.

    arXiv:2003.13328, eq. 2-3 (strip means), 4 (a 1-D convolution of `kernel_size` along each, then their sum
    at every position), 5 (F is 1×1, its output gates x). In 3D there are three strips, in 1D one, which is x
    itself. `kernel_size` is that along a strip, `norm` batch norms and relu around the sum.

    Deviations: the paper's formula has neither norm nor relu, the released code's `SPBlock` has both, and no
    bias in front of the norms: `norm=True` follows the code, `norm=False` the paper. Its mixed pooling
    module is a head that changes the number of channels, and another thing. timm's `StripAttn` is another
    block too: depthwise convolutions of the strips, whose sum is the gate's logit without F.
    """

    facts = Facts(
        "strip", family="both", spatial=True, paper="arXiv:2003.13328", equation="2-5",
        summary="strip pooling: rows' and columns' means gate every position",
    )  # fmt: skip

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        kernel_size: Annotated[int, Odd()] = 3,
        norm: bool = True,
        gate: GateKind = "sigmoid",
    ) -> None:
        super().__init__(**given(locals()))
        self.convs = nn.ModuleList(self._along(axis, kernel_size, bias=not norm) for axis in range(dims))
        self.norms = nn.ModuleList(BATCH_NORM[dims](channels) for _ in range(dims)) if norm else None
        self.fuse = CONV[dims](channels, channels, 1)
        self.gate = Gate(gate, identity=self.identity)
        self.initialise()

    def _along(self, axis: int, kernel_size: int, bias: bool) -> nn.Module:
        kernel = tuple(kernel_size if i == axis else 1 for i in range(self.dims))
        padding = tuple(k // 2 for k in kernel)
        conv: Callable[..., nn.Module] = CONV[self.dims]  # one kernel size per axis
        return conv(self.channels, self.channels, kernel, padding=padding, bias=bias)

    def init_identity(self) -> None:
        """Zero the 1×1 layer: z = 0."""
        zero(self.fuse)

    def factor(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → (B, C, *S)."""
        y = strips(x)
        for i, conv in enumerate(self.convs):
            y[i] = conv(y[i])
        if self.norms is not None:
            for i, norm in enumerate(self.norms):
                y[i] = norm(y[i]) if torch.jit.is_scripting() else normalize(norm, y[i])
        total = added(y)
        return self.gate(at_least_float32(self.fuse(total if self.norms is None else F.relu(total))))


class PlaneGate(Normed):
    """BN(conv k([max; mean] over one axis)): the logits of a gate over the axes that are left."""

    def __init__(self, axis: int, dims: int, kernel_size: int) -> None:
        super().__init__()
        self.axis = axis
        self.conv = CONV[dims](2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = BATCH_NORM[dims](1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → the same with 1 for the pooled axis, float32 or wider."""
        pooled = [reduce_axes(x, kind, [self.axis]).squeeze(self.axis) for kind in ["amax", "mean"]]
        z = self.normed(self.conv(torch.stack(pooled, 1)))
        return at_least_float32(z).squeeze(1).unsqueeze(self.axis)


class Triplet(GateBlock):
    """Triplet attention: x · (g_CW + g_CH + g_HW) / 3, each gate g(BN(conv k×k([max; mean] over one axis))).

    arXiv:2010.03045, section 3.2 (Z-pool; the mean over three branches): the axes are height, width and
    channels, in this order in `planes`. In 3D there are four branches with 3-D
    convolutions, in 1D two. All have the `kernel_size`; without `spatial` there is no branch pooled over the
    channels, as under the released `no_spatial`.

    Deviations: the means are taken of the gates, not of three scaled maps, which is the same formula and
    exact. The plane left when the width is pooled is convolved as (C, H), in the released code as (H, C):
    transpose that kernel to carry weights over. The norms' momentum is torch's 0.1, not the released 0.01,
    as in `SpatialAttention`.
    """

    facts = Facts(
        "triplet", family="both", spatial=True, paper="arXiv:2010.03045", equation="section 3.2",
        summary="triplet attention: gates over each pair of channels, height and width",
    )  # fmt: skip

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        kernel_size: Annotated[int, Odd()] = 7,
        spatial: bool = True,
        gate: GateKind = "sigmoid",
    ) -> None:
        super().__init__(**given(locals()))
        axes = [*range(2, dims + 2), *([1] if spatial else [])]
        self.planes = nn.ModuleList(PlaneGate(axis, dims, kernel_size) for axis in axes)
        self.gate = Gate(gate, identity=self.identity)
        self.initialise()

    def init_identity(self) -> None:
        """Zero the norms' scale and shift, not the convolutions (see `SpatialAttention.init_identity`)."""
        zero(*(plane.norm for plane in self.planes))  # type: ignore[arg-type]

    def init_paper(self) -> None:
        """The released code's: He by fan-out."""
        he_init(*(plane.conv for plane in self.planes), mode="fan_out")  # type: ignore[arg-type]

    def gates(self, x: Tensor) -> list[Tensor]:
        """x: (B, C, *S) → one gate per branch, with 1 for its pooled axis, float32 or wider."""
        return [self.gate(plane(x)) for plane in self.planes]

    def factor(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → (B, C, *S)."""
        return added(self.gates(x)) / len(self.planes)


class EMAAttention(GroupGateBlock):
    """Efficient multi-scale attention with cross-spatial learning: x · g(A(x₁)ᵀ x₂ + A(x₂)ᵀ x₁), in groups.

    arXiv:2305.13563, section 3, eq. 1-2 (strip means), 3 (A: softmax over the channels of the global mean).
    The channels are split into G groups that share all weights. In each: x₁ = GN(x · σ(a_h) · σ(a_w)), where
    [a_h, a_w] = conv1([z_h, z_w]) of the strip means; x₂ = conv3(x); each weights the other's channels, and
    the sum of both gates every position of the group. In 3D there are three strips and 3-D convolutions, in
    1D one strip. G is `groups`, or their largest common divisor with the channels. `gate` is the outer one;
    the σ inside stay.

    Deviations: none from the released code, whose `factor` is `groups` and must divide the channels. GN has
    one channel per group, so A(x₁) depends on its shift alone.
    """

    facts = Facts(
        "ema_attn", family="both", spatial=True, paper="arXiv:2305.13563", equation="1-3",
        summary="efficient multi-scale attention: strips and a 3×3 branch weight each other, in groups",
    )  # fmt: skip

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        groups: Annotated[int, Int(min=1)] = 32,
        gate: GateKind = "sigmoid",
    ) -> None:
        super().__init__(**given(locals()))
        self.groups = math.gcd(groups, channels)
        width = channels // self.groups
        self.conv1x1 = CONV[dims](width, width, 1)
        self.conv3x3 = CONV[dims](width, width, 3, padding=1)
        self.norm = nn.GroupNorm(width, width)
        self.inner = Gate("sigmoid", identity=False)
        self.gate = Gate(gate, identity=self.identity)
        self.initialise()

    def init_identity(self) -> None:
        """Zero the norm and the 3×3 layer: x₁ = x₂ = 0, while A of either stays a positive weight."""
        zero(self.norm, self.conv3x3)

    def factor(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → one gate per group, (B, G, *S), float32 or wider."""
        grouped = torch.unflatten(x, 1, (self.groups, -1)).flatten(0, 1)
        y = grouped
        for a in parted(self.conv1x1(joined(strips(grouped))), grouped):
            y = scale(y, self.inner(a))
        # not the module's own call, which refuses a single value per channel
        x1 = torch.group_norm(y, self.norm.num_groups, self.norm.weight, self.norm.bias, self.norm.eps)
        x2 = self.conv3x3(grouped)
        z = weigh(pool(x1, "avg"), x2) + weigh(pool(x2, "avg"), x1)
        return self.gate(torch.unflatten(z, 0, (-1, self.groups)).flatten(1, 2))


def weigh(descriptor: Tensor, x: Tensor) -> Tensor:
    """Σ_c softmax_c(descriptor) x_c in float32 or wider: (B, C, 1, …) and (B, C, *S) → (B, 1, *S)."""
    weights = torch.softmax(at_least_float32(descriptor).flatten(1), 1)
    return (column(weights, x) * at_least_float32(x)).sum(1, keepdim=True)
