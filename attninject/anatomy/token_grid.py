"""Which position of the map each element of a tensor belongs to, followed through a recorded run.

Shapes alone do not say what axes mean: 196 tokens may be a 14 × 14 grid in rows, the same in an order of the
network's own (Hiera), or the inside of one window. So every convolution's map is given numbers, position by
position; views, cuts and joins move the numbers as they move the values, layers hand them on, and what mixes
positions loses them. What is left at a site says where its grid is, and which layer made it.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from attninject.layout import Layout
from attninject.observe.record import Op, Record, map_values

NONE = -1  # the number of what belongs to no position: class and register tokens, padding
_BIGGEST = 1 << 19  # numbers that do not repeat along an axis are not followed beyond this size


@dataclass(frozen=True, eq=False)
class Source:
    """The operation that made a map, and the map's extents; no operation: the model's input."""

    op: Op | None
    extents: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Marks:
    """A tensor of numbers, of a value's shape: each is a position in the source's map, or `NONE`."""

    numbers: Tensor
    source: Source

    @functools.cached_property
    def some(self) -> bool:
        """Whether there is a position among the numbers."""
        return bool((_once(self.numbers) != NONE).any())


@dataclass(frozen=True)
class Found:
    """What the numbers at a value say.

    Attributes:
        layout: None where the axes are none of ours; `why` then says so.
        source: what made the map whose grid the layout has; None where it is a part of that map.
    """

    layout: Layout | None
    why: str = ""
    source: Source | None = None


class Positions:
    """The numbers of every value of one record, made on first use."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.marks: dict[int, Marks] = {}
        for image in record.input_values:
            if len(record.shape(image)) >= 4:
                self.marks[image] = _fresh(record.shape(image), None)
        for op in record.calls[0].ops():
            with contextlib.suppress(_TooMany):
                self.follow(op)

    def find(self, value: int) -> Found | None:
        """What the numbers say of a value; None where they got lost."""
        marks = self.marks.get(value)
        try:
            return None if marks is None else _read(marks)
        except _TooMany:
            return None

    def numbered(self, value: int) -> bool | None:
        """Whether some elements of a value belong to a position; None where that got lost."""
        marks = self.marks.get(value)
        return None if marks is None else marks.some

    def follow(self, op: Op) -> None:
        """Number the results of one operation."""
        known = [self.marks.get(i) for i in op.ins]
        kind = op.name.split(".")[1]
        shapes = [self.record.shape(o) for o in op.outs]
        if not shapes or (not any(known) and kind not in _MAKES):
            return
        if kind in _MOVES:
            made = self.moved(op, known)
        elif kind in _MAKES:
            made = [self.map(op, known, shapes[0])]
        else:
            rule = _PRODUCTS.get(kind, _attended if "scaled_dot_product" in kind else _alike)
            made = [rule([self.record.shape(i) for i in op.ins], known, shape) for shape in shapes[:1]]
        for value, marks, shape in zip(op.outs, made, shapes, strict=False):
            if marks is not None and tuple(marks.numbers.shape) == shape:
                self.marks[value] = marks

    def map(self, op: Op, known: list[Marks | None], shape: tuple[int, ...]) -> Marks | None:
        """A convolution's or a pooling's result: the positions it was given, or those of a new map."""
        given, before = known[0], self.record.shape(op.ins[0])
        if given is not None and before[2:] == shape[2:]:
            return Marks(given.numbers[:, :1].expand(shape), given.source)
        if given is not None and len(shape) == len(before) >= 4 and not _constant(given.numbers, 0):
            return Marks(_thinned(given.numbers, shape), given.source)  # within windows
        if len(shape) < 4 or (given is not None and not _is_map(given)):
            return None  # a pooling of tokens
        return _fresh(shape, op)

    def moved(self, op: Op, known: list[Marks | None]) -> list[Marks | None]:
        """Do with the numbers what was done with the values."""
        sources = {m.source.extents: m.source for m in known if m is not None}
        if len(sources) > 1:  # of two maps, or a class token that went through another one
            sources = {m.source.extents: m.source for m in known if m is not None and m.some}
        if len(sources) != 1:
            return []
        source = next(iter(sources.values()))
        shapes = iter([self.record.shape(i) for i in op.ins])
        marks = iter(known)

        def numbers(_: Any) -> Tensor:
            mark, shape = next(marks), next(shapes)
            return (
                torch.tensor(NONE, dtype=torch.int32, device="cpu").expand(shape)
                if mark is None
                else mark.numbers
            )

        try:
            args, kwargs = map_values(op.given, numbers)
            done = _MOVES[op.name.split(".")[1]](op, args, kwargs)
        except (RuntimeError, TypeError, IndexError, ValueError):
            return []
        results = [done] if isinstance(done, Tensor) else list(done)
        return [Marks(t, source) for t in results]


