"""Dual attention: between positions, between channels, and both at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import torch
from torch import Tensor, nn

from attninject.blocks.fast.dispatch import SMALL, untouched

from .attend import Additive, attend, attention_rows, rows, unrows
from .base import CONV, Block, Facts, hidden_width
from .fast import affinity as fast
from .gate import at_least_float32
from .options import Backend, Init, Int, Reduction, given
from .precision import product


class Weighted(Additive):
    """Shared by both halves: x + γ · gathered(x), γ a learnt number that starts at zero, as published."""

    if TYPE_CHECKING:
        gamma: nn.Parameter

    def init_identity(self) -> None:
        """Set γ to 0."""
        nn.init.zeros_(self.gamma)

    def init_paper(self) -> None:
        """The same: the published block starts as the identity."""
        self.init_identity()

    def init_blend(self) -> None:
        """Set γ to 1."""
        nn.init.ones_(self.gamma)

    def gathered(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → the weighted sums, the same shape."""
        raise NotImplementedError

    def branch(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → γ · gathered(x)."""
        return (self.gamma * self.gathered(x)).to(x.dtype)


class PositionAttention(Weighted):
    """DANet's position attention: x + γ Σ_j softmax_j(B_iᵀ C_j) D_j, B, C, D 1×1 convolutions of x.

    arXiv:1809.02983, eq. 1-2. B and C have the hidden width, D has C channels; all have a `bias`. Keys
    of B, C, D: `query`, `key`, `value`.

    Memory is linear in the positions, in training too; not linear: `attention(x)` and second derivatives.
    Deviations: none from the paper, whose formula has no 1/√d, or the released code.
    """

    facts = Facts(
        "danet_pam", family="spatial", spatial=False, paper="arXiv:1809.02983", equation="1-2",
        summary="DANet's attention between positions, in linear memory",
    )  # fmt: skip
    fast_from = (
        2**15
    )  # the plain form copies rows for the fused kernel, which takes longer than a fast form's Python

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        reduction: Annotated[float, Reduction()] = 8,
        bias: bool = True,
        divisor: Annotated[int, Int(min=1)] = 1,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(**given(locals()))
        width, conv = hidden_width(channels, reduction, divisor), CONV[dims]
        self.query = conv(channels, width, 1, bias=bias)
        self.key = conv(channels, width, 1, bias=bias)
        self.value = conv(channels, channels, 1, bias=bias)
        self.gamma = nn.Parameter(torch.zeros(1))
        self.initialise()

    def gathered(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → the attended D, the same shape."""
        q, k, v = [rows(t).unsqueeze(1) for t in [self.query(x), self.key(x), self.value(x)]]
        return unrows(attend(q, k, v, 1.0).squeeze(1), x)

    def fast_applies(self, x: Tensor) -> bool:
        """On a CPU and in full precision; torch's fused kernels do the rest better."""
        return x.device.type == "cpu" and at_least_float32(x) is x and not torch.is_autocast_enabled("cpu")

    def fast_onto(self, y: Tensor, x: Tensor) -> Tensor:
        """x and y: (B, C, *S) → y + γ · gathered(x)."""
        return fast.attend(self.query(x), self.key(x), self.value(x), y, self.gamma)

    def fast_transform(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → the same shape."""
        return self.fast_onto(x, x)

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """x: (B, C, *S) → `rows`: (B, N, N), the weights that position i gives to each j; they sum to 1."""
        return {"rows": attention_rows(rows(self.query(x)), rows(self.key(x)), 1.0).to(x.dtype)}


class ChannelAffinity(Weighted):
    """DANet's channel attention: x + γ softmax(−X Xᵀ) X, X = x with its positions in a row: (C, N).

    arXiv:1809.02983, eq. 3-4. `invert`: the minus.

    Deviations: the paper writes softmax(X Xᵀ). The released code takes the softmax of max(E) − E, E = X Xᵀ,
    which equals softmax(−E), as a softmax does not see a shift: channels attend to those *least* like them.
    `invert=True`, the default, is the code, `invert=False` the paper. E and its softmax are float32.
    """

    facts = Facts(
        "danet_cam", family="channel", spatial=False, paper="arXiv:1809.02983", equation="3-4",
        summary="DANet's attention between channels, one learnt number",
    )  # fmt: skip
    fast_from = SMALL

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        invert: bool = True,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(**given(locals()))
        self.invert = invert
        self.gamma = nn.Parameter(torch.zeros(1))
        self.initialise()

    def weights(self, flat: Tensor) -> Tensor:
        """flat: (B, C, N), float32 or wider → (B, C, C); each row sums to 1."""
        energy = product(flat, flat.transpose(1, 2))
        return torch.softmax(-energy if self.invert else energy, 2)

    def gathered(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → mixtures of channels, the same shape, float32 or wider."""
        flat = at_least_float32(x).flatten(2)
        return torch.unflatten(product(self.weights(flat), flat), 2, x.shape[2:])

    def fast_applies(self, x: Tensor) -> bool:
        """In full precision."""
        return at_least_float32(x) is x

    def fast_transform(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → the same shape."""
        return fast.mix(x, self.gamma, self.invert)

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """x: (B, C, *S) → `rows`: (B, C, C), the weights that channel i gives to each j; they sum to 1."""
        return {"rows": self.weights(at_least_float32(x).flatten(2)).to(x.dtype)}


class DANet(Block):
    """DANet's dual attention: x + γ_p P(x) + γ_c Q(x), P between positions, Q between channels.

    arXiv:1809.02983, section 3.4: the sum of both modules' outputs. `bias` is that of
    `PositionAttention`, `invert` of `ChannelAffinity`.

    Deviations: each published module adds x of its own and stands between convolutions of a segmentation
    head, which then sums them: that would be 2x. Here x is added once and the convolutions are left out.
    """

    facts = Facts(
        "danet", family="both", spatial=False, paper="arXiv:1809.02983", equation="1-4",
        summary="dual attention: between positions and between channels, summed",
    )  # fmt: skip
    fast_from = PositionAttention.fast_from

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        reduction: Annotated[float, Reduction()] = 8,
        bias: bool = True,
        divisor: Annotated[int, Int(min=1)] = 1,
        invert: bool = True,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(**given(locals()))
        self.position = PositionAttention(
            channels, dims=dims, init="paper", reduction=reduction, bias=bias, divisor=divisor
        )
        self.channel = ChannelAffinity(channels, dims=dims, init="paper", invert=invert)
        self.initialise()

    def init_blend(self) -> None:
        """Set both γ to 1; under the other inits both halves have zeroed theirs."""
        self.position.init_blend()
        self.channel.init_blend()

    def transform(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → the same shape."""
        return x + (self.position.branch(x) + self.channel.branch(x))

    def fast_applies(self, x: Tensor) -> bool:
        """If both halves are, and nobody would miss a call of theirs."""
        position, channel = self.position, self.channel
        known = type(position) is PositionAttention and type(channel) is ChannelAffinity
        return known and untouched(position, channel) and position.fast_applies(x)

    def fast_transform(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → the same shape."""
        return self.position.fast_onto(self.channel.fast_transform(x), x)

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """x: (B, C, *S) → `position`: (B, N, N) and `channel`: (B, C, C), the rows of both halves."""
        return {
            "position": self.position.attention(x)["rows"],
            "channel": self.channel.attention(x)["rows"],
        }
