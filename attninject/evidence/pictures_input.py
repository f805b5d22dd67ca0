"""An image file as the model is given it, whatever its size, mode and rotation, and where a position lies in it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn

from attninject.errors import PictureError
from attninject.observe.example_inputs import first_float
from attninject.training.data.preprocessing import Preprocessing, preprocessing_of
from attninject.training.data.reading import eight_bits
from attninject.training.experiment import Data

ImageLike = str | os.PathLike[str] | Image.Image | Tensor
Position = tuple[int, int]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Eyes:
    """How images enter a model.

    Attributes:
        preprocessing: size, mean, deviation, interpolation, crop.
        channels: of the first convolution.
        like: a tensor with the dtype and on the device of the model's inputs.
        squash: take the whole image, whatever the ratio of its sides, in place of a square at its centre.
    """

    preprocessing: Preprocessing
    channels: int
    like: Tensor
    squash: bool = False


@dataclass(frozen=True)
class Seen:
    """One image as a model is given it.

    Attributes:
        name: what its files are called after.
        x: (1, C, H, W).
        shown: the same part of the image in RGB, H × W, before any normalisation.
        at: the position asked for, as fractions of height and width of x, each in [0, 1).
        pixel: the same as (x, y) in the file's own pixels.
    """

    name: str
    x: Tensor
    shown: Image.Image
    at: tuple[float, float]
    pixel: Position


def eyes_of(model: nn.Module, data: Data | None = None, size: int | None = None) -> Eyes:
    """As timm's settings of the model say, or ImageNet's; `size` or that of `data` go before the model's own."""
    found = preprocessing_of(model, data or Data("imagefolder"))
    wanted = size or (data.size if data else None) or _built_for(model) or found.size
    made = Preprocessing(wanted, found.mean, found.std, found.interpolation, found.crop)
    like = first_float(model, torch.empty(0, dtype=torch.float32))
    return Eyes(made, _first_channels(model), like, squash=data is not None and data.kind == "digits")


def _built_for(model: nn.Module) -> int | None:
    """The side that a vision transformer was built for, which may be another than its weights' settings say."""
    for holder, name in ((getattr(model, "patch_embed", None), "img_size"), (model, "image_size")):
        side = getattr(holder, name, None)
        side = side[-1] if isinstance(side, tuple | list) and side else side
        if isinstance(side, int) and not isinstance(side, bool):
            return side
    return None


def _first_channels(model: nn.Module) -> int:
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return next((int(m.in_channels) for m in model.modules() if isinstance(m, kinds)), 3)


def look_at(images: Iterable[ImageLike], eyes: Eyes, at: Position | None) -> list[Seen]:
    """Every image, each under a name of its own.

    Raises:
        PictureError: a file is no image, the position lies outside, the model takes no images of 1 or 3 channels.
    """
    found: list[Seen] = []
    for image in images:
        name = _name_of(image)
        taken = {seen.name for seen in found}
        tries = (name if i == 1 else f"{name}-{i}" for i in range(1, len(taken) + 2))
        own = next(n for n in tries if n not in taken)
        found.append(
            _tensor(own, image, eyes, at) if isinstance(image, Tensor) else _read(own, image, eyes, at)
        )
    return found


def _name_of(image: ImageLike) -> str:
    source = getattr(image, "filename", "") if isinstance(image, Image.Image) else image
    return (Path(source).stem if isinstance(source, str | os.PathLike) else "") or "image"