# --- how numbers move --------------------------------------------------------------------------


def _fresh(shape: tuple[int, ...], op: Op | None) -> Marks:
    extents = shape[2:]
    return Marks(
        torch.arange(math.prod(extents), dtype=torch.int32, device="cpu").reshape(extents).expand(shape),
        Source(op, extents),
    )


def _constant(numbers: Tensor, axis: int) -> bool:
    """Whether the numbers are the same all along an axis.

    Raises:
        _TooMany: to look would take too long.
    """
    if numbers.shape[axis] == 1 or numbers.stride(axis) == 0:
        return True
    once = _once(numbers)
    if once.numel() > _BIGGEST:
        raise _TooMany
    return bool((once == once.narrow(axis, 0, 1)).all())


def _thinned(numbers: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The numbers of a map of windows at another resolution: each position's is that of one it came from."""
    numbers = numbers[:, :1]
    for axis in range(2, len(shape)):
        there = torch.arange(shape[axis], device="cpu") * numbers.shape[axis] // shape[axis]
        numbers = numbers.index_select(axis, there)
    return numbers.expand(shape)


def _distinct(numbers: Tensor) -> int:
    """How many different numbers there are."""
    return len(cast(Any, numbers).unique())


def _once(numbers: Tensor) -> Tensor:
    """The same without the repetitions that take no memory."""
    return numbers[tuple(slice(0, 1 if step == 0 else None) for step in numbers.stride())]


def _is_map(marks: Marks) -> bool:
    """Whether the axes behind the channels are rows and columns of the source's map, or of a part of it."""
    if not _constant(marks.numbers, 0):
        return False
    extents, flat = tuple(marks.numbers.shape[2:]), marks.numbers[0, 0].reshape(-1)
    return _grid(flat, marks.source.extents) == extents


class _TooMany(Exception):
    """More numbers than are worth following."""


def _same(op: Op, args: Any, kwargs: Any) -> Any:
    return op.func(*args, **kwargs)


def _reshaped(op: Op, args: Any, kwargs: Any) -> Tensor:
    """A view, with a copy only of the axes that are merged; what repeats goes on taking no memory."""
    numbers, size = args[0], list(args[1])
    if -1 in size:
        size[size.index(-1)] = numbers.numel() // max(1, -math.prod(size))
    thin, wanted = list(numbers.shape), list(size)
    for old, new in _segments(numbers.shape, size):
        repeats = all(numbers.stride(a) == 0 or numbers.shape[a] == 1 for a in old)
        if repeats:
            thin[old.start : old.stop] = [1] * len(old)
            wanted[new.start : new.stop] = [1] * len(new)
    small = numbers[tuple(slice(0, n) for n in thin)]
    if small.numel() > _BIGGEST:
        raise _TooMany
    return _compact(small.reshape(wanted)).expand(size)


def _segments(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[range, range]]:
    """The axes of two shapes of one size, in groups that hold as many elements each."""
    i = j = 0
    while i < len(old) or j < len(new):
        first, second, has, wants = i, j, 1, 1
        while i == first < len(old) or j == second < len(new) or has != wants:
            if j == second < len(new) or (has > wants and j < len(new)):
                wants, j = wants * new[j], j + 1
            else:
                has, i = has * old[i], i + 1
        yield range(first, i), range(second, j)


def _compact(numbers: Tensor) -> Tensor:
    """Let axes along which many numbers are the same take no memory."""
    if _once(numbers).numel() > 1 << 14:
        for axis in range(numbers.ndim):
            if numbers.stride(axis) and _constant(numbers, axis):
                numbers = numbers.narrow(axis, 0, 1).expand(numbers.shape)
    return numbers


def _joined(op: Op, args: Any, kwargs: Any) -> Tensor:
    """A concatenation; what repeats along its own axis (two images as one batch) or the last one does so in the whole."""
    parts: list[Tensor] = list(args[0])
    axis: int = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    single = [p.narrow(axis, 0, 1) for p in parts]
    repeat = all(p.stride(axis) == 0 or p.shape[axis] == 1 for p in parts)
    if repeat and all(torch.equal(s, single[0]) for s in single[1:]):
        whole = list(single[0].shape)
        whole[axis] = sum(p.shape[axis] for p in parts)
        return single[0].expand(whole)
    if not all(p.stride(-1) == 0 or p.shape[-1] == 1 for p in parts):
        return torch.cat(parts, axis)
    thin = [p[..., :1] for p in parts]
    if axis % parts[0].ndim != parts[0].ndim - 1:
        return torch.cat(thin, axis).expand(*[-1] * (parts[0].ndim - 1), parts[0].shape[-1])
    if all(torch.equal(p, thin[0]) for p in thin[1:]):
        return thin[0].expand(*[-1] * (parts[0].ndim - 1), sum(p.shape[-1] for p in parts))
    return torch.cat(parts, axis)


def _padded(op: Op, args: Any, kwargs: Any) -> Tensor:
    numbers, pad = args[0], args[1]
    untouched = range(numbers.ndim - len(pad) // 2)
    return _thinly(numbers, untouched, lambda thin: torch.constant_pad_nd(thin, pad, NONE))


def _rolled(op: Op, args: Any, kwargs: Any) -> Tensor:
    numbers, axes = args[0], args[2] if len(args) > 2 else kwargs.get("dims", ())
    rolled = {a % numbers.ndim for a in ([axes] if isinstance(axes, int) else axes)}
    untouched = [a for a in range(numbers.ndim) if rolled and a not in rolled]
    return _thinly(numbers, untouched, lambda thin: op.func(thin, *args[1:], **kwargs))


def _thinly(numbers: Tensor, untouched: Sequence[int], change: Callable[[Tensor], Tensor]) -> Tensor:
    """Change numbers without their repetitions along axes that the change does not look at."""
    repeats = [a for a in untouched if numbers.stride(a) == 0]
    thin = numbers
    for axis in repeats:
        thin = thin.narrow(axis, 0, 1)
    changed = change(thin)
    return changed.expand([numbers.shape[a] if a in repeats else n for a, n in enumerate(changed.shape)])


def _copied(op: Op, args: Any, kwargs: Any) -> Tensor:
    written: Tensor = args[1]
    return written.expand(args[0].shape)


def _reduced(op: Op, args: Any, kwargs: Any) -> Tensor:
    """A pooled axis: several positions become one, which has the first one's number."""
    numbers: Tensor = args[0]
    axes = args[1] if len(args) > 1 else kwargs.get("dim")
    chosen = range(numbers.ndim) if axes is None else [axes] if isinstance(axes, int) else axes
    for axis in chosen:
        numbers = numbers.narrow(axis, 0, 1)
    keep = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
    return numbers if keep else numbers.squeeze(tuple(chosen))


def _cut_out(op: Op, args: Any, kwargs: Any) -> Tensor:
    """Patches, a column each: channels times the pixels of a patch in one axis."""
    numbers, channels = args[0], args[0].shape[1]
    columns = (
        nn.functional.unfold(numbers[:, :1].double() - NONE, *args[1:], **kwargs).to(numbers.dtype) + NONE
    )
    return columns.repeat(1, channels, 1)


def _kept(op: Op, args: Any, kwargs: Any) -> Tensor:
    numbers: Tensor = args[0]
    return numbers


_MOVES: dict[str, Callable[[Op, Any, Any], Any]] = {
    **dict.fromkeys(
        (
            "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "slice", "select", "split",
            "split_with_sizes", "chunk", "unbind", "stack", "flip", "repeat", "unfold", "diagonal", "movedim",
            "swapaxes", "pixel_unshuffle", "pixel_shuffle", "channel_shuffle",
        ),
        _same,
    ),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy"), _reshaped),
    **dict.fromkeys(("clone", "contiguous", "alias", "detach", "_to_copy", "lift_fresh"), _kept),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "max", "min", "logsumexp"), _reduced),
    "cat": _joined,
    "constant_pad_nd": _padded,
    "roll": _rolled,
    "copy_": _copied,
    "im2col": _cut_out,
}  # fmt: skip

