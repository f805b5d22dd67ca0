"""SCA-CNN's attention: channel-wise, then spatial, conditioned on the features themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from .base import CONV, Block, Facts, column, hidden_width, pool
from .gate import Gate, GateKind, at_least_float32, scale, zero
from .options import Init, Int, Reduction, given


class SCA(Block):
    """Spatial and channel-wise attention: y = x · β(x), then y · α(y).

    arXiv:1611.05594, eq. 4-7. With s the mean of x over positions, h the condition, k = C / `reduction`:

        β = g(W'ᵀ tanh(w_c s_i + b_c + W_hc h) + b')      per channel i,  w_c, b_c, W' vectors of k
        α = g(Wᵀ tanh(W_s x_j + b_s + W_hs h) + b)        per position j

    h is s itself, the mean of the map that the half sees. An `order` of
    spatial_first is α before β; a `gate` of softmax is over the channels, and over the positions.

    Deviations: in the paper, on image captioning, h is the state of the LSTM that asks; a backbone has none.
    Under `init="identity"` a softmax over K numbers is multiplied by K, formed so that it is exactly 1 where
    all logits are equal: exp(z) over the mean of exp(z).
    """

    facts = Facts(
        "sca", family="both", spatial=False, paper="arXiv:1611.05594", equation="4-7",
        summary="SCA-CNN: channel-wise, then spatial attention, conditioned on the features themselves",
    )  # fmt: skip

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        reduction: Annotated[float, Reduction()] = 4,
        divisor: Annotated[int, Int(min=1)] = 1,
        order: Literal["channel_first", "spatial_first"] = "channel_first",
        gate: Literal["softmax", GateKind] = "softmax",
    ) -> None:
        super().__init__(**given(locals()))
        width, conv = hidden_width(channels, reduction, divisor), CONV[dims]
        self.order = order
        self.channel_value = nn.Linear(1, width)
        self.channel_context = nn.Linear(channels, width, bias=False)
        self.channel_score = nn.Linear(width, 1)
        self.spatial_value = conv(channels, width, 1)
        self.spatial_context = nn.Linear(channels, width, bias=False)
        self.spatial_score = conv(width, 1, 1)
        self.whole = self.identity
        self.gate = None if gate == "softmax" else Gate(gate, identity=self.identity)
        self.initialise()

    def init_identity(self) -> None:
        """Zero both scores: all logits are 0."""
        zero(self.channel_score, self.spatial_score)

    def factors(self, z: Tensor) -> Tensor:
        """Logits z: (B, 1, *S) or (B, C, 1, …) → the factors, float32 or wider."""
        z = at_least_float32(z)
        return self.gate(z) if self.gate is not None else distribution(z, self.whole)

    def channel(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → β: (B, C, 1, …)."""
        s = pool(x, "avg").flatten(1)
        hidden = torch.tanh(self.channel_value(s.unsqueeze(2)) + self.channel_context(s).unsqueeze(1))
        return self.factors(column(self.channel_score(hidden).squeeze(2), x))

    def spatial(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → α: (B, 1, *S)."""
        context = self.spatial_context(pool(x, "avg").flatten(1))
        hidden = torch.tanh(self.spatial_value(x) + column(context, x))
        return self.factors(self.spatial_score(hidden))

    def transform(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → the same shape."""
        if self.order == "channel_first":
            y = scale(x, self.channel(x))
            return scale(y, self.spatial(y))
        y = scale(x, self.spatial(x))
        return scale(y, self.channel(y))

    def halves(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """Both halves in the order chosen."""
        return (self.channel, self.spatial) if self.order == "channel_first" else (self.spatial, self.channel)

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """x: (B, C, *S) → `channel`: (B, C, 1, …) and `spatial`: (B, 1, *S), the second for x · the first."""
        first, second = self.halves()
        earlier = first(x).to(x.dtype)
        later = second(x * earlier).to(x.dtype)
        if self.order == "channel_first":
            return {"channel": earlier, "spatial": later}
        return {"channel": later, "spatial": earlier}


def distribution(z: Tensor, identity: bool) -> Tensor:
    """Softmax over all but the batch; in its identity form times the count, exactly 1 where all z are equal.

    K · softmax(0) is not exactly 1 for every K, as 1/K is rounded. A sum of K ones is exactly K, and so is
    the quotient here. (Divided, not averaged: some devices average by multiplying with a rounded 1/K.)
    """
    flat = z.flatten(1)
    if not identity:
        return torch.softmax(flat, 1).reshape(z.shape)
    e = torch.exp(flat - flat.amax(1, keepdim=True))
    return (e / (e.sum(1, keepdim=True) / flat.shape[1])).reshape(z.shape)
