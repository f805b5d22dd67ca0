"""What the axes of a tensor mean, and the views that turn any layout into the one a block wants.

A block works on (B, C, L), (B, C, H, W) or (B, C, D, H, W). A site may hold that, the same with the
channels last, or tokens (B, N, C), where the first `prefix` tokens (class, register, distillation) bypass
the block and the others form a grid of H × W positions in row order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .errors import LayoutError

DIMS = {"NCHW": 2, "NHWC": 2, "NLC": 1, "NCL": 1, "NCDHW": 3, "NDHWC": 3}
RANK = {"NCHW": 4, "NHWC": 4, "NLC": 3, "NCL": 3, "NCDHW": 5, "NDHWC": 5}
CHANNELS_LAST = ("NHWC", "NLC", "NDHWC")


@dataclass(frozen=True)
class Layout:
    """A layout as measured at a site.

    Attributes:
        kind: a key of `RANK`; `NLC` are tokens.
        prefix: tokens in front that are no positions.
        grid: (H, W) of the other tokens, (D, H, W) in a video; None when they form no grid.
        ordered: False where neighbours in the tensor are none in the image: windows in the batch or beside the
            positions, an order of the network's own. Blocks that look at neighbours have no meaning there.
    """

    kind: str
    prefix: int = 0
    grid: tuple[int, ...] | None = None
    ordered: bool = True

    @property
    def dims(self) -> int:
        """Spatial dimensions that a block sees here."""
        return len(self.grid) if self.grid else DIMS[self.kind]

    @property
    def is_map(self) -> bool:
        """Whether blocks that look at neighbours have a meaning here."""
        return self.ordered and (self.grid is not None or self.kind != "NLC")

    def channels(self, shape: tuple[int, ...]) -> int:
        """The channel count of a tensor of this layout."""
        return shape[-1] if self.kind in CHANNELS_LAST else shape[1]

    def positions(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Extents of the spatial dimensions."""
        if self.grid:
            return self.grid
        if self.kind == "NLC":
            return (shape[1] - self.prefix,)
        return tuple(shape[1:-1] if self.kind in CHANNELS_LAST else shape[2:])

    def map_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of what the block is given: (B, C, positions…)."""
        return (shape[0], self.channels(shape), *self.positions(shape))

    def __str__(self) -> str:
        if not self.ordered:
            return f"{self.kind} unordered"
        if self.kind != "NLC" and not self.grid:
            return self.kind
        grid = "×".join(map(str, self.grid)) if self.grid else "no grid"
        return f"{self.kind} {self.prefix}+{grid}" if self.prefix else f"{self.kind} {grid}"


def run_block(
    block: nn.Module, x: Any, kind: str = "NCHW", prefix: int = 0, grid: tuple[int, ...] | None = None
) -> Any:
    """Call a block on a value of any layout; generated forwards and extended carriers call this.

    Args:
        block: takes and gives (B, C, …).
        x: the site's tensor, in the layout that the other arguments describe; see `Layout`.

    Returns:
        A tensor of x's shape; x itself while the block is disabled.

    Raises:
        LayoutError: the grid of the tokens of another input size cannot be told.
    """
    if getattr(block, "_attninject_disabled", False):
        return x
    call: Callable[[Any], Any] = _Leaf(block) if isinstance(x, fx.Proxy) else block
    if grid is None and kind in ("NCHW", "NCL", "NCDHW"):
        return call(x)
    if kind in ("NHWC", "NDHWC"):
        last = x.ndim - 1 if isinstance(x, Tensor) else RANK[kind] - 1
        return call(x.permute(0, last, *range(1, last))).permute(0, *range(2, last + 1), 1)
    tokens = x[:, prefix:] if prefix else x
    sequence = tokens if kind == "NCL" else tokens.transpose(1, 2)
    y = call(_to_map(sequence, grid, getattr(block, EXTENT, None)))
    y = y.flatten(2) if grid else y
    y = y if kind == "NCL" else y.transpose(1, 2)
    return torch.cat((x[:, :prefix], y), dim=1) if prefix else y


class _Leaf:
    """A block that somebody else's torch.fx tracer is to see as one call, as it sees torch's own layers."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __call__(self, x: fx.Proxy) -> Any:
        tracer: Any = x.tracer
        usual = tracer.is_leaf_module
        tracer.is_leaf_module = lambda m, name: m is self.block or usual(m, name)
        try:
            return self.block(x)
        finally:
            del tracer.is_leaf_module


def _to_map(sequence: Any, grid: tuple[int, ...] | None, extent: Extent | None) -> Any:
    """(B, C, H·W) → (B, C, H, W); unchanged without a grid."""
    if grid is None:
        return sequence
    if not isinstance(sequence, fx.Proxy):
        seen = None if extent is None or _side_effects_count() else extent.positions
        grid = fit_grid(sequence.shape[2], grid, seen)
    return sequence.unflatten(2, grid)


