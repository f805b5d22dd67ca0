"""Which axes of a tensor are batch, channels and positions, told by the shapes of one run or two."""

from __future__ import annotations

from attninject.layout import Layout

Shape = tuple[int, ...]


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


def channels_first(shape: tuple[int, ...]) -> Layout | None:
    """The layout that convolutions work on, of a tensor whose channels are as many as no extent of its positions."""
    kind = {3: "NCL", 4: "NCHW", 5: "NCDHW"}.get(len(shape))
    return Layout(kind) if kind and shape[1] not in shape[2:] else None


def _scales(positions: Shape, size: Shape, kind: str, other: tuple[Shape, Shape] | None) -> bool:
    """Do these axes, and not the channel axis, change with the input's size?"""
    if other is None:
        return True
    then, now = Layout(kind).map_shape(other[0]), positions
    return then[2:] != now and all(
        (b > a) == (t > s) for a, b, s, t in zip(now, then[2:], size, other[1], strict=False)
    )


def _proportional(positions: Shape, size: Shape, kind: str, other: tuple[Shape, Shape] | None) -> bool:
    """Is each axis the input's over one common stride, within a pixel of rounding?"""
    if len(positions) != len(size):
        return False
    strides = [s / max(p, 1) for s, p in zip(size, positions, strict=True)][-2:]
    return abs(size[-1] / strides[0] - positions[-1]) <= 1.5


def _alike(positions: Shape, size: Shape, kind: str, other: tuple[Shape, Shape] | None) -> bool:
    return positions[-1] == positions[-2]


def _sequence(
    shape: Shape, size: Shape, channels: int | None, other: tuple[Shape, Shape] | None
) -> Layout | None:
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
