"""A 1×1 convolution of a descriptor as the matrix product that it is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dispatch import untouched


def pointwise(layer: nn.Module, z: Tensor) -> Tensor:
    """layer(z) of a convolution with 1×1 kernels; z: (B, C, *S), of few positions → (B, D, *S).

    torch's convolutions take up to twice as long as the product. A layer with hooks, or one that is more than
    torch's convolution by now, is called.
    """
    single = z.shape[2:].numel() == 1
    if not (single or z.is_contiguous()) or not _plain(layer):
        called: Tensor = layer(z)
        return called
    weight, bias, size = layer.weight.flatten(1), layer.bias, z.shape[2:]  # type: ignore[operator]
    if single:
        y = F.linear(z.flatten(1), weight, bias)  # type: ignore[arg-type]
    elif bias is None:
        y = torch.bmm(weight.expand(z.shape[0], -1, -1), z.flatten(2))
    else:
        y = torch.baddbmm(bias.view(1, -1, 1), weight.expand(z.shape[0], -1, -1), z.flatten(2))  # type: ignore[operator]
    return y.view(*y.shape[:2], *size)


def _plain(layer: nn.Module) -> bool:
    """Whether the layer is a convolution of torch's with 1×1 kernels, without hooks."""
    known = type(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and untouched(layer)
    return known and layer.weight[0, 0].numel() == 1  # type: ignore[index]
