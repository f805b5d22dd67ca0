"""Blocks that find a place on the map: the spatial transformer moves values, the crop keeps those in a window."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import CONV, Block, Facts, GateBlock, hidden_width, positions, static_shape
from .gate import at_least_float32, laid_out_like, zero
from .options import Init, Int, Positive, Reduction, given
from .precision import product


class Localising(Block):
    """A block whose localisation net says where something is on a map: a few numbers z for each sample.

    A convolution to C / `reduction` and relu, the means over positions of these features f and of f · p̂ on each axis
    (so that it can tell where something is, at any size), a layer to as many as there are means, relu, and a last
    layer to z. Coordinates p̂ run from −1 to 1 between the outer edges of the map.
    """

    def build(self, numbers: int, *, kernel_size: int, reduction: float, bias: bool, divisor: int) -> None:
        """Make the layers."""
        hidden = hidden_width(self.channels, reduction, divisor)
        means = hidden * (1 + self.dims)
        self.conv = CONV[self.dims](self.channels, hidden, kernel_size, padding=kernel_size // 2, bias=bias)
        self.fc1 = nn.Linear(means, means, bias=bias)
        self.fc2 = nn.Linear(means, numbers, bias=bias)

    def init_blend(self) -> None:
        """Zero biases."""
        for layer in (self.conv, self.fc1, self.fc2):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def located(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → z: (B, numbers), float32 or wider."""
        f = F.relu(self.conv(x))
        means = [f] + [f * p for p in centres(static_shape(f)[2:], f)]
        z = torch.cat([m.mean(positions(x)) for m in means], 1)
        return at_least_float32(self.fc2(F.relu(self.fc1(z.to(f.dtype)))))


