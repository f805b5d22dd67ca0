"""Masks that are computed by a small network of their own: bottom-up top-down, or step by step."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import BATCH_NORM, CONV, Facts, GateBlock, he_init, hidden_width, static_shape
from .gate import Gate, GateKind, Normed, at_least_float32, scale, zero
from .options import Init, Int, Reduction, given


class NormReLUConv(Normed):
    """conv(relu(BN(x))), size kept: a layer of a pre-activation residual unit."""

    def __init__(self, inputs: int, outputs: int, kernel: int, dims: int, bias: bool = False) -> None:
        super().__init__()
        self.norm = BATCH_NORM[dims](inputs)
        self.conv = CONV[dims](inputs, outputs, kernel, padding=kernel // 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, inputs, *S) → (B, outputs, *S)."""
        y: Tensor = self.conv(F.relu(self.normed(x)))
        return y


class ResidualUnit(nn.Sequential):
    """x + three pre-activation layers (1×1, 3×3, 1×1) through `hidden` channels (arXiv:1603.05027, eq. 5)."""

    def __init__(self, channels: int, hidden: int, dims: int) -> None:
        super().__init__(
            NormReLUConv(channels, hidden, 1, dims),
            NormReLUConv(hidden, hidden, 3, dims),
            NormReLUConv(hidden, channels, 1, dims),
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → the same shape and dtype."""
        y = x
        for layer in self:
            y = layer(y)
        return x + y.to(x.dtype)


class ResidualAttention(GateBlock):
    """Residual attention: (1 + M(x)) · T(x), T residual units, M a mask from a bottom-up top-down network.

    arXiv:1704.06904, eq. 3 (the residual form), 4 (mixed attention, σ per channel and position), section 3.2.
    M: `depth` times max-pooling (3 wide, stride 2) with `units` residual units behind each, as many units at
    the bottom again; then `depth` times linear interpolation back to the size before, adding a skip
    connection of one unit in between and `units` units; last, two layers BN, relu, 1×1 convolution, and σ.
    Options: `trunk`, the number of residual units in T (0: T(x) = x, the layers in front are the trunk);
    `depth`, `units`, `reduction` and `divisor` of the units' bottlenecks.

    `init="identity"`: the trunk's units start at zero in their last convolution, T(x) = x, and the 1 is
    dropped and σ doubled: 2σ(z) with the mask's last convolution at zero. Neither zero starves the other,
    since both stand beside a 1.

    Deviations: the paper's units in front of and behind the module (its p) are the host network's. Its
    other activations (channel and spatial normalisation, table 1, both worse) are left out. The default depth
    is that of its middle stage (3, 2 and 1 poolings at stages 1, 2 and 3). A side of one position stays one.
    An exported program with free sizes serves maps that the poolings leave at least two wide.
    """

    facts = Facts(
        "residual_attention", family="both", spatial=True, paper="arXiv:1704.06904", equation="3, 4",
        summary="residual attention: a trunk times 1 + a bottom-up top-down mask",
    )  # fmt: skip

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        trunk: Annotated[int, Int(min=0)] = 2,
        depth: Annotated[int, Int(min=1, max=6)] = 2,
        units: Annotated[int, Int(min=1)] = 1,
        reduction: Annotated[float, Reduction()] = 4,
        divisor: Annotated[int, Int(min=1)] = 1,
    ) -> None:
        super().__init__(**given(locals()))
        hidden = hidden_width(channels, reduction, divisor)

        def several(count: int) -> nn.Sequential:
            return nn.Sequential(*(ResidualUnit(channels, hidden, dims) for _ in range(count)))

        self.trunk = several(trunk)
        self.down = nn.ModuleList(several(units) for _ in range(depth))
        self.up = nn.ModuleList(several(units) for _ in range(depth))
        self.skips = several(depth - 1)
        self.mask = nn.Sequential(
            NormReLUConv(channels, channels, 1, dims),
            NormReLUConv(channels, channels, 1, dims, bias=True),
        )
        self.gate = Gate("sigmoid", identity=self.identity, skip=True)
        self.initialise()

    def init_identity(self) -> None:
        """Zero the mask's last convolution and the last convolution of each unit in the trunk."""
        zero(self.mask[-1].conv, *(unit[-1].conv for unit in self.trunk))  # type: ignore[arg-type, index]

    def init_paper(self) -> None:
        """He initialisation, as the paper's residual networks; zero bias."""
        for layer in self.modules():
            if isinstance(layer, CONV[self.dims]):
                he_init(layer)

    def logits(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → the mask before σ, (B, C, *S), float32 or wider."""
        y = x
        passed: list[Tensor] = []
        sizes: list[list[int]] = []
        for i, down in enumerate(self.down):
            sizes.append(static_shape(y)[2:])
            y = down(max_pool(y))
            for j, skip in enumerate(self.skips):
                if i == j:
                    passed.append(skip(y))
        for up in self.up:
            y = resize(up(y), sizes.pop())
            if passed:
                y = y + passed.pop()
        return at_least_float32(self.mask(y))

    def factor(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → what multiplies the trunk, the 1 of 1 + σ included: (B, C, *S), float32 or wider."""
        return self.gate(self.logits(x))

    def transform(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → T(x) · factor."""
        return scale(self.trunk(x), self.factor(x))


def max_pool(x: Tensor) -> Tensor:
    """Max over windows 3 wide with stride 2, centred on every other position: n → ⌈n / 2⌉ on each axis.

    Made of slices and maxima, which are deterministic and export in every number of dimensions.
    """
    for axis in range(2, x.ndim):
        half = (static_shape(x)[axis] + 1) // 2
        padded = F.pad(x, [0, 0] * (x.ndim - 1 - axis) + [1, 1], value=float("-inf"))
        a, b, c = [strided(padded, axis, start, half) for start in range(3)]
        x = torch.maximum(torch.maximum(a, b), c)
    return x


def strided(x: Tensor, axis: int, start: int, count: int) -> Tensor:
    """Every other entry of an axis: start, start + 2, …, `count` of them."""
    return x.transpose(0, axis)[start : start + 2 * count - 1 : 2].transpose(0, axis)


def resize(x: Tensor, size: list[int]) -> Tensor:
    """Linear interpolation to another size, half-pixel centres: (B, C, *S) → (B, C, *size).

    In 1D and 3D through the two-dimensional kernel: the others have no deterministic backward on a GPU.
    """
    if x.ndim == 4:
        return F.interpolate(x, size, mode="bilinear")
    if x.ndim == 3:
        return F.interpolate(x.unsqueeze(3), (size[0], 1), mode="bilinear").squeeze(3)
    channels, depth = static_shape(x)[1:3]
    y = torch.unflatten(F.interpolate(x.flatten(1, 2), size[1:], mode="bilinear"), 1, (channels, depth))
    y = F.interpolate(y.flatten(3), (size[0], size[1] * size[2]), mode="bilinear")
    return torch.unflatten(y, 3, size[1:])


class RecurrentGate(GateBlock):
    """A gate that is refined over steps by one recurrent cell, each step looking through the last gate.

    m₀ = 1, h₀ = 0; for t = 1 … T: e = R(x · m_{t−1}) (1×1, to C / `reduction`), h_t = GRU(e, h_{t−1}),
    m_t = g(W h_t) (1×1, back to C); the output is x · m_T, m_T: (B, C, *S). The weights are the same in every
    step. The loop is that of recurrent visual attention, arXiv:1406.6247, section 3.1: the state
    decides where to look, the glimpse changes the state. The cell is the convolutional GRU of
    arXiv:1511.06432, section 3.1: u = σ(W_u ∗ [e; h]), r = σ(W_r ∗ [e; h]), and
    h ← (1 − u) h + u tanh(W_c ∗ [e; r h]).
    `steps` is T, `kernel_size` the cell's, `bias` that of all layers. With `steps=1` the
    state in front of the cell is 0, and r has no effect.

    Deviations: the glimpse of 1406.6247 is a crop at a sampled place, trained by REINFORCE; here it is the
    soft product x · m, trained by backpropagation, as its authors' successors do (arXiv:1502.04623).
    """

    facts = Facts(
        "recurrent_gate", family="both", spatial=True, paper="arXiv:1406.6247", equation="section 3.1",
        summary="a gate refined over steps by one convolutional GRU",
    )  # fmt: skip

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        steps: Annotated[int, Int(min=1, max=32)] = 3,
        kernel_size: Literal[1, 3, 5, 7] = 3,
        reduction: Annotated[float, Reduction()] = 16,
        bias: bool = True,
        divisor: Annotated[int, Int(min=1)] = 1,
        gate: GateKind = "sigmoid",
    ) -> None:
        super().__init__(**given(locals()))
        hidden = hidden_width(channels, reduction, divisor)
        conv = CONV[dims]
        self.steps, self.hidden = steps, hidden
        self.read = conv(channels, hidden, 1, bias=bias)
        self.update = conv(2 * hidden, hidden, kernel_size, padding=kernel_size // 2, bias=bias)
        self.reset = conv(2 * hidden, hidden, kernel_size, padding=kernel_size // 2, bias=bias)
        self.candidate = conv(2 * hidden, hidden, kernel_size, padding=kernel_size // 2, bias=bias)
        self.out = conv(hidden, channels, 1, bias=bias)
        self.gate = Gate(gate, identity=self.identity)
        self.initialise()

    def init_identity(self) -> None:
        """Zero the layer behind which the gate is: z = 0 in every step."""
        zero(self.out)

    def init_paper(self) -> None:
        """Torch's weights (the papers name none), zero biases."""
        for layer in (self.read, self.update, self.reset, self.candidate, self.out):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def cell(self, e: Tensor, h: Tensor) -> Tensor:
        """e, h: (B, hidden, *S) → the next state; its gates in float32 or wider."""
        both = torch.cat([e, h], 1)
        u = torch.sigmoid(at_least_float32(self.update(both))).to(h.dtype)
        r = torch.sigmoid(at_least_float32(self.reset(both))).to(h.dtype)
        new = torch.tanh(at_least_float32(self.candidate(torch.cat([e, r * h], 1)))).to(h.dtype)
        return h + u * (new - h)

    def factor(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → the last step's gate (B, C, *S), float32 or wider."""
        e = self.read(x)
        h = self.cell(e, torch.zeros_like(e))
        gate = self.gate(self.out(h))
        for _ in range(1, self.steps):
            h = self.cell(self.read(scale(x, gate)), h)
            gate = self.gate(self.out(h))
        return gate
