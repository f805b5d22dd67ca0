"""Spatial attention: one gate per position, from descriptors pooled over the channels."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from attninject.blocks.fast.dispatch import SMALLER

from .base import BATCH_NORM, CONV, Facts, GateBlock, he_init
from .fast import spatial as fast
from .gate import Gate, GateKind, Normed, at_least_float32, zero
from .options import Backend, Init, given


class SpatialAttention(GateBlock, Normed):
    """CBAM's spatial attention: x · g(BN(conv k×k([max of x; mean of x]))), pooled over the channels.

    arXiv:1807.06521, eq. 3. `kernel_size` and `bias` are the convolution's, `norm` is the batch norm behind it,
    `pool` says which descriptors are used, `concat` the order of the two.

    Deviations: the paper's formula has no norm, the released code has: `norm=True` follows the code, and so
    does the order [max, mean] (the paper writes [mean, max], and so does timm's `SpatialAttn`, which is
    `concat="mean_max", init="paper"` with keys `conv.conv`, `conv.bn` for our `conv`, `norm`). The norm's
    momentum is torch's 0.1, not the released 0.01: a short fine-tuning run must reach the statistics.
    """

    facts = Facts(
        "spatial_attention", family="spatial", spatial=True, paper="arXiv:1807.06521", equation="3",
        summary="CBAM's spatial half: a gate per position from mean and max",
    )  # fmt: skip
    fast_from = SMALLER

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        kernel_size: Literal[3, 5, 7] = 7,
        pool: Literal["avg", "max", "both"] = "both",
        bias: bool = False,
        norm: bool = True,
        concat: Literal["max_mean", "mean_max"] = "max_mean",
        gate: GateKind = "sigmoid",
        backend: Backend = "auto",
    ) -> None:
        super().__init__(**given(locals()))
        self.concat, self.pool = concat, pool
        self.conv = CONV[dims](
            2 if pool == "both" else 1, 1, kernel_size, padding=kernel_size // 2, bias=bias
        )
        self.norm = BATCH_NORM[dims](1) if norm else None
        self.gate = Gate(gate, identity=self.identity)
        self.initialise()

    def init_identity(self) -> None:
        """Zero the norm's scale and shift, or the convolution where there is no norm: z = 0.

        Not the convolution in front of a norm: its output would be constant, and 1/√(0 + ε) in the norm's
        backward would multiply the first gradient by 300.
        """
        zero(self.conv if self.norm is None else self.norm)

    def init_paper(self) -> None:
        """The released code's: He by fan-out, and a norm that starts at scale 0, so every gate at g(0)."""
        self.init_blend()
        zero(self.norm)

    def init_blend(self) -> None:
        """The same with the norm's scale at 1."""
        he_init(self.conv, mode="fan_out")
        if self.norm is not None:
            self.norm.reset_parameters()

    def read(self, largest: Tensor, mean: Tensor) -> Tensor:
        """Maximum and mean over the channels, (B, 1, *S) → gate logits (B, 1, *S), float32 or wider."""
        if self.pool == "both":
            pooled = torch.cat([largest, mean] if self.concat == "max_mean" else [mean, largest], 1)
        else:
            pooled = mean if self.pool == "avg" else largest
        return at_least_float32(self.normed(self.conv(pooled)))

    def logits(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → gate logits (B, 1, *S), float32 or wider."""
        return self.read(x.amax(1, keepdim=True), x.mean(1, keepdim=True))

    def factor(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → gate (B, 1, *S)."""
        return self.gate(self.logits(x))

    def fast_transform(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → x · gate."""
        conduits, descriptors = fast.pool(x)
        return fast.scale(x, self.gate(self.read(*descriptors)), conduits)