def _read(name: str, source: str | os.PathLike[str] | Image.Image, eyes: Eyes, at: Position | None) -> Seen:
    """Resized and cropped to the centre in one step, as timm's evaluation does in two.

    Only what lies within the crop is resampled, so that an image of 1 × 5000 pixels takes no more memory than
    another; at the border of the crop this differs from timm by a fraction of a grey level.
    """
    if eyes.channels not in (1, 3):
        raise PictureError(
            f"the model takes {eyes.channels} channels: give a tensor (C, H, W) in place of {name}"
        )
    image = _opened(source).convert("L" if eyes.channels == 1 else "RGB")
    given = eyes.preprocessing
    box = (0, 0, *image.size) if eyes.squash else _crop(image.size, given)
    how = getattr(Image.Resampling, given.interpolation.upper(), Image.Resampling.BICUBIC)
    small = image.resize((given.size, given.size), how, box)
    values = torch.from_numpy(np.array(small)).view(given.size, given.size, eyes.channels).movedim(2, 0)
    mean, std = (_per_channel(v, eyes.channels) for v in (given.mean, given.std))
    x = ((values / 255 - mean) / std)[None].to(eyes.like)
    pixel, where = _placed(name, at, image.size, box)
    return Seen(name, x, small.convert("RGB"), where, pixel)


def _per_channel(values: tuple[float, ...], channels: int) -> Tensor:
    """(channels, 1, 1); one grey channel has the colours' mean."""
    t = torch.tensor(values, dtype=torch.float32)
    return (t if len(t) == channels else t.mean().expand(channels)).view(-1, 1, 1)


def _crop(size: tuple[int, int], given: Preprocessing) -> Box:
    """The centre that is left when the shorter side becomes size / crop and size × size of that are kept."""
    width, height = size
    side = min(size) * given.size / max(given.size, int(given.size / given.crop))
    left, top = (width - side) / 2, (height - side) / 2
    return (left, top, left + side, top + side)


def _tensor(name: str, x: Tensor, eyes: Eyes, at: Position | None) -> Seen:
    """x: (C, H, W) or (1, C, H, W), already as the model takes it; shown from its least value to its largest."""
    batch = x[None] if x.ndim == 3 else x
    if batch.ndim != 4 or batch.shape[0] != 1:
        raise PictureError(f"an image is a tensor (C, H, W) or (1, C, H, W), found {tuple(x.shape)}")
    grey = batch[0].detach().float().cpu()
    grey = grey if grey.shape[0] == 3 else grey.mean(0, keepdim=True).expand(3, -1, -1)
    least, most = grey.min(), grey.max()
    scaled = ((grey - least) / (most - least).clamp_min(1e-12) * 255).round().to(torch.uint8)
    shown = Image.fromarray(scaled.movedim(0, 2).contiguous().numpy())
    pixel, where = _placed(name, at, shown.size, (0, 0, *shown.size))
    return Seen(name, batch.to(eyes.like), shown, where, pixel)


def _placed(
    name: str, at: Position | None, size: tuple[int, int], box: Box
) -> tuple[Position, tuple[float, float]]:
    """The pixel (x, y), by default the centre, and where it lies in the box: (down, right) in [0, 1)."""
    width, height = size
    x, y = at if at is not None else (width // 2, height // 2)
    if not (0 <= x < width and 0 <= y < height):
        raise PictureError(f"the position {x},{y} lies outside {name}, an image of {width}×{height} pixels")
    left, top, right, bottom = box
    across, down = (x + 0.5 - left) / (right - left), (y + 0.5 - top) / (bottom - top)
    if not (0 <= across < 1 and 0 <= down < 1):
        seen = f"x {round(left)} to {round(right) - 1}, y {round(top)} to {round(bottom) - 1}"
        raise PictureError(f"the position {x},{y} lies outside what the model sees of {name}: {seen}")
    return (x, y), (down, across)


# --- files --------------------------------------------------------------------------------------


def _opened(source: str | os.PathLike[str] | Image.Image) -> Image.Image:
    """Upright, 8 bits per channel, without a palette."""
    if isinstance(source, Image.Image):
        return eight_bits(ImageOps.exif_transpose(source))
    try:
        with Image.open(source) as file:
            return eight_bits(ImageOps.exif_transpose(file))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's, by format
        what = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        said = "it is none that Pillow knows" if isinstance(error, UnidentifiedImageError) else what
        raise PictureError(f"{os.fspath(source)} cannot be read as an image: {said}") from error
