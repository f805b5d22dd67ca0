"""Attention along time: in volumes of frames, and in clips whose frames lie in the batch."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attninject.errors import BlockError

from .base import Facts, GateBlock, hidden_width
from .gate import Gate, GateKind, Normed, zero
from .options import Init, Int, Odd, Reduction, given


class Temporal(GateBlock, Normed):
    """Gate along time: x · g(W₂ relu(BN(W₁ ∗ s))), s = mean of each frame, one gate per channel and frame.

    arXiv:2005.06803, section 3.2, the local branch: W₁ is a convolution of `kernel_size` along time to C / `reduction`
    channels, W₂ one of size 1 back to C. `norm` is the batch norm between them, `bias` that of both.

    Time is the first axis behind the channels of a volume (B, C, T, H, W) or a sequence (B, C, T). Maps are frames of
    clips that lie in the batch, (B · T, C, H, W) with T = `frames`, as in networks that treat a video frame by frame;
    with 1, the default, every map is a clip of its own.

    Deviations: the paper's other branch, a kernel along time for each video, is a layer for one number of frames
    and not here.
    """

    facts = Facts(
        "temporal", family="channel", spatial=True, paper="arXiv:2005.06803", equation="section 3.2",
        summary="a gate per channel and frame, from the frames before and after it",
    )  # fmt: skip

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        frames: Annotated[int, Int(min=1)] = 1,
        kernel_size: Annotated[int, Odd()] = 3,
        reduction: Annotated[float, Reduction()] = 4,
        norm: bool = True,
        bias: bool = False,
        divisor: Annotated[int, Int(min=1)] = 1,
        gate: GateKind = "sigmoid",
    ) -> None:
        super().__init__(**given(locals()))
        if frames > 1 and dims != 2:
            raise BlockError(
                f"block 'temporal': frames={frames}: the frames of a clip are counted where they lie in the batch; "
                f"with {dims} spatial dimensions the first is time"
            )
        hidden = hidden_width(channels, reduction, divisor)
        self.samples = frames
        self.conv1 = nn.Conv1d(channels, hidden, kernel_size, padding=kernel_size // 2, bias=bias)
        self.norm = nn.BatchNorm1d(hidden) if norm else None
        self.conv2 = nn.Conv1d(hidden, channels, 1, bias=bias)
        self.gate = Gate(gate, identity=self.identity)
        self.initialise()

    def init_identity(self) -> None:
        """Zero the last layer: every gate is 1."""
        zero(self.conv2)

    def factor(self, x: Tensor) -> Tensor:
        """x: (B, C, T, …) or (B · T, C, H, W) → a gate per channel and frame, beside x, float32 or wider."""
        clips = self.dims == 2
        s = self.of_clips(x) if clips else x.flatten(3).mean(3) if self.dims == 3 else x
        z = self.gate(self.conv2(F.relu(self.normed(self.conv1(s)))))
        if clips:
            z = z.transpose(1, 2).flatten(0, 1).unsqueeze(2)
        return torch.unflatten(z, 2, [-1] + [1] * (self.dims - 1))

    def of_clips(self, x: Tensor) -> Tensor:
        """Means of frames that lie in the batch: (B · T, C, H, W) → (B, C, T)."""
        if self.samples > 1 and x.shape[0] % self.samples:
            raise ValueError(f"temporal: {x.shape[0]} maps are no whole clips of {self.samples} frames")
        return torch.unflatten(x.mean([2, 3]), 0, (-1, self.samples)).transpose(1, 2)