def fit_grid(count: int, grid: tuple[int, ...], seen: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """The grid of `count` tokens: that of the map they were made of, else the measured one or its aspect ratio.

    Args:
        count: how many there are.
        grid: measured when the plan was made.
        seen: what the layer that made the map gave last; None where no such layer could be watched.

    Raises:
        LayoutError: none of them fits.
    """
    if seen is not None and count == math.prod(seen):
        return seen
    if count == math.prod(grid):
        return grid
    if len(grid) == 2:
        height, width = grid
        rows = round((count * height / width) ** 0.5)
        if rows and count % rows == 0 and rows * width == height * (count // rows):
            return rows, count // rows
    raise LayoutError(
        f"{count} tokens form no grid of the aspect ratio {':'.join(map(str, grid))} that the plan measured; "
        "plan again with example_inputs of this size"
    )


EXTENT = "_attninject_extent"  # attribute of a block on tokens, and of the layer that makes their map


class Extent:
    """Rows and columns of the map that tokens come from, as the running forward met them.

    One object is shared by the layer that makes the map, which writes, and the blocks behind it, which read: so
    a block knows a 2 × 8 map from a 4 × 4 one. A copy begins empty, since it belongs to another network.
    """

    def __init__(self) -> None:
        self.positions: tuple[int, ...] | None = None

    def __reduce__(self) -> tuple[type[Extent], tuple[()]]:
        return Extent, ()


def note_extent(layer: nn.Module, out: Any) -> None:
    """Write down the extents of the (B, C, H, W) that a layer gives; its generated forward calls this."""
    extent = getattr(layer, EXTENT, None)
    if extent is not None and isinstance(out, Tensor) and not _side_effects_count():
        extent.positions = tuple(out.shape[2:])


def _side_effects_count() -> bool:
    """Under jit.trace and strict export, which complain of a write, a block takes the measured grid."""
    compiler: Any = torch.compiler
    strict = compiler.is_dynamo_compiling() and getattr(compiler, "is_exporting", bool)()
    return torch.jit.is_tracing() or strict


# --- measuring ---------------------------------------------------------------------------------


def frame(shape: tuple[int, ...], given: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Batch and spatial size of the input as a tensor of this shape knows them.

    A map of two dimensions in a net for clips (batch, frames, channels, height, width) or volumes is one frame's,
    frame by frame or with the frames in the batch.
    """
    if len(given) != 5 or len(shape) != 4:
        return given[0], given[2:]
    folded = shape[0] in (given[0] * given[1], given[0] * given[2])
    return (shape[0] if folded else given[0]), given[3:]


def measure(
    shape: tuple[int, ...],
    batch: int,
    size: tuple[int, ...],
    channels: int | None = None,
    other: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
) -> Layout | None:
    """Find what the axes of a tensor mean.

    Args:
        shape: of the tensor, when the model was given a batch of `batch` inputs of spatial size `size`.
        channels: the channel count where the module that made the tensor says it.
        other: (shape, size) of the same tensor in a run at another, oblong size, where there was one.

    Returns:
        The layout, or None where the axes do not say.
    """
    if not shape or shape[0] != batch:
        return None
    if len(shape) == 3:
        return _sequence(shape, size, channels, other)
    kinds = {4: ("NCHW", "NHWC"), 5: ("NCDHW", "NDHWC")}.get(len(shape))
    if kinds is None:
        return None
    first = [k for k in kinds if channels is None or Layout(k).channels(shape) == channels]
    for test in (_scales, _proportional, _alike):
        if len(first) == 1:
            break
        first = [k for k in first or kinds if test(Layout(k).positions(shape), size, k, other)] or first
    return Layout(first[0]) if first else None


def evident(shape: tuple[int, ...], size: tuple[int, ...]) -> Layout | None:
    """The only layout of a 4D or 5D tensor whose axes are the input's over one stride; None if two or none are."""
    kinds = {4: ("NCHW", "NHWC"), 5: ("NCDHW", "NDHWC")}.get(len(shape), ())
    fitting = [k for k in kinds if _proportional(Layout(k).positions(shape), size, k, None)]
    return Layout(fitting[0]) if len(fitting) == 1 else None


def _scales(positions: tuple, size: tuple, kind: str, other: Any) -> bool:
    """Do these axes, and not the channel axis, change with the input's size?"""
    if other is None:
        return True
    then, now = Layout(kind).map_shape(other[0]), positions
    return then[2:] != now and all(
        (b > a) == (t > s) for a, b, s, t in zip(now, then[2:], size, other[1], strict=False)
    )


def _proportional(positions: tuple, size: tuple, kind: str, other: Any) -> bool:
    """Is each axis the input's over one common stride, within a pixel of rounding?"""
    if len(positions) != len(size):
        return False
    strides = [s / max(p, 1) for s, p in zip(size, positions, strict=True)][-2:]
    return abs(size[-1] / strides[0] - positions[-1]) <= 1.5


def _alike(positions: tuple, size: tuple, kind: str, other: Any) -> bool:
    return positions[-1] == positions[-2]


def _sequence(shape: tuple, size: tuple, channels: int | None, other: Any) -> Layout | None:
    if len(size) == 1:
        if channels is not None:
            return Layout("NCL" if shape[1] == channels and shape[2] != channels else "NLC")
        return Layout("NLC" if shape[1] == size[0] != shape[2] else "NCL")
    if channels is not None and shape[1] == channels != shape[2]:
        return Layout("NCL")
    if len(size) != 2:
        return Layout("NLC")
    found = grid_of(shape[1], size)
    if found is None:
        return Layout("NLC")
    prefix, grid = found
    if other is not None:
        again = grid_of(other[0][1], other[1], prefix)
        if again is None:
            return Layout("NLC")
    return Layout("NLC", prefix, grid)


def grid_of(
    count: int, size: tuple[int, ...], prefix: int | None = None
) -> tuple[int, tuple[int, int]] | None:
    """Prefix and grid of a token sequence: count = prefix + (H/s)·(W/s) for a whole stride s.

    A prefix of up to 16 tokens is looked for; the smallest wins.
    """
    height, width = size
    best = None
    for stride in range(1, min(height, width) + 1):
        rows, columns = height // stride, width // stride
        extra = count - rows * columns
        if (height % stride or width % stride) or not 0 <= extra <= 16:
            continue
        if prefix is not None and extra != prefix:
            continue
        if best is None or extra < best[0]:
            best = (extra, (rows, columns))
    return best
