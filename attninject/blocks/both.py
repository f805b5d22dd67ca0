"""Blocks that attend to channels and to positions."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from attninject.blocks.fast.dispatch import SMALLER, untouched

from .base import BATCH_NORM, CONV, Block, Facts, GateBlock, he_init, hidden_width, pool
from .channel import ChannelAttention
from .fast import bam as fast_bam
from .fast import cbam as fast_cbam
from .gate import Gate, GateKind, Normed, at_least_float32, scale, zero
from .options import Backend, Init, Int, Reduction, given
from .spatial import SpatialAttention


class CBAM(Block):
    """Convolutional block attention: y = x · Mc(x), then y · Ms(y).

    arXiv:1807.06521, eq. 1 (Mc: eq. 2, `ChannelAttention`; Ms: eq. 3, `SpatialAttention`).
    `pool` and `bias` are the channel half's, `kernel_size`, `norm`, `concat`, `spatial_pool` and `spatial_bias` the
    spatial half's: with `spatial_bias=True, norm=False` it is the biased 7×7 of code that is often copied. An
    `order` of parallel is one gate g(zc + zs) from the sum of both halves' logits (paper, section 4.1);
    `residual`: x + CBAM(x).

    Deviations: those of the halves (biases, norm and [max, mean] follow the released code). Under
    `init="identity"` a residual's 1 is dropped and the gates are doubled, as everywhere, so `residual` only
    changes `paper` and `blend`. timm's `CbamModule` is `bias=False, concat="mean_max", init="paper"`, with
    keys `spatial.conv.conv` and `spatial.conv.bn` for our `spatial.conv` and `spatial.norm`.
    """

    facts = Facts(
        "cbam", family="both", spatial=True, paper="arXiv:1807.06521", equation="1-3",
        summary="convolutional block attention: channels, then positions",
    )  # fmt: skip
    fast_from = SMALLER

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        reduction: Annotated[float, Reduction()] = 16,
        kernel_size: Literal[3, 5, 7] = 7,
        pool: Literal["avg", "max", "both"] = "both",
        order: Literal["channel_first", "spatial_first", "parallel"] = "channel_first",
        bias: bool = True,
        norm: bool = True,
        residual: bool = False,
        divisor: Annotated[int, Int(min=1)] = 1,
        concat: Literal["max_mean", "mean_max"] = "max_mean",
        spatial_pool: Literal["avg", "max", "both"] = "both",
        spatial_bias: bool = False,
        gate: GateKind = "sigmoid",
        backend: Backend = "auto",
    ) -> None:
        super().__init__(**given(locals()))
        self.order, self.skip = order, residual and not self.identity
        inner = self.init_of_parts
        self.channel = ChannelAttention(
            channels, dims=dims, init=inner,
            reduction=reduction, pool=pool, bias=bias, divisor=divisor, gate=gate, backend=backend,
        )  # fmt: skip
        self.spatial = SpatialAttention(
            channels, dims=dims, init=inner,
            kernel_size=kernel_size, pool=spatial_pool, bias=spatial_bias, norm=norm, concat=concat, gate=gate,
            backend=backend,
        )  # fmt: skip
        self.gate = Gate(gate, identity=self.identity, skip=self.skip) if order == "parallel" else None
        self.initialise()

    def init_blend(self) -> None:
        """As published (the halves have done it themselves), but the spatial norm's scale at 1."""
        self.spatial.init_blend()

    def joint(self, x: Tensor) -> Tensor | None:
        """The parallel form's one gate, (B, C, *S), a residual's 1 included; None for the other orders."""
        if self.gate is None:
            return None
        return self.gate(self.channel.logits(x) + self.spatial.logits(x))

    def transform(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → the same shape."""
        gate = self.joint(x)
        if gate is not None:
            return scale(x, gate)
        first = self.order == "channel_first"
        y = self.spatial(self.channel(x)) if first else self.channel(self.spatial(x))
        return x + y if self.skip else y

    def fast_applies(self, x: Tensor) -> bool:
        """In the published order; the other forms put their halves' fast forms together."""
        bare = untouched(self.channel, self.spatial)
        whole = type(self.channel) is ChannelAttention and type(self.spatial) is SpatialAttention
        return bare and whole and self.order == "channel_first" and not self.skip

    def fast_transform(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → the same shape; what lies between the halves is never kept."""
        channel, spatial = self.channel, self.spatial
        conduits, descriptors = fast_cbam.squeeze(x, channel.pools)
        m = channel.gate(channel.merged(descriptors, quick=True)).to(x.dtype)
        conduits, pooled = fast_cbam.refine(x, m, conduits)
        return fast_cbam.rescale(x, m, spatial.gate(spatial.read(*pooled)), conduits)

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """x: (B, C, *S) → `channel`: (B, C, 1, …) and `spatial`: (B, 1, *S); `gate`: (B, C, *S) if parallel.

        A residual is added outside `channel` · `spatial`, but is part of `gate`.
        """
        gate = self.joint(x)
        if gate is not None:
            return {"gate": gate.to(x.dtype)}
        if self.order == "channel_first":
            channel = self.channel.attention(x)["gate"]
            return {"channel": channel, "spatial": self.spatial.attention(x * channel)["gate"]}
        spatial = self.spatial.attention(x)["gate"]
        return {"channel": self.channel.attention(x * spatial)["gate"], "spatial": spatial}


class ConvNormReLU(Normed):
    """relu(BN(conv(x))), size kept; any batch ≥ 1 in train mode (`gate.normalize`)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        dims: int,
        bias: bool,
        dilation: int = 1,
        groups: int = 1,
    ) -> None:
        super().__init__()
        padding = dilation * (kernel // 2)
        self.conv = CONV[dims](
            inputs, outputs, kernel, padding=padding, dilation=dilation, groups=groups, bias=bias
        )
        self.norm = BATCH_NORM[dims](outputs)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, inputs, *S) → (B, outputs, *S)."""
        return F.relu(self.normed(self.conv(x)))


class BAM(GateBlock):
    """Bottleneck attention: x · (1 + σ(c · s)), c: (B, C, 1, …) from the mean of x, s: (B, 1, *S).

    arXiv:1807.06514, eq. 1-4. c = FC(relu(BN(FC(mean)))); s = conv1(relu(BN(conv3(…relu(BN(conv1(x)))))))
    with `num_layers` dilated 3×3 convolutions in the middle. `dilation` is theirs, `channel_layers` the number of
    hidden layers in front of c's last one, `bias` that of all layers; `mode` is product in the released code, sum
    in the paper.

    Deviations: the paper adds, σ(c + s), the released code multiplies: `mode="product"` follows the code.
    Norms sit where the code has them, inside both branches, where the paper writes one at each end.
    Under `init="identity"` the factor is 2σ(·); of the product only the spatial branch's last layer is zero
    (with both at zero no gradient would reach either), of the sum both branches' last layers.
    """

    facts = Facts(
        "bam", family="both", spatial=True, paper="arXiv:1807.06514", equation="1-4",
        summary="bottleneck attention: channel and dilated spatial branch side by side",
    )  # fmt: skip
    fast_from = SMALLER

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        reduction: Annotated[float, Reduction()] = 16,
        dilation: Annotated[int, Int(min=1)] = 4,
        num_layers: Annotated[int, Int(min=0)] = 2,
        channel_layers: Annotated[int, Int(min=0)] = 1,
        mode: Literal["product", "sum"] = "product",
        bias: bool = True,
        divisor: Annotated[int, Int(min=1)] = 1,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(**given(locals()))
        hidden = hidden_width(channels, reduction, divisor)
        conv = CONV[dims]
        self.mode = mode
        widths = [channels] + [hidden] * channel_layers
        self.channel = nn.Sequential(
            *(ConvNormReLU(a, b, 1, dims, bias) for a, b in itertools.pairwise(widths)),
            conv(widths[-1], channels, 1, bias=bias),
        )
        self.spatial = nn.Sequential(
            ConvNormReLU(channels, hidden, 1, dims, bias),
            *(ConvNormReLU(hidden, hidden, 3, dims, bias, dilation) for _ in range(num_layers)),
            conv(hidden, 1, 1, bias=bias),
        )
        self.gate = Gate("sigmoid", identity=self.identity, skip=True)
        self.initialise()

    def init_identity(self) -> None:
        """Zero the spatial branch's last layer; in the sum the channel branch's too."""
        zero(self.spatial[-1])
        if self.mode == "sum":
            zero(self.channel[-1])

    def init_paper(self) -> None:
        """The released code's: He by fan-out for the convolutions, torch's for the FC layers, zero biases."""
        for layer in self.spatial.modules():
            if isinstance(layer, CONV[self.dims]):
                he_init(layer, mode="fan_out")
        for layer in self.channel.modules():
            if isinstance(layer, CONV[self.dims]) and layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def factor(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → what multiplies it, the 1 of 1 + σ included: (B, C, *S), float32 or wider."""
        c = at_least_float32(self.channel(pool(x, "avg")))
        s = at_least_float32(self.spatial(x))
        return self.gate(c * s if self.mode == "product" else c + s)

    def fast_applies(self, x: Tensor) -> bool:
        """If the gate and the layer that reads the map are those it was built with."""
        first = self.spatial[0]
        if not isinstance(first, ConvNormReLU) or type(self.gate) is not Gate:
            return False
        bare = untouched(self.gate, self.spatial, first, first.conv)
        return bare and type(first) is ConvNormReLU and type(first.conv) is CONV[self.dims]

    def fast_transform(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → x · factor, the factor never kept."""
        first = self.spatial[0]
        assert isinstance(first, ConvNormReLU)
        conduit, mean, z = fast_bam.branch(x, first.conv)
        z = F.relu(first.normed(z))
        for layer in list(self.spatial)[1:]:
            z = layer(z)
        c, s = at_least_float32(self.channel(mean)), at_least_float32(z)
        return fast_bam.modulate(x, c, s, conduit, self.mode, self.identity)
