"""Split attention in the place of a convolution."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attninject.errors import TooFewChannelsError

from .base import BATCH_NORM, CONV, Facts, hidden_width, pool
from .forms import ConvForm
from .gate import added, at_least_float32, laid_out_like, normalize, scale, zero
from .geometry import Geometry
from .options import Init, Int, Odd, Reduction, given
from .replacement import Replacement


class Splits(Replacement):
    """The new part of a split attention: how much each split of the convolution that is there counts.

    The old weight's inputs fall into R splits, u_r = W_r ∗ x_r, whose sum is the old result y. With
    `init="identity"` y + Σ (R a_r − 1) u_r, which is y where all a_r are 1 / R, as a zero last layer makes them, and
    u_R is y less the others; with `paper` Σ a_r u_r. A bias of the old convolution belongs to its last split.
    """

    tensors = ("weight", "bias")

    def __init__(
        self, geometry: Geometry, init: Init, radix: int, reduction: float, min_width: int, divisor: int
    ) -> None:
        super().__init__()
        groups, outputs, conv = geometry.groups, geometry.outputs, CONV[geometry.dims]
        each = geometry.inputs // groups
        if each % radix:
            fits = ", ".join(str(r) for r in range(2, each + 1) if each % r == 0)
            advice = f"choose radix among {fits}" if fits else "give it a convolution of more inputs"
            raise TooFewChannelsError(
                f"splat: {geometry.inputs} channels in {groups} groups fall into no {radix} splits; {advice}"
            )
        self.geometry, self.radix, self.uses_result = geometry, radix, init != "paper"
        width = max(min_width, hidden_width(geometry.inputs * radix, reduction, divisor))
        width = -(-width // groups) * groups
        self.fc1 = conv(outputs, width, 1, groups=groups)
        self.norm = BATCH_NORM[geometry.dims](width)
        self.fc2 = conv(width, outputs * radix, 1, groups=groups)
        if self.uses_result:
            zero(self.fc2)

    def splits(self, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
        """x: (B, C, *S), y: (B, O, *T), weight and bias of the old one → u_r: R of (B, O, *T)."""
        geometry, last = self.geometry, self.radix - 1
        parts = torch.unflatten(x, 1, (geometry.groups, self.radix, -1)).unbind(2)
        pairs = list(zip(parts, weight.chunk(self.radix, 1), strict=True))
        u = [geometry.convolve(part.flatten(1, 2), w) for part, w in pairs[:last]]
        if y is None:
            part, w = pairs[last]
            return [*u, geometry.convolve(part.flatten(1, 2), w, bias)]
        for one in u:
            y = y - one.to(y.dtype)
        return [*u, y]

    def shares(self, y: Tensor) -> Tensor:
        """y: (B, O, *T) → a: (B, R, O, 1, …), summing to 1 over R, in float32 or wider."""
        z = self.fc2(F.relu(normalize(self.norm, self.fc1(pool(y, "avg")))))
        logits = torch.unflatten(at_least_float32(z), 1, (self.geometry.groups, self.radix, -1))
        return torch.softmax(logits, 2).transpose(1, 2).flatten(2, 3)

    def forward(self, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x: (B, C, *S), y: (B, O, *T), weight and bias of the old one → (B, O, *T) in y's dtype."""
        u = self.splits(x, y, weight, bias)
        if y is None:
            made = added([scale(one, a) for one, a in zip(u, self.shares(added(u)).unbind(1), strict=True)])
            return laid_out_like(x, made)
        more = self.radix * self.shares(y) - 1
        return added([y, *(scale(one.to(y.dtype), a) for one, a in zip(u, more.unbind(1), strict=True))])

    def attention(self, x: Tensor, *rest: Any) -> dict[str, Tensor]:
        """x: (B, C, *S), y, weight, bias → `splits`: (B, R, O, 1, …), each one's share per channel; they sum to 1."""
        y, *tensors = rest
        return {"splits": self.shares(added(self.splits(x, None, *tensors)) if y is None else y).to(x.dtype)}

    def extra_repr(self) -> str:
        """The convolution that it belongs to."""
        return f"{self.geometry}, radix={self.radix}"


class SplitAttention(ConvForm):
    """Split attention of a convolution: Σ_r a_r · u_r, u_r = W_r ∗ x_r of R splits of its inputs.

    arXiv:2004.08955, section 3.1: in each cardinal group s = mean of Σ u_r over positions, a = softmax over r of
    W₂ relu(BN(W₁ s)) through max(R · C / `reduction`, `min_width`) channels, with `divisor`. `radix` is R; the
    cardinality is the number of the convolution's `groups`. As in the released code a split reads its part of the
    inputs, so that the R splits together have the weights of the one convolution.

    In the place of a convolution (`replace:`) these weights are those that are there, and y = Σ u_r its result:
    2 · Σ a_r u_r for R = 2 begins as y, and is computed as y + Σ (R a_r − 1) u_r (`Splits`), with R − 1 of R splits
    convolved anew. In each 3×3 convolution of a ResNet-50-D it has the 27.5 M parameters of ResNeSt-50. Alone it has
    a convolution `conv` of its own, of `kernel_size`, `groups` and `bias`, and `init="identity"` means `blend`.

    Deviations: in the paper each split ends with a norm and an activation of its own; here those that stand behind
    the old convolution act on the mixture. A stride stays the convolution's, where ResNeSt pools behind it.
    """

    facts = Facts(
        "splat", family="channel", spatial=True, paper="arXiv:2004.08955", equation="section 3.1",
        summary="split attention of a convolution: a softmax per channel over the splits of its inputs",
    )  # fmt: skip
    part = Splits

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        radix: Annotated[int, Int(min=2, max=32)] = 2,  # up to there R · (1 / R) is 1 in every dtype
        reduction: Annotated[float, Reduction()] = 4,
        min_width: Annotated[int, Int(min=1)] = 32,
        divisor: Annotated[int, Int(min=1)] = 1,
        kernel_size: Annotated[int, Odd()] = 3,
        groups: Annotated[int, Int(min=1)] = 1,
        bias: bool = False,
    ) -> None:
        super().__init__(**given(locals()))
