"""Dynamic convolution: several kernels, mixed anew for each input."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import CONV, Facts, hidden_width, pool
from .forms import ConvForm
from .gate import at_least_float32
from .geometry import Geometry
from .options import Init, Int, Odd, Positive, Reduction, given
from .replacement import Replacement


class DynamicKernels(Replacement):
    """The new part of a dynamic convolution: K − 1 kernels beside the one that is there, and who gets how much.

    π(x) = softmax(W₂ relu(W₁ mean x) / τ) over K kernels. With `init="identity"` the kernels are W and W + D_k,
    D_k = 0 at init: since the π sum to 1, Σ π_k W_k = W + Σ π_k D_k, and y + Σ π_k D_k ∗ x is the dynamic
    convolution of the paper, which begins as the old one bit for bit. With `paper` the others are kernels of
    their own, and the old one's result is not used.
    """

    bias: nn.Parameter | None

    def __init__(
        self, geometry: Geometry, init: Init, kernels: int, reduction: float, temperature: float, divisor: int
    ) -> None:
        super().__init__()
        self.geometry, self.residual, self.temperature = geometry, init != "paper", temperature
        self.uses_result = self.residual
        self.tensors = () if self.residual else ("weight", "bias")
        hidden, conv = hidden_width(geometry.inputs, reduction, divisor), CONV[geometry.dims]
        self.fc1, self.fc2 = conv(geometry.inputs, hidden, 1), conv(hidden, kernels, 1)
        outputs = (
            kernels - 1
        ) * geometry.outputs  # one kernel after the other: a rank that every memory format knows
        self.weight = nn.Parameter(torch.zeros(outputs, *geometry.weight_shape[1:]))
        bias = nn.Parameter(torch.zeros(outputs)) if geometry.bias else None
        self.register_parameter("bias", bias)
        if not self.residual:
            nn.init.kaiming_normal_(self.weight, nonlinearity="relu")

    def shares(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → (B, K), what each kernel counts; they sum to 1, in float32 or wider."""
        logits = self.fc2(F.relu(self.fc1(pool(x, "avg"))))
        return torch.softmax(at_least_float32(logits).flatten(1) / self.temperature, 1)

    def forward(
        self, x: Tensor, y: Tensor | None, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """x: (B, C, *S), y: (B, O, *T) → (B, O, *T) in y's dtype; `weight` and `bias` of the old one under `paper`."""
        shares = self.shares(x)
        if self.residual:
            assert y is not None
            return y + self.geometry.convolve_mixed(x, shares[:, 1:], self.weight, self.bias).to(y.dtype)
        assert weight is not None
        weights = torch.cat([weight, self.weight])
        biases = None if bias is None or self.bias is None else torch.cat([bias, self.bias])
        return self.geometry.convolve_mixed(x, shares, weights, biases)

    def attention(self, x: Tensor, *rest: Tensor | None) -> dict[str, Tensor]:
        """x: (B, C, *S) → `kernels`: (B, K), what each kernel counts for each sample."""
        return {"kernels": self.shares(x).to(x.dtype)}

    def extra_repr(self) -> str:
        """The convolution that it belongs to, and how it is mixed."""
        how = f"residual={self.residual}, temperature={self.temperature}"
        return f"{self.geometry}, kernels={self.fc2.out_channels}, {how}"


class DynamicConv(ConvForm):
    """Dynamic convolution: Σ π_k(x) W_k ∗ x, π = softmax(W₂ relu(W₁ mean x) / τ) over K kernels.

    arXiv:1912.03458, section 3. `kernels` is K, `temperature` τ: the paper begins at 30 and lowers it to 1 within
    ten epochs; a training loop sets the attribute `temperature` of the new part. No file keeps that: set it again behind
    `ai.load`. `reduction` is that of W₁.

    In the place of a convolution (`replace:`) the first kernel is the one that is there, and the others W + D_k
    with D_k = 0: the same function until training begins (`DynamicKernels`). Alone it has a first kernel `conv` of its
    own, of `kernel_size`, `groups` and `bias`, and `init="identity"` means `blend`.

    Deviations: until a model is exported, two convolutions run in the place of one, the old and the mixture of
    what was added, or the old result would not come back bit for bit.
    """

    facts = Facts(
        "dynamic_conv", family="both", spatial=True, paper="arXiv:1912.03458", equation="section 3",
        summary="dynamic convolution: a softmax over several kernels, for each input anew",
    )  # fmt: skip
    part = DynamicKernels

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        kernels: Annotated[int, Int(min=2)] = 4,
        reduction: Annotated[float, Reduction()] = 4,
        temperature: Annotated[float, Positive()] = 30,
        divisor: Annotated[int, Int(min=1)] = 1,
        kernel_size: Annotated[int, Odd()] = 3,
        groups: Annotated[int, Int(min=1)] = 1,
        bias: bool = False,
    ) -> None:
        super().__init__(**given(locals()))