class SpatialTransformer(Localising):
    """Spatial transformer: the output at p is x, linearly interpolated, at A p̂ + t, θ = (A, t) from x itself.

    arXiv:1506.02025, eq. 1 (affine), 2 (attention: one scale and a translation), 5 (bilinear sampling).
    Coordinates p̂ run from −1 to 1 between the outer edges of the map on every axis, so that a side of one
    position is defined (torch's `align_corners=False`). Outside, x is 0 (a `padding` of zeros, eq. 5) or its
    nearest value (border). Works in one, two and three dimensions: eq. 5 is a product over the axes.

    The localisation net (`Localising`, with `reduction`) gives the *offset* from the identity, θ − (I, 0). Each
    output position reads x at its own place plus an offset in pixels; at offset 0 the interpolation weights
    are 1 and 0 with no rounding in between, so identity is exact at every size and in every dtype.
    A `mode` of attention leaves one scale of A; `kernel_size` is the convolution's, `bias` that of all layers.
    With several `steps` the same net looks again, at x as the transform so far shows it, and θ ← θ ∘ Δθ; x itself
    is sampled in every step, so that nothing is blurred twice or lost outside (arXiv:1612.03897).

    `init="paper"` is the identity too, as published: the last layer starts at zero weights and at the
    identity transform.

    Deviations: the paper leaves the localisation net open; its own ones flatten maps of a fixed size.
    """

    facts = Facts(
        "stn", family="spatial", spatial=True, paper="arXiv:1506.02025", equation="1, 2, 5",
        summary="spatial transformer: the map sampled through an affine transform that it predicts itself",
    )  # fmt: skip

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        mode: Literal["affine", "attention"] = "affine",
        padding: Literal["zeros", "border"] = "zeros",
        steps: Annotated[int, Int(min=1, max=32)] = 1,
        kernel_size: Literal[1, 3, 5, 7] = 3,
        reduction: Annotated[float, Reduction()] = 16,
        bias: bool = True,
        divisor: Annotated[int, Int(min=1)] = 1,
    ) -> None:
        super().__init__(**given(locals()))
        self.mode, self.padding, self.steps = mode, padding, steps
        numbers = dims * (dims + 1) if mode == "affine" else 1 + dims
        self.build(numbers, kernel_size=kernel_size, reduction=reduction, bias=bias, divisor=divisor)
        self.initialise()

    def init_identity(self) -> None:
        """Zero the last layer: no offset anywhere."""
        zero(self.fc2)

    def init_paper(self) -> None:
        """Section 4: the last layer predicts the identity transform; zero biases."""
        self.init_blend()
        zero(self.fc2)

    def theta(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → the transform minus the identity, (B, dims, dims + 1), float32 or wider.

        A row per axis in the order of S, columns for the axes in the same order and the translation.
        """
        z = self.located(x)
        if self.mode == "affine":
            return torch.unflatten(z, 1, (self.dims, self.dims + 1))
        scaled = z[:, :1, None] * torch.eye(self.dims, dtype=z.dtype, device=z.device)
        return torch.cat([scaled, z[:, 1:, None]], 2)

    def offset(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → where each position looks after all steps: (B, dims, *S), in pixels."""
        size, theta = static_shape(x)[2:], self.theta(x)
        for _ in range(1, self.steps):
            theta = composed(theta, self.theta(sample(x, offsets(theta, size), self.padding == "border")))
        return offsets(theta, size)

    def transform(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → the same shape."""
        return sample(x, self.offset(x), self.padding == "border")

    def attention(self, x: Tensor) -> dict[str, Tensor]:
        """x: (B, C, *S) → `offset`: (B, dims, *S), in pixels, float32 or wider: where each position looks."""
        return {"offset": self.offset(x)}


def composed(first: Tensor, then: Tensor) -> Tensor:
    """Transforms minus the identity, (B, dims, dims + 1) each → that of p ↦ first(then(p)); 0 where both are 0."""
    dims = first.shape[1]
    return first + then + product(first[:, :, :dims], then)


class Crop(Localising, GateBlock):
    """Attended crop: x · M, M = Π over the axes of h(p − t + l) − h(p − t − l), h(z) = 1 / (1 + exp(−κ z)).

    CVPR 2017, "Look Closer to See Better" (Fu, Zheng and Mei), section 3.2: a window of centre t and half a side l,
    whose edges are so soft that it can be learnt by gradients. The localisation net (`Localising`, with `reduction`,
    `kernel_size`, `bias`) gives t = tanh z on each axis and one l = σ(z) for all of them, both as parts of half the
    map's sides. `sharpness` is κ for each pixel.

    A window never returns x, so `init="identity"` means `blend`.

    Deviations: in the paper the window is cut out and enlarged for another network; here it stays in its place, so
    that the shape is kept.
    """

    facts = Facts(
        "crop", family="spatial", spatial=True, paper="CVPR 2017", equation="section 3.2",
        summary="attended crop: a window with soft edges, whose place and size the map itself decides",
    )  # fmt: skip

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        init: Init = "identity",
        sharpness: Annotated[float, Positive()] = 10,
        kernel_size: Literal[1, 3, 5, 7] = 3,
        reduction: Annotated[float, Reduction()] = 16,
        bias: bool = True,
        divisor: Annotated[int, Int(min=1)] = 1,
    ) -> None:
        super().__init__(**given(locals()))
        self.sharpness = float(sharpness)
        self.build(dims + 1, kernel_size=kernel_size, reduction=reduction, bias=bias, divisor=divisor)
        self.initialise()

    def needs_blend(self) -> bool:
        """Always: a window has edges."""
        return True

    def init_paper(self) -> None:
        """Zero biases: about the middle half of the map."""
        self.init_blend()

    def factor(self, x: Tensor) -> Tensor:
        """x: (B, C, *S) → M: (B, 1, *S), float32 or wider."""
        z = self.located(x)
        z = z.view(list(z.shape) + [1] * self.dims)
        half, m = torch.sigmoid(z[:, -1:]), torch.ones_like(z[:, -1:])
        size = static_shape(x)[2:]
        for axis, p in enumerate(centres(size, z)):
            away, pixels = p - torch.tanh(z[:, axis : axis + 1]), self.sharpness * size[axis] / 2
            m = m * (torch.sigmoid(pixels * (away + half)) - torch.sigmoid(pixels * (away - half)))
        return m


def centres(size: list[int], like: Tensor) -> list[Tensor]:
    """p̂ along each axis of a map, from −1 + 1/n to 1 − 1/n, shaped to broadcast against (B, C, *size)."""
    made = []
    for axis, n in enumerate(size):
        p = torch.arange(n, device=like.device, dtype=at_least_float32(like[:0]).dtype)
        made.append(((2 * p + 1) / n - 1).to(like.dtype).view([-1] + [1] * (len(size) - 1 - axis)))
    return made


def offsets(theta: Tensor, size: list[int]) -> Tensor:
    """θ − (I, 0): (B, dims, dims + 1) → pixels to move from each position of a map: (B, dims, *size)."""
    places = centres(size, theta)
    moved = []
    for row, n in zip(theta.unbind(1), size):  # noqa: B905 (not in TorchScript)
        weights = row.view(list(row.shape) + [1] * len(size)).unbind(1)
        total = weights[-1]
        for weight, place in zip(weights[:-1], places):  # noqa: B905
            total = total + weight * place
        moved.append(total * (n / 2))
    return torch.stack(moved, 1)


def sample(x: Tensor, offset: Tensor, border: bool) -> Tensor:
    """x: (B, C, *S) interpolated at p + offset, (B, dims, *S) in pixels, for each position p: same shape.

    The corners are found from the offset alone, floor and remainder, and p is added in whole numbers: a
    coordinate p + 0 that went through floating point could miss p by a rounding.
    """
    size = static_shape(x)[2:]
    moves, dims = offset.unbind(1), len(size)
    corners = [_neighbours(moves[axis], size[axis], axis, dims, border) for axis in range(dims)]
    flat = x.flatten(2)
    y: Tensor | None = None
    for corner in range(1 << dims):
        at, weight = corners[0][corner >> (dims - 1)]
        for axis in range(1, dims):
            index, w = corners[axis][(corner >> (dims - 1 - axis)) % 2]
            at, weight = at * size[axis] + index, weight * w
        found = flat.gather(2, at.flatten(1).unsqueeze(1).expand(-1, x.shape[1], -1)).view(x.shape)
        part = found * weight.unsqueeze(1).to(x.dtype)
        y = part if y is None else y + part
    assert y is not None
    return laid_out_like(x, y)


def _neighbours(move: Tensor, n: int, axis: int, dims: int, border: bool) -> list[tuple[Tensor, Tensor]]:
    """Both along one axis: (index, weight) pairs, (B, *S) each. The weight outside is 0."""
    move = move.clamp(-(n + 1), n + 1)  # further is as far outside, and must not overflow a whole number
    floor = move.floor()
    here = torch.arange(n, device=move.device).view([-1] + [1] * (dims - 1 - axis))
    pairs: list[tuple[Tensor, Tensor]] = []
    for step in range(2):
        weight = move - floor if step else 1 - (move - floor)
        index = here + floor.long() + step
        inside = weight if border else weight * ((index >= 0) & (index < n))
        pairs.append((index.clamp(0, n - 1), inside))
    return pairs
