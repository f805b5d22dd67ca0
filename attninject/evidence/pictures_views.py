"""What a block's attention looks like: which of its tensors are gates over channels or positions, which are rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attninject.blocks.gate import Blend
from attninject.blocks.replacement import Blended
from attninject.layout import Layout
from attninject.surgery.layout_adapters import fit_grid

Grid = tuple[int, int]


@dataclass(frozen=True)
class Heat:
    """A map of (h, w) values; `over`: its positions are those of the image. `marked`: it belongs to a position."""

    name: str
    text: str
    values: Tensor
    over: bool = True
    marked: bool = False
    low: float | None = None
    high: float | None = None

    @property
    def range(self) -> tuple[float, float]:
        """The values that the ends of the colours stand for."""
        low = float(self.values.min()) if self.low is None else self.low
        high = float(self.values.max()) if self.high is None else self.high
        return low, high


@dataclass(frozen=True)
class Bars:
    """(n,) values, drawn from the line of `base`; `start`: what they were before training."""

    name: str
    text: str
    values: Tensor
    base: float = 1.0
    start: Tensor | None = None


Panel = Heat | Bars


@dataclass(frozen=True)
class Scene:
    """Where a block's attention is to be drawn.

    Attributes:
        block: the kind's name, or the class's.
        channels: C of its input (B, C, *S).
        grid: what S is in the image, (h, w); (1, L) where L tokens form no grid.
        is_map: whether the grid's positions are those of the image.
        size: S itself.
        at: the position asked for, (down, right) in [0, 1).
    """

    block: str
    channels: int
    grid: Grid
    is_map: bool
    size: tuple[int, ...]
    at: tuple[float, float]

    @property
    def cell(self) -> Grid:
        """The grid's cell (row, column) with the position."""
        return int(self.at[0] * self.grid[0]), int(self.at[1] * self.grid[1])

    @property
    def index(self) -> int:
        """The same in the row of all cells."""
        return self.cell[0] * self.grid[1] + self.cell[1]

    def heat(self, name: str, text: str, values: Tensor, marked: bool = False) -> Heat:
        """A map whose positions are the block's own, (*S) or its like."""
        return Heat(name, text, plane(values, self.grid), self.is_map, marked and self.is_map)


def scene_of(block: nn.Module, x: Tensor, layout: Layout | None, at: tuple[float, float]) -> Scene:
    """The scene of a block on its input x: (B, C, *S)."""
    size = tuple(x.shape[2:])
    grid, is_map = _grid(size, layout)
    ordered = is_map and x.shape[0] == 1 and (layout is None or layout.ordered)
    return Scene(kind_of(block), x.shape[1], grid, ordered, size, at)


def kind_of(block: nn.Module) -> str:
    """The name that a block is registered under, else its class's."""
    inner = block.block if isinstance(block, Blend | Blended) else block
    facts = getattr(type(inner), "facts", None)
    return str(getattr(facts, "name", type(inner).__name__))


def _grid(size: tuple[int, ...], layout: Layout | None) -> tuple[Grid, bool]:
    if len(size) != 1:
        return (size[-2], size[-1]), True
    count = size[0]
    if layout is not None and layout.grid is not None and len(layout.grid) == 2:
        made = fit_grid(count, layout.grid)
        return (made[0], made[1]), True
    side = math.isqrt(count)
    return ((side, side), True) if side * side == count and side > 1 else ((1, count), False)


def plane(values: Tensor, grid: Grid) -> Tensor:
    """Values over positions as (h, w); of a clip, the mean over its frames."""
    values = values.detach().float().cpu()
    while values.ndim > 2:
        values = values.mean(0)
    return values.reshape(grid) if values.numel() == grid[0] * grid[1] else values.reshape(1, -1)


# --- gates --------------------------------------------------------------------------------------


