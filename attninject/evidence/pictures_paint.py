"""Numbers as colours: heat maps, heat maps over an image, bars. Pillow alone, which torchvision brings."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SIDE = 320  # pixels that a small map or image is enlarged to at least, by a whole factor
INK = (120, 124, 132, 255)  # lines and numbers: readable on white and on black
BEFORE = (196, 118, 22, 255)
FILL = (78, 121, 196, 255)


@functools.cache
def palette() -> Any:
    """256 colours, (256, 3) uint8: from dark violet over red to light yellow, lightness rising evenly.

    A straight line of lightness and a turn of hue in Oklab (B. Ottosson, 2020): equal steps of the value look
    like equal steps, also in grey print. All are distinct, so that a value can be read back.
    """
    t = np.linspace(0.0, 1.0, 256)
    lightness, hue = 0.20 + 0.74 * t, np.deg2rad(290 + 175 * t)
    chroma = 0.04 + 0.15 * np.sin(np.pi * np.clip(0.08 + 0.84 * t, 0, 1))
    a, b = chroma * np.cos(hue), chroma * np.sin(hue)
    cube = np.stack(
        [
            lightness + 0.3963377774 * a + 0.2158037573 * b,
            lightness - 0.1055613458 * a - 0.0638541728 * b,
            lightness - 0.0894841775 * a - 1.2914855480 * b,
        ]
    )
    to_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = (to_rgb @ cube**3).T.clip(0, 1)
    curved = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (curved * 255).round().astype(np.uint8)


def levels(values: Tensor, low: float, high: float) -> Any:
    """(h, w) → indices into the palette, uint8: low is 0, high 255; 128 everywhere where both are the same."""
    array = values.detach().float().cpu().numpy()
    if not high > low:
        return np.full(array.shape, 128, np.uint8)
    scaled = (np.nan_to_num(array, nan=low) - low) / (high - low)
    return (scaled.clip(0, 1) * 255).round().astype(np.uint8)


def heat(values: Tensor, low: float, high: float) -> Image.Image:
    """(h, w) → an RGB image with a square of pixels for each value."""
    factor = max(1, -(-SIDE // max(values.shape)))
    index = levels(values, low, high).repeat(factor, 0).repeat(factor, 1)
    return Image.fromarray(palette()[index])


def over(values: Tensor, low: float, high: float, image: Image.Image) -> Image.Image:
    """The map (h, w), smoothly enlarged, over the image in grey."""
    back = enlarged(image)
    smooth = Image.fromarray(levels(values, low, high)).resize(back.size, Image.Resampling.BICUBIC)
    colours = Image.fromarray(palette()[np.array(smooth)])
    return Image.blend(back.convert("L").convert("RGB"), colours, 0.55)


def enlarged(image: Image.Image) -> Image.Image:
    """A small image by a whole factor, so that its longer side has `SIDE` pixels or more."""
    factor = max(1, -(-SIDE // max(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def marked(image: Image.Image, at: tuple[float, float]) -> Image.Image:
    """A ring around a position (down, right), each a fraction in [0, 1)."""
    made = image.copy()
    y, x = at[0] * image.height, at[1] * image.width
    size = max(image.size) / 32
    draw = ImageDraw.Draw(made)
    for radius, colour in ((size, (0, 0, 0)), (size * 0.85, (255, 255, 255)), (size * 0.55, (0, 0, 0))):
        draw.ellipse(
            (x - radius, y - radius, x + radius, y + radius), outline=colour, width=max(1, round(size / 5))
        )
    return made


def bars(values: Tensor, start: Tensor | None = None, base: float = 1.0) -> Image.Image:
    """(n,) → a bar for each value, from the line of `base`; a dash where it was at the start. No background."""
    array = values.detach().float().cpu().numpy().reshape(-1)
    before = array[:0] if start is None else start.detach().float().cpu().numpy().reshape(-1)
    chart = _Chart(np.concatenate([array, before, [base]]), len(array))
    for i, value in enumerate(array):
        chart.bar(i, float(value), base)
    for i, value in enumerate(before):
        chart.dash(i, float(value))
    chart.scale(base)
    return chart.image


class _Chart:
    """n places side by side in an image of `WIDTH` × `HEIGHT`, a scale at the left."""

    WIDTH, HEIGHT, MARGIN, EDGE = 896, 420, 124, 18

    def __init__(self, values: Any, count: int) -> None:
        self.image = Image.new("RGBA", (self.WIDTH, self.HEIGHT), (0, 0, 0, 0))
        self.draw = ImageDraw.Draw(self.image)
        known = values[np.isfinite(values)]
        self.low, self.high = float(known.min()), float(known.max())
        self.count = count

    def y(self, value: float) -> float:
        """Pixels from the top; the middle where all values are the same."""
        room = self.HEIGHT - 2 * self.EDGE
        if not self.high > self.low:
            return self.HEIGHT / 2
        return self.EDGE + room * (
            1 - (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        )

    def _span(self, i: int) -> tuple[int, int]:
        """Whole pixels, so that all gaps are alike; no gaps between bars that are narrow."""
        step = (self.WIDTH - self.MARGIN) / self.count
        left, right = (self.MARGIN + int(step * k) for k in (i, i + 1))
        return left, max(left, right - 1 - (2 if step >= 8 else 0))

    def bar(self, i: int, value: float, base: float) -> None:
        """From the line of `base` to the value, two pixels at least."""
        left, right = self._span(i)
        top, bottom = sorted((self.y(value), self.y(base)))
        self.draw.rectangle((left, top, right, max(bottom, top + 1)), fill=FILL)

    def dash(self, i: int, value: float) -> None:
        """A short line across the bar's place."""
        left, right = self._span(i)
        self.draw.rectangle((left, self.y(value) - 3, right, self.y(value) + 2), fill=BEFORE)

    def scale(self, base: float) -> None:
        """The line of `base`, and the numbers of base, least and largest that do not stand in one another's way."""
        self.draw.line((self.MARGIN, self.y(base), self.WIDTH, self.y(base)), fill=INK, width=2)
        font = ImageFont.load_default(30)
        done: list[float] = []
        for value in (base, self.low, self.high):
            place = self.y(value)
            if all(abs(place - other) > 36 for other in done):
                done.append(place)
                self.draw.text((self.MARGIN - 10, place), f"{value:.2g}", fill=INK, font=font, anchor="rm")
