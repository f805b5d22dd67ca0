"""SCA-CNN's attention: channel-wise, then spatial, conditioned on a second value or on the features themselves."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from .base import CONV, Facts, column, hidden_width, pool
from .gate import Gate, GateKind, at_least_float32, scale, zero
from .options import Init, Int, Reduction, given
from .paired import PairBlock


class SCA(PairBlock):
    """Spatial and channel-wise attention: y = x · β(x), then y · α(y).

    arXiv:1611.05594, eq. 4-7. With s the mean of x over positions, h the condition, k = C / `reduction`:

        β = g(W'ᵀ tanh(w_c s_i + b_c + W_hc h) + b')      per channel i,  w_c, b_c, W' vectors of k
        α = g(Wᵀ tanh(W_s x_j + b_s + W_hs h) + b)        per position j

    h is the second value: in the paper, on image captioning, the state of the LSTM that asks, a vector; of a map or of
    tokens it is their mean. Without one h is s itself, the mean of the map that the half sees. An `order` of
    spatial_first is α before β; a `gate` of softmax is over the channels, and over the positions.

    Deviations: a backbone has no state that asks, hence h = s where none is given.
    Under `init="identity"` a softmax over K numbers is multiplied by K, formed so that it is exactly 1 where
    all logits are equal: exp(z) over the mean of exp(z).
    """

    facts = Facts(
        "sca", family="both", spatial=False, paper="arXiv:1611.05594", equation="4-7",
        summary="SCA-CNN: channel-wise, then spatial attention, conditioned on a second value or on the features",
    )  # fmt: skip

    def __init__(
        self,
        channels: int,
        other_channels: int | None = None,
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
        self.channel_context = nn.Linear(self.other_channels, width, bias=False)
        self.channel_score = nn.Linear(width, 1)
        self.spatial_value = conv(channels, width, 1)
        self.spatial_context = nn.Linear(self.other_channels, width, bias=False)
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

    def channel(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        """x: (B, C, *S), h: (B, other_channels) or None → β: (B, C, 1, …)."""
        s = pool(x, "avg").flatten(1)
        context = self.channel_context(s if h is None else h)
        hidden = torch.tanh(self.channel_value(s.unsqueeze(2)) + context.unsqueeze(1))
        return self.factors(column(self.channel_score(hidden).squeeze(2), x))

    def spatial(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        """x: (B, C, *S), h: (B, other_channels) or None → α: (B, 1, *S)."""
        context = self.spatial_context(pool(x, "avg").flatten(1) if h is None else h)
        hidden = torch.tanh(self.spatial_value(x) + column(context, x))
        return self.factors(self.spatial_score(hidden))

    def both(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        """x: (B, C, *S), h: (B, other_channels) or None → the shape of x."""
        if self.order == "channel_first":
            y = scale(x, self.channel(x, h))
            return scale(y, self.spatial(y, h))
        y = scale(x, self.spatial(x, h))
        return scale(y, self.channel(y, h))

    def alone(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → the same shape, conditioned on itself."""
        return self.both(x, None)

    def paired(self, x: Tensor, other: Tensor) -> Tensor:
        """x: (B, C, *S), other: (B, other_channels, *T) → the shape of x."""
        return self.both(x, pool(other, "avg").flatten(1))

    def attention(self, x: Tensor, other: Tensor | None = None) -> dict[str, Tensor]:
        """x: (B, C, *S) → `channel`: (B, C, 1, …) and `spatial`: (B, 1, *S), the second for x · the first."""
        h = None if other is None else pool(other, "avg").flatten(1)
        if self.order == "channel_first":
            channel = self.channel(x, h).to(x.dtype)
            return {"channel": channel, "spatial": self.spatial(x * channel, h).to(x.dtype)}
        spatial = self.spatial(x, h).to(x.dtype)
        return {"channel": self.channel(x * spatial, h).to(x.dtype), "spatial": spatial}


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