def _factor(name: str, t: Tensor, scene: Scene) -> Iterator[Panel]:
    """t: (B, c, *s), broadcastable to x: over channels bars, over positions a map, over both one of each."""
    values = t[0].detach().float()
    if all(n == 1 for n in values.shape[1:]):
        base = 0.0 if name.startswith("shift") else 1.0
        yield Bars(name, f"{name}: {_count(values.shape[0], scene.channels)}", values.flatten(), base)
        return
    if any(n not in (1, m) for n, m in zip(values.shape[1:], scene.size, strict=False)):
        return  # a block of one's own that means something else
    mean = ", mean over channels" if values.shape[0] > 1 else ""
    spread = values.mean(0).expand(scene.size)
    yield scene.heat(name, f"{name}: a value per position{mean}", spread)
    if values.shape[0] > 1:
        per_channel = values.flatten(1).mean(1)
        text = f"{name}: {_count(values.shape[0], scene.channels)}, mean over positions"
        yield Bars(f"{name}.channels", text, per_channel)


def _count(n: int, channels: int) -> str:
    return "one per channel" if n == channels else f"{n} values"


def _stack(name: str, t: Tensor, scene: Scene) -> Iterator[Panel]:
    """t: (B, n, *S), n maps: where the strongest of them is strong."""
    yield scene.heat(name, f"{name}: the largest of {t.shape[1]} maps", t[0].amax(0))


def _offset(name: str, t: Tensor, scene: Scene) -> Iterator[Panel]:
    """t: (B, dims, *S), in cells: how far from itself each position looks."""
    yield scene.heat(name, f"{name}: how far off each position looks, in cells", t[0].float().norm(dim=0))


def _offsets(name: str, t: Tensor, scene: Scene) -> Iterator[Panel]:
    """t: (B, 2K, *T), down and right in pixels for each of K taps: how far off they look, in the mean."""
    far = t[0].float().unflatten(0, (-1, 2)).norm(dim=1).mean(0)
    text = f"{name}: how far off a position looks, in pixels, mean of {t.shape[1] // 2} taps"
    yield Heat(name, text, plane(far, coarser(scene.grid, far.numel()) or scene.grid), scene.is_map)


def _masks(name: str, t: Tensor, scene: Scene) -> Iterator[Panel]:
    """t: (B, K, *T): what the taps of a position count, in the mean."""
    mean = t[0].float().mean(0)
    text = f"{name}: a value per position, mean of {t.shape[1]} taps"
    yield Heat(name, text, plane(mean, coarser(scene.grid, mean.numel()) or scene.grid), scene.is_map)


def _kernels(name: str, t: Tensor, scene: Scene) -> Iterator[Panel]:
    """t: (B, K): the share of each kernel, around the even share 1 / K."""
    yield Bars(name, f"{name}: the share of each kernel", t[0].detach().float(), 1 / t.shape[1])


def _kernels_at(name: str, t: Tensor, scene: Scene) -> Iterator[Panel]:
    """t: (B, G, K, *T), a kernel for each position and group: the position's own, in the mean over groups."""
    of = t[0].float().mean(0).flatten(1)
    text = f"{name}: the kernel of the marked position, mean of {t.shape[1]} groups"
    yield Bars(name, text, of[:, min(scene.index, of.shape[1] - 1)], 0.0)


def _branches(name: str, t: Tensor, scene: Scene) -> Iterator[Panel]:
    """t: (B, M, C, 1, …): bars for each branch or split, around the even share 1 / M."""
    part = name.removesuffix("es").removesuffix("s")
    for i, weights in enumerate(t[0].flatten(1)):
        yield Bars(f"{name}.{i}", f"{name}: weight of {part} {i} per channel", weights, 1 / t.shape[1])


# --- rows ---------------------------------------------------------------------------------------


def _rows(name: str, t: Tensor, scene: Scene) -> Iterator[Panel]:
    """t: (B, N, M) or per head (B, h, N, M): what the position looks at; one row serves all where N is 1."""
    heads = t[0] if t.ndim > 3 else t[:1]
    row = heads.float().mean(0)[min(scene.index, heads.shape[1] - 1)]
    mean = f", mean of {heads.shape[0]} heads" if heads.shape[0] > 1 else ""
    grid = coarser(scene.grid, row.numel())
    if grid is None:
        yield Bars(name, f"{name}: weights of the marked position{mean}", row, 0.0)
        return
    text = f"{name}: what the marked position looks at{mean}"
    yield Heat(name, text, plane(row, grid), scene.is_map, scene.is_map)


