"""How a convolution lies on its input: what a new one in its place takes over."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from attninject.errors import BlockError

from .base import column
from .gate import laid_out_like, tracing

CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_PLAIN = {kind.forward: dims for dims, kind in {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}.items()}


@dataclass(frozen=True)
class Geometry:
    """Channels, kernel, stride, dilation, groups and padding of a convolution, and whether it has a bias.

    `edges`: zeros or other values in front of and behind each axis, the last axis first, as `F.pad` takes them;
    `mode`: which values. `by_size`: TensorFlow's "same", as many zeros as each input asks for.
    """

    dims: int
    inputs: int
    outputs: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    edges: tuple[int, ...]
    mode: str
    bias: bool
    by_size: bool = False

    @classmethod
    def of(cls, conv: nn.Module, forward: Any = None) -> Geometry:
        """Of a module of torch, or one that computes by the same forward.

        Args:
            conv: the module.
            forward: that of its class, where the class was extended since.

        Raises:
            BlockError: it is no convolution whose lie is known; the message says why.
        """
        kind = type(conv).__name__
        if not isinstance(conv, _ConvNd):
            raise BlockError(f"it takes the place of a convolution, and {kind} is none")
        if isinstance(conv, _ConvTransposeNd):
            raise BlockError(f"{kind} is transposed, which no new kernel can take over")
        runs = forward or type(conv).forward
        by_size = (runs.__module__.partition(".")[0], runs.__qualname__) == ("timm", "Conv2dSame.forward")
        dims = 2 if by_size else _PLAIN.get(runs)
        if dims is None:
            raise BlockError(
                f"{kind} has a forward of its own, whose padding or weights nobody can take over"
            )
        return cls(
            dims, conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.dilation, conv.groups,
            tuple(conv._reversed_padding_repeated_twice), conv.padding_mode, conv.bias is not None,
            by_size,
        )  # fmt: skip

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(outputs, inputs / groups, *kernel)."""
        return self.outputs, self.inputs // self.groups, *self.kernel

    @property
    def padding(self) -> tuple[int, ...] | None:
        """Zeros on both sides of each axis, the first axis first; None where the sides or the values differ."""
        front, behind = self.edges[::2][::-1], self.edges[1::2][::-1]
        even = front == behind and self.mode == "zeros" and not self.by_size
        return front if even else None

    def around(self, kernel: int, dilation: int) -> tuple[int, ...]:
        """Zeros on both sides of each axis for a kernel of another size, in the middle of which the old one lies.

        Raises:
            BlockError: there is no such kernel.
        """
        if self.padding is None:
            raise BlockError(f"no kernel of another size lies on ({self}), whose padding is uneven")
        size = (kernel - 1) * dilation
        fields = [d * (k - 1) for k, d in zip(self.kernel, self.dilation, strict=True)]
        wider = [2 * p + size - field for p, field in zip(self.padding, fields, strict=True)]
        if any(p < 0 or p % 2 for p in wider):
            raise BlockError(
                f"a branch [{kernel}, {dilation}] does not lie in the middle of ({self}), padding {self.padding}"
            )
        return tuple(p // 2 for p in wider)

    def padded(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """x and the zeros that a convolution is to add: x itself where it can, else x with its edges."""
        if self.padding is not None:
            return x, self.padding
        mode = "constant" if self.mode == "zeros" else self.mode
        edges = self._edges_by_size(x) if self.by_size else self.edges
        return F.pad(x, edges, mode=mode), (0,) * self.dims

    def _edges_by_size(self, x: Tensor) -> list[int]:
        """Zeros so that a map of n positions becomes one of n / stride, rounded up; the odd one stands behind."""
        edges: list[int] = []
        for n, k, s, d in zip(x.shape[2:], self.kernel, self.stride, self.dilation, strict=True):
            wanted = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
            edges = [wanted // 2, wanted - wanted // 2, *edges]
        return edges

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: (B, inputs, *S) → (B, outputs, *T) by another weight of the same shape."""
        x, padding = self.padded(x)
        return CONVOLVE[self.dims](x, weight, bias, self.stride, padding, self.dilation, self.groups)

    def convolve_mixed(self, x: Tensor, shares: Tensor, weights: Tensor, biases: Tensor | None) -> Tensor:
        """Each sample by its own mixture of M kernels, as one convolution in groups.

        Args:
            x: (B, inputs, *S).
            shares: (B, M), of each kernel for each sample.
            weights: (M · outputs, inputs / groups, *kernel), one kernel after the other.
            biases: (M · outputs,) or None.

        Returns:
            (B, outputs, *T).
        """
        each = (shares.shape[1], self.outputs)
        added = None if biases is None else shares.to(biases.dtype) @ biases.unflatten(0, each)
        if _size_is_open() or x.shape[0] == 0:
            parts = zip(shares.unbind(1), weights.unflatten(0, each).unbind(0), strict=True)
            y = functools.reduce(
                torch.add, (column(s.unsqueeze(1).to(x.dtype), x) * self.convolve(x, w) for s, w in parts)
            )
        else:
            y = laid_out_like(x, self._in_groups(x, shares.to(weights.dtype) @ weights.reshape(each[0], -1)))
        return y if added is None else y + column(added.to(y.dtype), y)

    def _in_groups(self, x: Tensor, kernels: Tensor) -> Tensor:
        """x: (B, inputs, *S), kernels: (B, numbers of one kernel) → (B, outputs, *T)."""
        x, padding = self.padded(x)
        count = x.shape[0]
        weight = kernels.reshape(count * self.outputs, *self.weight_shape[1:])
        flat = x.reshape(1, count * self.inputs, *x.shape[2:])
        y = CONVOLVE[self.dims](flat, weight, None, self.stride, padding, self.dilation, count * self.groups)
        return y.reshape(count, self.outputs, *y.shape[2:])

    def __str__(self) -> str:
        kernel = "×".join(map(str, self.kernel))
        shown = {"stride": self.stride, "dilation": self.dilation, "groups": self.groups}
        plain = {"stride": (1,) * self.dims, "dilation": (1,) * self.dims, "groups": 1}
        more = "".join(f", {k}={v}" for k, v in shown.items() if v != plain[k])
        return f"{self.inputs}, {self.outputs}, {kernel}{more}"


def _size_is_open() -> bool:
    """Whether the batch may be of any size, which the number of groups of a convolution must not be."""
    compiler: Any = torch.compiler  # before torch 2.7 it could not tell exporting from compiling
    return tracing() or bool(getattr(compiler, "is_exporting", compiler.is_compiling)())
