"""Blocks that are no attention: what a sweep puts in its place, to see whether attention or mere parameters helped.

They are known by name (a run's file must say what was in it) and stand in no list: nobody should choose one.
"""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from .base import CONV, Block, BlockSpec
from .gate import zero
from .options import Init, Int, given


class Bottleneck(Block):
    """x + W₂ relu(W₁ x), both 1×1 convolutions with bias, W₂ and its bias zero at first: a residual adapter.

    The form is Houlsby et al. 2019 (arXiv:1902.00751, section 2.1) without their norm, which an identity at the
    start does not need. With C channels and `hidden` = h it has 2Ch + h + C parameters: SE's own number where
    h = C / 16. No pooling and no gate: each position is changed by itself, and added to, not scaled.
    """

    def __init__(
        self,
        channels: int,
        *,
        hidden: Annotated[int, Int(min=1)] = 1,
        dims: int = 2,
        init: Init = "identity",
    ) -> None:
        super().__init__(**given(locals()))
        self.down = CONV[dims](channels, hidden, 1)
        self.up = CONV[dims](hidden, channels, 1)
        self.initialise()

    def init_identity(self) -> None:
        """Zero the last layer."""
        zero(self.up)

    def transform(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → x + what the two layers make of it."""
        change: Tensor = self.up(F.relu(self.down(x)))
        return x + change.to(x.dtype)

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """Nothing: it attends to nothing."""
        return {}


def hidden_for(parameters: int, channels: int) -> int:
    """The width whose `Bottleneck` comes nearest to so many parameters; at least 1.

    >>> hidden_for(2 * 64 * 4 + 4 + 64, 64)
    4
    """
    return max(1, round((parameters - channels) / (2 * channels + 1)))


BOTTLENECK = "control/bottleneck"

CONTROLS = {
    BOTTLENECK: BlockSpec(
        BOTTLENECK,
        "control",
        False,
        paper="arXiv:1902.00751",
        summary="x + W₂ relu(W₁ x), 1×1: the same parameters without attention",
        cls=Bottleneck,
        dims=Bottleneck.supported_dims,
    )
}
"""Name → row, for `registry.get` alone."""
