"""Channel attention: one gate per channel, from globally pooled descriptors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attninject.blocks.fast.dispatch import SMALL, SMALLER
from attninject.blocks.fast.pointwise import pointwise

from .base import CONV, Facts, GateBlock, he_init, hidden_width, pool
from .fast import channel as fast
from .gate import Gate, GateKind, at_least_float32, zero
from .options import Backend, Init, Int, Reduction, given


class ChannelMLP(GateBlock):
    """Shared by SE and CBAM's channel attention: descriptor → C / r → C logits → one gate per channel."""

    if TYPE_CHECKING:
        pools: list[str]

    def build(self, *, reduction: float, bias: bool, divisor: int, gate: GateKind) -> None:
        """Make the layers, as 1×1 convolutions under timm's names, so that weights interchange."""
        hidden = hidden_width(self.channels, reduction, divisor)
        conv = CONV[self.dims]
        self.fc1 = conv(self.channels, hidden, 1, bias=bias)
        self.fc2 = conv(hidden, self.channels, 1, bias=bias)
        self.gate = Gate(gate, identity=self.identity)

    def mlp(self, descriptor: Tensor, quick: bool = False) -> Tensor:
        """(B, C, 1, …) → logits of the same shape, float32 or wider; `quick`: by `pointwise`."""
        if quick and not torch.jit.is_scripting():
            return at_least_float32(pointwise(self.fc2, F.relu(pointwise(self.fc1, descriptor))))
        return at_least_float32(self.fc2(F.relu(self.fc1(descriptor))))

    def merged(self, descriptors: list[Tensor], quick: bool = False) -> Tensor:
        """One descriptor (B, C, 1, …) for each of `pools` → gate logits of that shape."""
        raise NotImplementedError

    def logits(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → gate logits (B, C, 1, …)."""
        return self.merged([pool(x, kind) for kind in self.pools])

    def init_identity(self) -> None:
        """Zero the second layer: z = 0."""
        zero(self.fc2)

    def factor(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → gate (B, C, 1, …)."""
        return self.gate(self.logits(x))

    def fast_transform(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → x · gate."""
        conduits, descriptors = fast.squeeze(x, self.pools)
        return fast.scale(x, self.gate(self.merged(descriptors, quick=True)), conduits)


class SE(ChannelMLP):
    """Squeeze-and-Excitation: x · g(W₂ relu(W₁ s + b₁) + b₂), s = mean of x over positions.

    arXiv:1709.01507, eq. 2 (squeeze), 3 (excitation), 4 (scale); `gate` and `squeeze` are its ablations.
    A `squeeze` of both is the mean of mean and maximum; `bias` is that of both layers.

    Deviations: none from the paper. timm's `SEModule` is `divisor=8, init="paper"`: same keys, same output;
    its `add_maxpool` is `squeeze="both"`.
    """

    facts = Facts(
        "se", family="channel", spatial=False, paper="arXiv:1709.01507", equation="2-4",
        summary="squeeze-and-excitation: a gate per channel from the mean",
    )  # fmt: skip
    fast_from = SMALL

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        reduction: Annotated[float, Reduction()] = 16,
        bias: bool = True,
        divisor: Annotated[int, Int(min=1)] = 1,
        squeeze: Literal["avg", "max", "both"] = "avg",
        gate: GateKind = "sigmoid",
        backend: Backend = "auto",
    ) -> None:
        super().__init__(**given(locals()))
        self.pools = ["avg", "max"] if squeeze == "both" else [squeeze]
        self.build(reduction=reduction, bias=bias, divisor=divisor, gate=gate)
        self.initialise()

    def init_paper(self) -> None:
        """He initialisation (the paper follows arXiv:1502.01852), zero biases."""
        he_init(self.fc1, self.fc2)

    def merged(self, descriptors: list[Tensor], quick: bool = False) -> Tensor:
        """Mean and maximum are averaged, then go through the MLP."""
        both = len(descriptors) == 2
        return self.mlp(0.5 * descriptors[0] + 0.5 * descriptors[1] if both else descriptors[0], quick)


class ChannelAttention(ChannelMLP):
    """CBAM's channel attention: x · g(MLP(mean of x) + MLP(max of x)), one MLP for both descriptors.

    arXiv:1807.06521, eq. 2: MLP(s) = W₁ relu(W₀ s). `pool` says which descriptors are used;
    `bias` is that of both layers.

    Deviations: the paper's formula has no biases, the released code has: `bias=True` follows the code. timm's
    `ChannelAttn` is `bias=False, init="paper"`, same keys; it rounds the hidden width where C / r is no whole
    number, we cut it.
    """

    facts = Facts(
        "channel_attention", family="channel", spatial=False, paper="arXiv:1807.06521", equation="2",
        summary="CBAM's channel half: a gate per channel from mean and max",
    )  # fmt: skip
    fast_from = SMALLER

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        reduction: Annotated[float, Reduction()] = 16,
        pool: Literal["avg", "max", "both"] = "both",
        bias: bool = True,
        divisor: Annotated[int, Int(min=1)] = 1,
        gate: GateKind = "sigmoid",
        backend: Backend = "auto",
    ) -> None:
        super().__init__(**given(locals()))
        self.pools = ["avg", "max"] if pool == "both" else [pool]
        self.build(reduction=reduction, bias=bias, divisor=divisor, gate=gate)
        self.initialise()

    def init_paper(self) -> None:
        """The released code's: torch's weights, zero biases."""
        for layer in (self.fc1, self.fc2):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def merged(self, descriptors: list[Tensor], quick: bool = False) -> Tensor:
        """Each goes through the MLP; the logits are added."""
        logits = [self.mlp(descriptor, quick) for descriptor in descriptors]
        return logits[0] + logits[1] if len(logits) == 2 else logits[0]
