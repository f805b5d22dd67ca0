"""Blocks that gate every position: from neighbourhoods, statistics, channel and spatial halves."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attninject.blocks.fast.dispatch import SMALL, untouched

from .base import (
    BATCH_NORM,
    CONV,
    Block,
    Facts,
    GateBlock,
    GroupGateBlock,
    count,
    hidden_width,
    pool,
    positions,
)
from .channel import SE
from .fast import scse as fast
from .gate import Gate, GateKind, Normed, at_least_float32, normalize, scale, zero
from .options import Backend, Init, Int, Odd, Positive, Reduction, given


class PointwiseSAM(GateBlock, Normed):
    """YOLOv4's spatial attention, point by point: x · g(W x + b), W a 1×1 convolution of all channels.

    arXiv:2004.10934, section 3.3 and figure 5 (CBAM's pooled descriptors are dropped, so each position of
    each channel has its own gate). `kernel_size` and `bias` are the convolution's, `norm` is a batch norm
    behind it.

    Deviations: the figure shows a convolution and a sigmoid, no kernel size and no norm. Darknet's `sam`
    layer only multiplies: the layer in front of it decides on both.
    """

    facts = Facts(
        "sam_pointwise", family="spatial", spatial=True, paper="arXiv:2004.10934", equation="figure 5",
        summary="YOLOv4's spatial attention: a 1×1 convolution gates each point",
    )  # fmt: skip

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        kernel_size: Annotated[int, Odd()] = 1,
        bias: bool = True,
        norm: bool = False,
        gate: GateKind = "sigmoid",
    ) -> None:
        super().__init__(**given(locals()))
        self.conv = CONV[dims](channels, channels, kernel_size, padding=kernel_size // 2, bias=bias)
        self.norm = BATCH_NORM[dims](channels) if norm else None
        self.gate = Gate(gate, identity=self.identity)
        self.initialise()

    def init_identity(self) -> None:
        """Zero the convolution, or the norm's scale and shift (see `SpatialAttention.init_identity`)."""
        zero(self.conv if self.norm is None else self.norm)

    def factor(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → (B, C, *S)."""
        return self.gate(at_least_float32(self.normed(self.conv(x))))


class SimAM(GateBlock):
    """Simple parameter-free attention: x · σ(1 / e*), 1 / e* = (x − μ)² / (4 (v + λ)) + 1/2, per channel.

    ICML 2021, proceedings.mlr.press/v139/yang21o.html, eq. 5 (the least energy of a neuron; μ and v: mean and
    variance of its channel over N positions), 6. Option: `e_lambda` (λ).

    Deviations: v divides by N - 1 as the released code does, the paper by N; at one position v is 0, where
    the released code is undefined. Without a layer to zero, `identity` is `blend`.
    """

    facts = Facts(
        "simam", family="spatial", spatial=False, paper="ICML 2021", equation="5-6",
        summary="parameter-free attention: a position counts as it differs from its channel's mean",
    )  # fmt: skip

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        e_lambda: Annotated[float, Positive()] = 1e-4,
    ) -> None:
        super().__init__(**given(locals()))
        self.e_lambda = e_lambda
        self.gate = Gate("sigmoid", identity=False)
        self.initialise()

    def needs_blend(self) -> bool:
        """No parameters."""
        return True

    def factor(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → (B, C, *S)."""
        wide = at_least_float32(x)  # squares overflow in float16
        squares = (wide - pool(wide, "avg")).square()
        variance = squares.sum(positions(x), keepdim=True) / max(count(x) - 1, 1)
        return self.gate(squares / (4 * (variance + self.e_lambda)) + 0.5)


class SGE(GroupGateBlock):
    """Spatial group-wise enhance: in each group of channels x · g(γ ĉ + β), ĉ = c normalised over positions.

    arXiv:1905.09646, section 3: c_i = (mean of x) · x_i, the likeness of position i to the group's mean;
    ĉ_i = (c_i - μ) / (σ + ε); one γ (`weight`) and β (`bias`) per group. There are `groups`, or
    their largest common divisor with the channels.

    Deviations: σ is the paper's, over N positions; the released code divides by N - 1, which is undefined at
    one position. ε is 1e-5. The released γ = 0, β = 1 make every gate g(1); under `identity` β is 0 too.
    """

    facts = Facts(
        "sge", family="spatial", spatial=False, paper="arXiv:1905.09646", equation="section 3",
        summary="spatial group-wise enhance: a gate per position and group by likeness to the group's mean",
    )  # fmt: skip

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        groups: Annotated[int, Int(min=1)] = 64,
        gate: GateKind = "sigmoid",
    ) -> None:
        super().__init__(**given(locals()))
        self.groups = math.gcd(groups, channels)
        self.weight = nn.Parameter(torch.zeros(self.groups))
        self.bias = nn.Parameter(torch.ones(self.groups))
        self.gate = Gate(gate, identity=self.identity)
        self.initialise()

    def init_identity(self) -> None:
        """β = 0 beside the published γ = 0."""
        nn.init.zeros_(self.bias)

    def factor(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → one gate per group, (B, G, *S), float32 or wider."""
        wide = at_least_float32(x)
        c = torch.unflatten(wide * pool(wide, "avg"), 1, (self.groups, -1)).sum(2)
        axes = positions(c)
        centred = c - c.mean(axes, keepdim=True)
        # the norm's gradient at zero is zero, the root's is not finite
        deviation = torch.linalg.vector_norm(centred, 2, axes, keepdim=True) / count(c) ** 0.5
        column = [-1] + [1] * len(axes)
        z = self.weight.view(column) * (centred / (deviation + 1e-5)) + self.bias.view(column)
        return self.gate(z)


class LKA(GateBlock):
    """Large kernel attention: x · conv1(dilated depthwise(depthwise(x))), no function on top.

    arXiv:2202.09741, eq. 3-4: a kernel of K = `kernel_size` falls apart into a depthwise one of 2d - 1, a
    depthwise one of ⌈K / d⌉ dilated by d = `dilation`, and a 1×1 convolution. Options: `kernel_size` (K),
    `dilation` (d); ⌈K / d⌉ is made odd by one more where it is even, so that the size is kept.

    Deviations: none. The linear layer itself gives the factor, so `identity` is the published function with
    the 1×1 weight at 0 and its bias at 1. The paper's block puts 1×1 convolutions, a GELU and a shortcut
    around this (its figure 2d); they are no part of equations 3 and 4.
    """

    facts = Facts(
        "lka", family="spatial", spatial=True, paper="arXiv:2202.09741", equation="3-4",
        summary="large kernel attention: a 21×21 kernel in three cheap convolutions",
    )  # fmt: skip

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        kernel_size: Annotated[int, Int(min=1)] = 21,
        dilation: Annotated[int, Int(min=1)] = 3,
    ) -> None:
        super().__init__(**given(locals()))
        conv, c, d = CONV[dims], channels, dilation
        k = math.ceil(kernel_size / d)
        k += 1 - k % 2
        self.conv0 = conv(c, c, 2 * d - 1, padding=d - 1, groups=c)
        self.conv_spatial = conv(c, c, k, padding=k // 2 * d, dilation=d, groups=c)
        self.conv1 = conv(c, c, 1)
        self.initialise()

    def init_identity(self) -> None:
        """Weight 0 and bias 1 of the last layer: the factor is exactly 1."""
        nn.init.zeros_(self.conv1.weight)
        if self.conv1.bias is not None:
            nn.init.ones_(self.conv1.bias)

    def init_paper(self) -> None:
        """The released code's: normal of variance 2 / fan-out per group, zero biases."""
        for layer in (self.conv0, self.conv_spatial, self.conv1):
            fan_out = layer.weight[0, 0].numel() * layer.out_channels // layer.groups
            nn.init.normal_(layer.weight, std=math.sqrt(2 / fan_out))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def factor(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → (B, C, *S)."""
        return at_least_float32(self.conv1(self.conv_spatial(self.conv0(x))))


class GAM(Block):
    """Global attention mechanism: y = x · g(MLP of each position), then y · g(two k×k convolutions of y).

    arXiv:2112.05561, eq. 1-2, figures 2 and 3: the MLP W₂ relu(W₁ ·) works on every position, not on a mean;
    the spatial half is BN(conv(relu(BN(conv(y))))), both through C / `reduction`. `kernel_size` is
    k, `bias` the MLP's (the convolutions have none, since norms follow).

    Deviations: there is no released code; norms and relu are those of figure 3. The grouped convolutions with
    channel shuffle, by which the paper saves parameters on ResNet-50, are not offered.
    """

    facts = Facts(
        "gam", family="both", spatial=True, paper="arXiv:2112.05561", equation="1-2",
        summary="global attention mechanism: channels then positions, with nothing pooled away",
    )  # fmt: skip

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        reduction: Annotated[float, Reduction()] = 4,
        divisor: Annotated[int, Int(min=1)] = 1,
        kernel_size: Annotated[int, Odd()] = 7,
        bias: bool = True,
        gate: GateKind = "sigmoid",
    ) -> None:
        super().__init__(**given(locals()))
        conv, norm, c = CONV[dims], BATCH_NORM[dims], channels
        hidden, around = hidden_width(channels, reduction, divisor), kernel_size // 2
        self.fc1, self.fc2 = conv(c, hidden, 1, bias=bias), conv(hidden, c, 1, bias=bias)
        self.conv1 = conv(c, hidden, kernel_size, padding=around, bias=False)
        self.norm1 = norm(hidden)
        self.conv2 = conv(hidden, c, kernel_size, padding=around, bias=False)
        self.norm2 = norm(c)
        self.gate = Gate(gate, identity=self.identity)
        self.initialise()

    def init_identity(self) -> None:
        """Zero the last layer of each half: both gates are 1, and each passes the other's gradient on."""
        zero(self.fc2, self.norm2)

    def channel(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → the first half's gate, (B, C, *S), float32 or wider."""
        return self.gate(at_least_float32(self.fc2(F.relu(self.fc1(x)))))

    def spatial(self, y: Tensor) -> Tensor:
        """y: (B, C, *S) → the second half's gate, (B, C, *S), float32 or wider."""
        z = self.conv1(y)
        z = self.norm1(z) if torch.jit.is_scripting() else normalize(self.norm1, z)
        z = self.conv2(F.relu(z))
        return self.gate(
            at_least_float32(self.norm2(z) if torch.jit.is_scripting() else normalize(self.norm2, z))
        )

    def transform(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → the same shape."""
        y = scale(x, self.channel(x))
        return scale(y, self.spatial(y))

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """x: (B, C, *S) → `channel` and `spatial`, (B, C, *S) each, the second computed behind the first."""
        channel = self.channel(x).to(x.dtype)
        return {"channel": channel, "spatial": self.spatial(x * channel).to(x.dtype)}


class SCSE(Block):
    """Concurrent squeeze and excitation: the maps x · g_c (per channel) and x · g_s (per position), in one.

    arXiv:1803.02579, section 2: g_c is SE's, g_s = σ(1×1 convolution to one channel), the two maps are added;
    arXiv:1808.08127 compares ways to combine the two maps: `mode`, element by element. `bias`
    is that of all layers.

    The product of two scaled maps holds x², which no gate makes x: under `multiply`, `identity` is `blend`.
    The sum's identity is the published g_c + g_s, each 1/2 at first; the maximum's gates are doubled.

    Deviations: the journal paper's fourth way, concatenation, doubles the channels and is not offered. The
    default is the first paper's sum; the authors' later code takes the maximum.
    """

    facts = Facts(
        "scse", family="both", spatial=False, paper="arXiv:1803.02579", equation="section 2",
        summary="concurrent squeeze and excitation: a channel and a position gate, combined",
    )  # fmt: skip
    fast_from = SMALL

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        mode: Literal["add", "max", "multiply"] = "add",
        reduction: Annotated[float, Reduction()] = 2,
        bias: bool = True,
        divisor: Annotated[int, Int(min=1)] = 1,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(**given(locals()))
        self.mode = mode
        inner = self.init_of_parts
        self.channel = SE(channels, dims=dims, init=inner, reduction=reduction, bias=bias, divisor=divisor)
        self.spatial = CONV[dims](channels, 1, 1, bias=bias)
        self.gate = Gate("sigmoid", identity=self.identity and mode != "add")
        self.initialise()

    def needs_blend(self) -> bool:
        """x² is not x."""
        return bool(self.args["mode"] == "multiply")

    def init_identity(self) -> None:
        """Zero the spatial half's layer (the channel half has done it itself)."""
        zero(self.spatial)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, C, *S) → g_c: (B, C, 1, …) and g_s: (B, 1, *S), float32 or wider."""
        return self.gate(self.channel.logits(x)), self.gate(at_least_float32(self.spatial(x)))

    def transform(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → the same shape; float32 or wider for a product that is to be blended."""
        channel, spatial = self.gates(x)
        if self.mode == "add":
            return scale(x, channel + spatial)
        if self.mode == "max":
            return torch.maximum(scale(x, channel), scale(x, spatial))
        product = at_least_float32(x).square() * (channel * spatial)  # overflows in float16
        return product if self.alpha is not None else product.to(x.dtype)

    def fast_applies(self, x: Tensor) -> bool:
        """The sum, if the layer that reads the map is the plain convolution it was built as."""
        bare = type(self.spatial) is CONV[self.dims] and untouched(self.channel, self.spatial)
        return self.mode == "add" and type(self.channel) is SE and bare

    def fast_transform(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → x · (g_c + g_s)."""
        conduits, (mean, z) = fast.squeeze_project(x, self.spatial)
        c, s = self.gate(self.channel.merged([mean], quick=True)), self.gate(at_least_float32(z))
        return fast.scale_by_sum(x, c, s, conduits)

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """x: (B, C, *S) → `channel`: (B, C, 1, …) and `spatial`: (B, 1, *S)."""
        channel, spatial = self.gates(x)
        return {"channel": channel.to(x.dtype), "spatial": spatial.to(x.dtype)}