_MAKES = frozenset(
    {
        "convolution", "_convolution", "avg_pool2d", "max_pool2d_with_indices", "_adaptive_avg_pool2d",
        "adaptive_max_pool2d", "avg_pool3d", "max_pool3d_with_indices", "_adaptive_avg_pool3d", "upsample_bilinear2d",
        "upsample_bicubic2d", "upsample_nearest2d", "upsample_nearest3d", "upsample_trilinear3d",
        "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
    }
)  # fmt: skip

_LOSES = ("sort", "topk", "gather", "scatter", "index", "cumsum")


def _alike(shapes: list[tuple[int, ...]], known: list[Marks | None], shape: tuple[int, ...]) -> Marks | None:
    """Operations position by position: the numbers of the first operand that has the result's shape."""
    return next((m for m, s in zip(known, shapes, strict=True) if m is not None and s == shape), None)


def _lost(shapes: list[tuple[int, ...]], known: list[Marks | None], shape: tuple[int, ...]) -> None:
    return None


def _layer(a: Marks | None, shape: tuple[int, ...]) -> Marks | None:
    """Rows times a weight. Rows that join several positions (patch merging) have the number of the first."""
    if a is None:
        return None
    first = a.numbers[..., :1]
    mixes = not _constant(a.numbers, -1) and _distinct(_once(first)) < 2
    return None if mixes else Marks(first.expand(shape), a.source)


