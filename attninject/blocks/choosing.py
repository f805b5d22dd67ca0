"""Blocks that choose positions: those of the largest scores, and no others."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any

import torch
from torch import Tensor

from .base import CONV, Block, Facts, GateBlock, count
from .gate import at_least_float32
from .options import Count, Init, Number, Odd, Positive, given


class Choosing(Block):
    """A block that does something at k positions: a number of them, or a fraction of them, by its option `k`."""

    def __init__(self, channels: int, dims: int, init: str, **args: Any) -> None:
        super().__init__(channels, dims, init, **args)
        # of a fraction whole numbers, since the number of positions may be symbolic in export
        part = Fraction(float(args["k"])).limit_denominator(10**9)
        self.k, self.numerator, self.denominator = args["k"], part.numerator, part.denominator

    def chosen(self, n: int) -> int:
        """How many of n positions: at least one, at most all."""
        if self.k >= 1:
            return min(int(self.k), n)
        return max(1, n * self.numerator // self.denominator)


class HardAttention(Choosing, GateBlock):
    """Hard attention: x at the k positions of the largest scores s = w ∗ x, 0 elsewhere.

    arXiv:1502.03044, section 4.1 (a position is taken or not), with the straight-through gradient of
    arXiv:1611.01144, section 2.2: forward the mask m of the k largest s + γG, backward as if it were k · p,
    p = softmax((s + γG) / τ) over the positions. In train mode G is Gumbel noise, so that with γ = 1 the k positions
    are a sample without replacement from softmax(s) (arXiv:1903.06059, section 2.3).

    `k` is a number of positions (all of them, where there are fewer) or a fraction (at least one position),
    `kernel_size` that of w, `temperature` τ, `gumbel` γ: 0, the default, draws no random number.

    A mask never returns x, so `init="identity"` means `blend`.

    Deviations: the first paper samples one position and learns by REINFORCE, in whose place the straight-through
    gradient stands; with k = 1 and γ = 1 that is the second paper's.
    """

    facts = Facts(
        "hard_attention", family="spatial", spatial=True, paper="arXiv:1502.03044", equation="section 4.1",
        summary="hard attention: the k positions of the largest scores and no others, learnt straight through",
    )  # fmt: skip

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        k: Annotated[float, Count()] = 0.25,
        kernel_size: Annotated[int, Odd()] = 1,
        temperature: Annotated[float, Positive()] = 1,
        gumbel: Annotated[float, Number(min=0)] = 0,
    ) -> None:
        super().__init__(**given(locals()))
        self.temperature, self.gumbel = float(temperature), float(gumbel)
        self.score = CONV[dims](channels, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.initialise()

    def needs_blend(self) -> bool:
        """Always: what is masked is gone."""
        return True

    def factor(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → the mask (B, 1, *S), float32 or wider, with the gradient of k · p."""
        s = at_least_float32(self.score(x)).flatten(2)
        if self.training and self.gumbel > 0:
            s = s - self.gumbel * torch.log(-torch.log(torch.rand_like(s).clamp(min=1e-20)))
        k = self.chosen(count(x))
        soft = k * torch.softmax(s / self.temperature, 2)
        hard = torch.zeros_like(s).scatter(2, torch.topk(s, k, dim=2)[1], 1.0)
        return torch.unflatten(hard + (soft - soft.detach()), 2, x.shape[2:])
