"""What befalls a photograph: noise, blur, contrast, compression, each mild to strong.

After Hendrycks and Dietterich (arXiv:1903.12261, section 3), whose fifteen corruptions fall in four groups: noise,
blur, weather and digital. Here are seven of them without weather, at strengths for images of some 64 pixels: the
extents (of blur, of pixels) are shares of the image's side, so that size changes little.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .task import draw, pillow, tensor_of

Damage = Callable[[Tensor, float, torch.Generator], Tensor]
"""(image (3, size, size) in [0, 1], strength in [0, 1], chance) → the same shape; what leaves [0, 1] is cut later."""


def none(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """The photograph as it is."""
    return x


def gaussian_noise(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """x + n, n normal with deviation 0.04 to 0.16 in each channel."""
    return x + torch.randn(x.shape, generator=generator) * between(0.04, 0.16, strength)


def impulse_noise(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """A share of 1 to 10 % of all values are 0 or 1."""
    chance = torch.rand(x.shape, generator=generator)
    share = between(0.01, 0.10, strength)
    return x.masked_fill(chance < share / 2, 0.0).masked_fill(chance > 1 - share / 2, 1.0)


def defocus_blur(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """A disc of radius 1/60 to 1/20 of the side."""
    radius = x.shape[-1] * between(1 / 60, 1 / 20, strength)
    reach = int(radius) + 1
    steps = torch.arange(-reach, reach + 1.0)
    distance = (steps[:, None] ** 2 + steps[None] ** 2).sqrt()
    return _filtered(
        x, (radius + 0.5 - distance).clamp(0, 1)
    )  # a rim pixel counts by how much of it lies within


def motion_blur(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """A line of 1/16 to 1/5 of the side in a direction of chance."""
    reach = max(1, round(x.shape[-1] * between(1 / 32, 1 / 10, strength)))
    angle = torch.rand((), generator=generator) * torch.pi
    along = torch.linspace(-reach, reach, 8 * reach + 1)
    rows, columns = ((along * f(angle) + reach).round().long() for f in (torch.sin, torch.cos))
    kernel = torch.zeros(2 * reach + 1, 2 * reach + 1)
    kernel.index_put_((rows, columns), torch.ones(len(along)), accumulate=True)
    return _filtered(x, kernel)


def low_contrast(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """m + c (x − m) with the mean m of each channel, c from 0.6 down to 0.2."""
    mean = x.mean((1, 2), keepdim=True)
    return mean + between(0.6, 0.2, strength) * (x - mean)


def jpeg(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Compressed with quality 40 down to 8."""
    image, store = pillow().Image, io.BytesIO()
    pixels = (x.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    image.fromarray(pixels).save(store, "JPEG", quality=round(between(40, 8, strength)))
    with image.open(store) as read:
        return tensor_of(read.convert("RGB"))


def pixelate(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Reduced to 3/5 to 1/4 of the side, and enlarged without smoothing."""
    side = max(1, round(x.shape[-1] * between(3 / 5, 1 / 4, strength)))
    small = F.interpolate(x[None], size=(side, side), mode="area")
    return F.interpolate(small, size=x.shape[1:], mode="nearest")[0]


DAMAGES: dict[str, Damage] = {
    "none": none,
    "gaussian noise": gaussian_noise,
    "impulse noise": impulse_noise,
    "defocus blur": defocus_blur,
    "motion blur": motion_blur,
    "low contrast": low_contrast,
    "jpeg": jpeg,
    "pixelate": pixelate,
}
"""Class → what makes it, in the order of the labels."""


def damaged(x: Tensor, kind: Damage, generator: torch.Generator) -> Tensor:
    """An image (3, size, size) in [0, 1] with a damage of one of five strengths."""
    return kind(x, draw(5, generator) / 4, generator).clamp(0, 1)


def between(mild: float, strong: float, strength: float) -> float:
    """From mild (strength 0) to strong (1)."""
    return mild + (strong - mild) * strength


def _filtered(x: Tensor, kernel: Tensor) -> Tensor:
    """Each channel of x convolved with a square kernel of odd side, brought to sum 1; the rim is mirrored."""
    reach = len(kernel) // 2
    weight = (kernel / kernel.sum()).expand(len(x), 1, *kernel.shape)
    return F.conv2d(F.pad(x[None], [reach] * 4, mode="reflect"), weight, groups=len(x))[0]
