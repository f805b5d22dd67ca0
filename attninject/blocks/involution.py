"""Involution in the place of a convolution: each position makes the kernel that gathers its surroundings."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attninject.errors import BlockError

from .attend import saturated
from .base import BATCH_NORM, CONV, Facts, hidden_width, static_shape
from .forms import ConvForm
from .gate import at_least_float32, blend, laid_out_like, new_alpha, normalize
from .geometry import Geometry
from .options import Init, Int, Odd, Reduction, given
from .replacement import Replacement


class Involving(Replacement):
    """The new part of an involution: f(x) of another kernel for each position, in the place of the old result y.

    Nothing of the old convolution is in it but where it lies, so with `init="identity"` it is y + α(f(x) − y), α = 0;
    with `paper` f(x).
    """

    alpha: nn.Parameter | None

    def __init__(
        self,
        geometry: Geometry,
        init: Init,
        kernel_size: int,
        group_channels: int,
        reduction: float,
        softmax: bool,
        divisor: int,
    ) -> None:
        super().__init__()
        channels, dims = geometry.inputs, geometry.dims
        if channels != geometry.outputs:
            raise BlockError(f"involution keeps the channels, and ({geometry}) makes others")
        self.geometry = _widened(geometry, kernel_size)
        self.points, self.softmax = math.prod(self.geometry.kernel), softmax
        self.groups = channels // math.gcd(channels, group_channels)
        self.uses_result = init != "paper"
        hidden = hidden_width(channels, reduction, divisor)
        self.reduce = CONV[dims](channels, hidden, 1, bias=False)
        self.norm = BATCH_NORM[dims](hidden)
        self.span = CONV[dims](hidden, self.points * self.groups, 1)
        self.register_parameter("alpha", new_alpha() if self.uses_result else None)

    def windows(self, x: Tensor) -> list[Tensor]:
        """x: (B, C, *S) → what each point of the kernel sees, in turn: K of (B, C, *T), no copies."""
        geometry = self.geometry
        x, zeros = geometry.padded(x)
        x = F.pad(x, [n for side in reversed(zeros) for n in (side, side)])
        lies = list(
            zip(static_shape(x)[2:], geometry.kernel, geometry.stride, geometry.dilation, strict=True)
        )
        counts = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in lies]
        seen = []
        for point in itertools.product(*(range(k) for k in geometry.kernel)):
            cut = [
                slice(d * i, d * i + s * (count - 1) + 1, s)
                for i, count, (_, _, s, d) in zip(point, counts, lies, strict=True)
            ]
            seen.append(x[(slice(None), slice(None), *cut)])
        return seen

    def kernels(self, x: Tensor) -> Tensor:
        """The middle of each window, (B, C, *T) → its kernel for each group: (B, G, K, *T), float32 or wider."""
        z = at_least_float32(self.span(F.relu(normalize(self.norm, self.reduce(x)))))
        made = torch.unflatten(z, 1, (self.groups, self.points))
        return torch.softmax(made, 2) if self.softmax else made

    def involved(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → f(x): (B, C, *T), summed in float32 or wider."""
        seen = self.windows(x)
        each = self.kernels(seen[self.points // 2]).unsqueeze(3).unbind(2)  # (B, G, 1, *T)
        products = (torch.unflatten(s, 1, (self.groups, -1)) * k for s, k in zip(seen, each, strict=True))
        y = functools.reduce(torch.add, products)  # added up as they come: a list would be K maps
        return laid_out_like(x, y.flatten(1, 2))

    def forward(self, x: Tensor, y: Tensor | None) -> Tensor:
        """x: (B, C, *S), y: (B, C, *T) → (B, C, *T) in their dtype."""
        f = self.involved(x)
        return saturated(f, x.dtype) if self.alpha is None or y is None else blend(y, f, self.alpha)

    def attention(self, x: Tensor, *rest: Tensor | None) -> dict[str, Tensor]:
        """x: (B, C, *S) → `kernels`: (B, G, K, *T), each group's kernel at each position, its points in turn."""
        return {"kernels": self.kernels(self.windows(x)[self.points // 2]).to(x.dtype)}

    def extra_repr(self) -> str:
        """How it lies, and its groups."""
        return f"{self.geometry}, groups={self.groups}"


def _widened(geometry: Geometry, size: int) -> Geometry:
    """The same lie for a kernel of `size` on each axis."""
    kernel, dilation = (size,) * geometry.dims, geometry.dilation[0]
    if geometry.kernel == kernel:
        return geometry
    try:
        edges = tuple(n for side in reversed(geometry.around(size, dilation)) for n in (side, side))
    except BlockError as error:
        raise BlockError(f"involution: {error}") from error
    return replace(geometry, kernel=kernel, dilation=(dilation,) * geometry.dims, edges=edges)


class Involution(ConvForm):
    """Involution: y_p = Σ_k H_p,k · x_{p + k}, H_p = W₂ relu(BN(W₁ x_p)), a kernel for each position and group.

    arXiv:2103.06255, eq. 4-6: H_p holds `kernel_size`² numbers for each of C / `group_channels` groups of channels,
    made through C / `reduction` channels, rounded with `divisor`. `group_channels` is cut to its greatest common
    divisor with C. With `softmax` over the kernel's points it is the dynamic convolution of arXiv:1901.10430, eq. 4-5,
    but for the hidden layer: the one that the empirical study of spatial attention (arXiv:1904.05873) compares.

    In the place of a convolution (`replace:`) it takes over where that lies, with its stride and dilation, and has a
    field of its own, by default 7×7 in place of 3×3 as in the paper; y + α(f(x) − y), α = 0, is the same function
    until training begins (`Involving`), and in each 3×3 convolution of a ResNet-50 the bottlenecks are RedNet-50's.
    Alone `init="identity"` means `blend`.

    Deviations: with a stride the released code makes the kernel of a mean over the stride's square, here of the
    position in the window's middle. The products of kernels and values are no convolution or matrix product, which
    is all that a plan counts as multiply-accumulates.
    """

    facts = Facts(
        "involution", family="spatial", spatial=True, paper="arXiv:2103.06255", equation="4-6",
        summary="involution: each position makes the kernel that gathers its surroundings",
    )  # fmt: skip
    part = Involving
    reads_conv = False
    ALONE = ()

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        kernel_size: Annotated[int, Odd()] = 7,
        group_channels: Annotated[int, Int(min=1)] = 16,
        reduction: Annotated[float, Reduction()] = 4,
        softmax: bool = False,
        divisor: Annotated[int, Int(min=1)] = 1,
    ) -> None:
        super().__init__(**given(locals()))

    def transform(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → the same shape; float32 or wider for a sum that is to be blended."""
        f: Tensor = self.new.involved(x)  # type: ignore[operator]
        return f if self.alpha is not None else saturated(f, x.dtype)