def _product(a: Marks | None, b: Marks | None, shape: tuple[int, ...]) -> Marks | None:
    """Rows of a, or columns of b, whichever belongs to one position each."""
    if a is not None and _constant(a.numbers, -1):
        return Marks(a.numbers[..., :1].expand(shape), a.source)
    if b is not None and _constant(b.numbers, -2):
        return Marks(b.numbers[..., :1, :].expand(shape), b.source)
    return None


def _attended(
    shapes: list[tuple[int, ...]], known: list[Marks | None], shape: tuple[int, ...]
) -> Marks | None:
    """Attention gives a value to each query."""
    query = known[0]
    if query is None or not _constant(query.numbers, -1) or shapes[0][:-1] != shape[:-1]:
        return None
    return Marks(query.numbers[..., :1].expand(shape), query.source)


_PRODUCTS: dict[str, Callable[[list[tuple[int, ...]], list[Marks | None], tuple[int, ...]], Marks | None]] = {
    "mm": lambda shapes, known, shape: (
        _layer(known[0], shape) if known[0] else _product(known[0], known[1], shape)
    ),
    "addmm": lambda shapes, known, shape: _layer(known[1], shape),
    "linear": lambda shapes, known, shape: _layer(known[0], shape),
    "bmm": lambda shapes, known, shape: _product(known[0], known[1], shape),
    "baddbmm": lambda shapes, known, shape: _product(known[1], known[2], shape),
    **dict.fromkeys(_LOSES, _lost),
}


# --- what they say -----------------------------------------------------------------------------


def _read(marks: Marks) -> Found | None:
    numbers, source = marks.numbers[:1], marks.source
    if numbers.ndim not in (3, 4, 5):
        return None
    whole = _constant(marks.numbers, 0)  # else the batch holds windows
    moves = {axis for axis in range(1, numbers.ndim) if not _constant(numbers, axis)}
    if whole and not moves:
        return None
    ordered: list[str] = []
    others: list[str] = []
    for kind, axes in _KINDS[numbers.ndim].items():
        if not moves <= set(axes) or any(a not in moves and numbers.shape[a] > 1 for a in axes):
            continue
        flat = numbers[0][tuple(slice(None) if a in axes else 0 for a in range(1, numbers.ndim))]
        if len(axes) == 1:
            return _tokens(kind, flat, source) if whole else Found(Layout(kind, ordered=False))
        is_map = whole and (
            _grid(flat.reshape(-1), source.extents) == tuple(flat.shape) or _refined(flat, source.extents)
        )
        (ordered if is_map else others).append(kind)
    if len(ordered) == 1 or (len(others) == 1 and not ordered):
        return Found(Layout([*ordered, *others][0], ordered=bool(ordered)))
    return None if ordered else Found(None, _UNREADABLE)


_UNREADABLE = "hold windows or heads beside positions and channels"
_KINDS: dict[int, dict[str, tuple[int, ...]]] = {
    3: {"NLC": (1,), "NCL": (2,)},
    4: {"NCHW": (2, 3), "NHWC": (1, 2)},
    5: {"NCDHW": (2, 3, 4), "NDHWC": (1, 2, 3)},
}


def _tokens(kind: str, flat: Tensor, source: Source) -> Found:
    """One axis of positions: how many in front are none, and the grid of the others."""
    prefix = int((flat == NONE).long().cumprod(0).sum())
    grid = _grid(flat[prefix:], source.extents)
    if kind == "NCL" and prefix:
        return Found(Layout(kind, ordered=False))
    if grid is None:
        return Found(Layout(kind, prefix, ordered=False))
    return Found(Layout(kind, prefix, grid), source=source if grid == source.extents else None)


def _refined(numbers: Tensor, extents: tuple[int, ...]) -> bool:
    """Whether these are the map's positions in order, each several times: a map that a pixel shuffle made finer."""
    if numbers.ndim != len(extents) or not numbers.numel() or numbers.min() < 0:
        return False
    for axis, at in enumerate(torch.unravel_index(numbers.reshape(-1), extents)):
        lines = at.reshape(numbers.shape).movedim(axis, 0).reshape(numbers.shape[axis], -1)
        if bool((lines != lines[:, :1]).any()) or bool((lines[1:, 0] < lines[:-1, 0]).any()):
            return False
    return True


def _grid(numbers: Tensor, extents: tuple[int, ...]) -> tuple[int, ...] | None:
    """The grid of positions in row order that these are, or None; a part of the map's rows and columns is one."""
    if not len(numbers) or numbers.min() < 0:
        return None
    if len(numbers) > 1 and not bool((numbers[1:] > numbers[:-1]).all()):
        return None
    counts = tuple(map(_distinct, torch.unravel_index(numbers, extents)))
    return counts if math.prod(counts) == len(numbers) else None
