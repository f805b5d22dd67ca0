"""Image files as pictures of eight bits per channel, whatever their mode."""

from __future__ import annotations

from typing import IO, Any

import numpy as np
from PIL import Image


def read_rgb(file: str | IO[bytes]) -> Image.Image:
    """An image file in RGB.

    Raises:
        OSError, SyntaxError, ValueError, DecompressionBombError: Pillow's, where it cannot be read.
    """
    with Image.open(file) as image:
        return rgb(image)


def rgb(image: Image.Image) -> Image.Image:
    """Grey, transparent, CMYK and palette images in RGB, and those of more than eight bits."""
    return eight_bits(image).convert("RGB")


def eight_bits(image: Image.Image) -> Image.Image:
    """Integers of 16 bits and floats are scaled, where Pillow's own conversion would cut them off at 255."""
    if image.mode == "P":  # its transparency may be bytes, which only RGBA takes
        return image.convert("RGBA")
    if not image.mode.startswith(("I", "F")):
        return image
    values: Any = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0.0, neginf=0.0)
    tops = {"I": (255.0, 65535.0), "F": (1.0, 255.0, 65535.0)}.get(image.mode, (65535.0,))
    most = values.max()  # modes without a range of their own: the narrowest usual one that holds them
    full = next((top for top in tops if most <= top), most)
    return Image.fromarray((values / full * 255).clip(0, 255).round().astype(np.uint8))
