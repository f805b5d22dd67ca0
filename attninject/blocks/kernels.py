"""Selective kernels in the place of a convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attninject.errors import BlockError

from .base import BATCH_NORM, CONV, Facts, he_init, hidden_width, pool
from .forms import ConvForm
from .gate import added, at_least_float32, blend, new_alpha, normalize, scale
from .geometry import Geometry
from .options import Branches, Init, Int, Odd, Reduction, given
from .replacement import Replacement


class KernelSelection(Replacement):
    """The new part of a selective kernel: the branches beside the convolution that is there, and the choice.

    u_1 = y is the old one's result, u_m = BN(conv_m(x)); V = Σ a_m u_m with a softmax over the branches for each
    channel. With `init="identity"` y + α(V − y), α = 0; with `paper` V.
    """

    alpha: nn.Parameter | None

    def __init__(
        self,
        geometry: Geometry,
        init: Init,
        branches: Sequence[Sequence[int]],
        reduction: float,
        min_width: int,
        branch_groups: int,
        divisor: int,
        norm: bool,
    ) -> None:
        super().__init__()
        self.geometry, dims, outputs = geometry, geometry.dims, geometry.outputs
        width = max(min_width, hidden_width(outputs, reduction, divisor))
        groups = max(geometry.groups, math.gcd(geometry.inputs, outputs, branch_groups))
        self.paths = nn.ModuleList(_branch(geometry, k, d, groups) for k, d in branches)
        self.norms = nn.ModuleList(BATCH_NORM[dims](outputs) for _ in branches) if norm else None
        self.fc_reduce = CONV[dims](outputs, width, 1, bias=False)
        self.norm = BATCH_NORM[dims](width)
        self.fc_select = CONV[dims](width, outputs * (1 + len(branches)), 1, bias=False)
        self.register_parameter("alpha", None if init == "paper" else new_alpha())
        for layer in self.modules():
            if isinstance(layer, CONV[dims]):
                he_init(layer, mode="fan_out")

    def features(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """x: (B, C, *S), y: (B, O, *T) → what each branch makes: M of (B, O, *T)."""
        made = [path(x) for path in self.paths]
        if self.norms is not None:
            made = [normalize(norm, u) for norm, u in zip(self.norms, made, strict=True)]
        return [y, *made]

    def weights(self, features: list[Tensor]) -> Tensor:
        """M of (B, O, *T) → (B, M, O, 1, …), summing to 1 over M, in float32 or wider."""
        z = F.relu(normalize(self.norm, self.fc_reduce(pool(added(features), "avg"))))
        logits = torch.unflatten(self.fc_select(z), 1, (len(features), self.geometry.outputs))
        return torch.softmax(at_least_float32(logits), 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x: (B, C, *S), y: (B, O, *T) → (B, O, *T) in y's dtype."""
        features = self.features(x, y)
        v = added([scale(u, a) for u, a in zip(features, self.weights(features).unbind(1), strict=True)])
        return v.to(y.dtype) if self.alpha is None else blend(y, v, self.alpha)

    def attention(self, x: Tensor, *rest: Tensor | None) -> dict[str, Tensor]:
        """x: (B, C, *S), y → `branches`: (B, M, O, 1, …), each branch's weight per channel; they sum to 1."""
        y = rest[0]
        assert y is not None
        return {"branches": self.weights(self.features(x, y)).to(x.dtype)}

    def extra_repr(self) -> str:
        """The convolution that it belongs to."""
        return str(self.geometry)


def _branch(geometry: Geometry, kernel: int, dilation: int, groups: int) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
    """A convolution of another field, in the middle of which the old one's field lies."""
    try:
        padding = geometry.around(kernel, dilation)
    except BlockError as error:
        raise BlockError(f"selective_kernel: {error}") from error
    conv: nn.Conv1d | nn.Conv2d | nn.Conv3d = CONV[geometry.dims](
        geometry.inputs, geometry.outputs, kernel, geometry.stride, padding, dilation,  # type: ignore[arg-type]
        groups, bias=False,
    )  # fmt: skip
    return conv


class SelectiveKernel(ConvForm):
    """Selective kernel of a convolution and others beside it: Σ_m a_m · u_m, a softmax over the branches per channel.

    arXiv:1903.06586, eq. 1-6: U = Σ u_m, s = mean of U over positions, z = relu(BN(W s)) of width
    d = max(O / r, L), a = softmax over m of A_m z. `branches` are pairs [kernel size, dilation] of those beside the
    first, with `branch_groups` groups (or as many as the first has, where these are more) and a batch norm each
    (`norm`); `reduction` is r, `min_width` L, which applies after `divisor`.

    In the place of a convolution (`replace:`) that is the first branch, and the result y + α(V − y), α = 0: the same
    function until training begins (`KernelSelection`). In each 3×3 convolution of a ResNeXt-50 (32×4d) it has the
    27.5 M parameters of SKNet-50. Alone it has a convolution `conv` of its own, of `kernel_size`, `groups` and
    `bias`, and `init="identity"` means `blend`.

    Deviations: in the paper each branch ends with a norm and an activation of its own; here those that stand
    behind the old convolution act on the mixture, and the other branches have the norm alone. `branch_groups` is
    cut to its greatest common divisor with the channels.
    """

    facts = Facts(
        "selective_kernel", family="channel", spatial=True, paper="arXiv:1903.06586", equation="1-6",
        summary="selective kernel in the place of a convolution, which is its first branch",
    )  # fmt: skip
    part = KernelSelection

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        branches: Annotated[Sequence[Sequence[int]], Branches(min=1)] = ((3, 2),),
        reduction: Annotated[float, Reduction()] = 16,
        min_width: Annotated[int, Int(min=1)] = 32,
        branch_groups: Annotated[int, Int(min=1)] = 32,
        divisor: Annotated[int, Int(min=1)] = 1,
        norm: bool = True,
        kernel_size: Annotated[int, Odd()] = 3,
        groups: Annotated[int, Int(min=1)] = 1,
        bias: bool = False,
    ) -> None:
        super().__init__(**given(locals()))
