"""What the axes of a tensor mean."""

from __future__ import annotations

from dataclasses import dataclass

DIMS = {"NCHW": 2, "NHWC": 2, "NLC": 1, "NCL": 1, "NCDHW": 3, "NDHWC": 3}
RANK = {"NCHW": 4, "NHWC": 4, "NLC": 3, "NCL": 3, "NCDHW": 5, "NDHWC": 5}
VECTOR = "NC"
"""Of a second value alone: a vector of each sample, which a block is given as one token."""
CHANNELS_LAST = ("NHWC", "NLC", "NDHWC")


@dataclass(frozen=True)
class Layout:
    """A layout as measured at a site.

    Attributes:
        kind: a key of `RANK`, or `VECTOR`; `NLC` are tokens.
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
        return len(self.grid) if self.grid else DIMS.get(self.kind, 1)

    @property
    def is_map(self) -> bool:
        """Whether blocks that look at neighbours have a meaning here."""
        return self.ordered and (self.grid is not None or self.kind not in ("NLC", VECTOR))

    def channels(self, shape: tuple[int, ...]) -> int:
        """The channel count of a tensor of this layout."""
        return shape[-1] if self.kind in CHANNELS_LAST else shape[1]

    def positions(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Extents of the spatial dimensions."""
        if self.grid:
            return self.grid
        if self.kind == VECTOR:
            return (1,)
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