def coarser(grid: Grid, count: int) -> Grid | None:
    """The grid of `count` cells that sub-sampling `grid` by a whole factor gives, rounded up or down."""
    for step in range(1, max(grid) + 1):
        for made in ((-(-grid[0] // step), -(-grid[1] // step)), (grid[0] // step, grid[1] // step)):
            if made[0] * made[1] == count:
                return made
    return None


def _windows(name: str, t: Tensor, scene: Scene) -> Iterator[Panel]:
    """t: (B, W, h, L, L): the row of the position within its window, 0 outside it."""
    height, width = scene.grid
    length = t.shape[-1]
    tall = 1 if len(scene.size) == 1 else math.isqrt(length)
    wide = length // tall
    y, x = scene.cell
    across = -(-width // wide)
    row = t[0, (y // tall) * across + x // wide].float().mean(0)[(y % tall) * wide + x % wide]
    whole = torch.zeros(-(-height // tall) * tall, across * wide)
    top, left = y // tall * tall, x // wide * wide
    whole[top : top + tall, left : left + wide] = row.reshape(tall, wide).cpu()
    text = f"{name}: what the marked position looks at within its window, mean of {t.shape[2]} heads"
    yield scene.heat(name, text, whole[:height, :width], marked=True)


def _slots(name: str, t: Tensor, scene: Scene) -> Iterator[Panel]:
    """t: (B, N, S): the weights of the position over the slots of a memory, or over classes."""
    slots = "classes" if scene.block == "category_attention" else "memory"
    yield Bars(name, f"{name}: weights of the marked position over the {slots}", t[0, scene.index], 0.0)


def _matrix(name: str, t: Tensor, scene: Scene) -> Iterator[Panel]:
    """t: (B, C, C): from channel (down) to channel (right)."""
    yield Heat(
        name, f"{name}: weights that each channel (down) gives to each (right)", t[0].float().cpu(), False
    )


# --- the table ----------------------------------------------------------------------------------

Reading = Callable[[str, Tensor, Scene], Iterator[Panel]]

READINGS: dict[str, Reading] = {  # a name in what `attention(x)` returns: what is drawn of it
    **dict.fromkeys(("gate", "channel", "spatial", "weights", "shift", "fine"), _factor),
    **dict.fromkeys(("depth", "height", "width", "length"), _factor),
    **dict.fromkeys(("rows", "position", "global"), _rows),
    **dict.fromkeys(("gather", "distribute", "regions"), _stack),
    "local": _windows,
    **dict.fromkeys(("branches", "splits"), _branches),
    "offset": _offset,
    "offsets": _offsets,
    "masks": _masks,
    "kernels": _kernels,
}
OF_BLOCK: dict[tuple[str, str], Reading] = {  # where a block means something else by the name
    ("danet", "channel"): _matrix,
    ("danet_cam", "rows"): _matrix,
    ("external", "rows"): _slots,
    ("category_attention", "rows"): _slots,
    ("involution", "kernels"): _kernels_at,
    ("twins_lsa", "rows"): _windows,
}


def panels_of(name: str, t: Tensor, scene: Scene) -> list[Panel]:
    """What is drawn of one tensor of `attention(x)`; nothing where a block of one's own gives another form."""
    reading = OF_BLOCK.get((scene.block, name)) or READINGS.get(name) or _by_shape(t, scene)
    return [] if reading is None else list(reading(name, t, scene))


def _by_shape(t: Tensor, scene: Scene) -> Reading | None:
    """Of a name that the table does not know: a gate if it could multiply x, rows if it has one per position."""
    full = (scene.channels, *scene.size)
    if t.ndim == len(full) + 1 and all(n in (1, m) for n, m in zip(t.shape[1:], full, strict=True)):
        return _factor
    return _rows if t.ndim in (3, 4) and t.shape[-2] == math.prod(scene.size) else None
