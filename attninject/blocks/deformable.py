"""Deformable convolution: each kernel looks where it learnt to look, and as much as it learnt to."""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from attninject.errors import BlockError

from .base import Facts
from .forms import ConvForm
from .gate import Gate, at_least_float32, laid_out_like, tracing, zero
from .geometry import Geometry
from .options import Init, Int, Odd, given
from .replacement import Replacement


class Deformation(Replacement):
    """The new part of a deformable convolution: where its kernel looks around each position, and how much.

    A convolution `offset` of the same geometry, zero at init, gives 2K offsets and K logits for K points of the
    kernel, in each of `offset_groups` groups of channels. With `init="identity"` the masks are 2σ(z): offsets 0
    and masks 1, which is the old convolution but for rounding. To the last bit: where all offsets of a position are
    0 and all masks 1, it gives the old one's value, with the gradient of the new one.
    """

    tensors = ("weight", "bias")

    def __init__(self, geometry: Geometry, init: Init, offset_groups: int) -> None:
        super().__init__()
        if geometry.dims != 2:
            raise BlockError(f"deformable_conv works on 2D maps, and the convolution is {geometry.dims}D")
        if geometry.inputs % offset_groups:
            raise BlockError(
                f"deformable_conv: {geometry.inputs} channels fall into no {offset_groups} groups"
            )
        self.geometry, self.offset_groups = geometry, offset_groups
        self.exact = self.uses_result = init != "paper"
        self.points, self.gate = math.prod(geometry.kernel), Gate("sigmoid", identity=self.exact)
        outputs = 3 * self.points * offset_groups
        self.offset = nn.Conv2d(
            geometry.inputs, outputs, _pair(geometry.kernel), _pair(geometry.stride),
            _pair(geometry.padding or (0, 0)), _pair(geometry.dilation),
        )  # fmt: skip
        zero(self.offset)

    def looks(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, C, H, W) → offsets (B, 2GK, *T), as (down, right) of each point in turn, and masks (B, GK, *T)."""
        z = self.offset(self.geometry.padded(x)[0])
        offsets, logits = at_least_float32(z).tensor_split([2 * self.points * self.offset_groups], 1)
        return offsets, self.gate(logits)

    def forward(self, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x: (B, C, H, W), y: (B, O, *T), weight and bias of the old one → (B, O, *T) in y's dtype."""
        offsets, masks = self.looks(x)
        new = self.deformed(x, offsets, masks, weight, bias)
        if y is None:
            return new.to(x.dtype)
        still = (offsets == 0).all(1, keepdim=True) & (masks == 1).all(1, keepdim=True)
        new = new.to(y.dtype)
        return torch.where(still, y.detach() + (new - new.detach()), new)

    def deformed(
        self, x: Tensor, offsets: Tensor, masks: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """Σ over points of w · m · x(point + offset), in float32 or wider."""
        geometry = self.geometry
        given, padding = geometry.padded(at_least_float32(x))
        weight = at_least_float32(weight)
        added = weight.new_zeros(geometry.outputs) if bias is None else at_least_float32(bias)
        tensors = given, weight, offsets.to(given.dtype), masks.to(given.dtype), added
        if torch.onnx.is_in_onnx_export() and not tracing() and hasattr(torch.onnx, "ops"):  # newer than 2.6
            return self._onnx_node(*tensors, padding)
        import torchvision  # noqa: F401 (registers the operator; its own function looks at sizes, which tracing fixes)

        made: Tensor = torch.ops.torchvision.deform_conv2d(
            *tensors, *geometry.stride, *padding, *geometry.dilation, geometry.groups, self.offset_groups, True
        )  # fmt: skip
        return laid_out_like(x, made)

    def _onnx_node(
        self,
        x: Tensor,
        weight: Tensor,
        offsets: Tensor,
        masks: Tensor,
        bias: Tensor,
        padding: tuple[int, ...],
    ) -> Tensor:
        """The same as ONNX's own operator, which torch's exporter makes of none of torchvision's."""
        geometry = self.geometry
        shape = [x.shape[0], geometry.outputs, *offsets.shape[2:]]
        attributes: dict[str, Any] = {
            "strides": geometry.stride, "pads": padding * 2, "dilations": geometry.dilation,
            "group": geometry.groups, "offset_group": self.offset_groups,
        }  # fmt: skip
        inputs = [x, weight, offsets, bias, masks]
        made: Tensor = torch.onnx.ops.symbolic(
            "DeformConv", inputs, attributes, dtype=x.dtype, shape=shape, version=19
        )
        return made

    def attention(self, x: Tensor, *rest: Tensor | None) -> dict[str, Tensor]:
        """x: (B, C, H, W) → `offsets`: (B, 2GK, *T) in pixels, and `masks`: (B, GK, *T)."""
        offsets, masks = self.looks(x)
        return {"offsets": offsets.to(x.dtype), "masks": masks.to(x.dtype)}

    def extra_repr(self) -> str:
        """The convolution that it belongs to."""
        return f"{self.geometry}, offset_groups={self.offset_groups}, exact={self.exact}"


def _pair(numbers: tuple[int, ...]) -> tuple[int, int]:
    down, right = numbers
    return down, right


class DeformableConv(ConvForm):
    """Deformable convolution, version 2: Σ_k w_k · m_k · x(p + p_k + Δp_k), offsets Δp and masks m from x itself.

    arXiv:1811.11168, eq. 1: a convolution of the same kernel, stride and dilation gives 2K offsets and K
    logits of masks σ(z), zero at init. `offset_groups` groups of channels have their own. Through
    torchvision's `deform_conv2d`.

    In the place of a convolution (`replace:`) the weights are those that are there, and the masks 2σ(z), 1 at
    init: the same function until training begins (`Deformation`). Alone it has a convolution `conv` of its own, of
    `kernel_size`, `groups` and `bias`, and `init="identity"` means `blend`.

    Deviations: the old convolution runs beside the new one, or its result would not come back bit for bit. The
    paper's lower rate for the offsets (0.1) is left to the training. Without a second derivative.
    """

    facts = Facts(
        "deformable_conv", family="spatial", spatial=True, paper="arXiv:1811.11168", equation="1",
        summary="deformable convolution: learnt offsets and masks for every point of the kernel",
    )  # fmt: skip
    supported_dims = (2,)
    part = Deformation

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        offset_groups: Annotated[int, Int(min=1)] = 1,
        kernel_size: Annotated[int, Odd()] = 3,
        groups: Annotated[int, Int(min=1)] = 1,
        bias: bool = False,
    ) -> None:
        super().__init__(**given(locals()))
