"""What a task is, and what its loaders share: chance from a seed, and Pillow where it is needed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attninject.errors import MissingPackageError

from ..samples import Samples


@dataclass(frozen=True)
class Task:
    """Images in [0, 1], (n, 3, size, size), with labels; training and test from different sources.

    `classes`: names by label. `origin`: where the images come from. `licence`: under which they may be used.
    """

    name: str
    train: Samples
    test: Samples
    classes: tuple[str, ...]
    origin: str
    licence: str

    def normalised(self, mean: Sequence[float], std: Sequence[float]) -> Task:
        """The same with (x − mean) / std per channel, as a model wants it."""
        m, s = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))
        parts = [Samples((part.images - m) / s, part.labels) for part in (self.train, self.test)]
        return Task(self.name, parts[0], parts[1], self.classes, self.origin, self.licence)


# --- chance ------------------------------------------------------------------------------------


def draw(below: int, generator: torch.Generator) -> int:
    """A whole number from 0 to below `below`; 0 where there is no choice."""
    return int(torch.randint(max(1, below), (1,), generator=generator))


def shuffled(files: Sequence[Path], root: Path, seed: int) -> list[Path]:
    """The files in an order of chance that is the same on every machine and hangs on no other file."""

    def key(file: Path) -> str:
        return hashlib.sha256(f"{seed}:{file.relative_to(root).as_posix()}".encode()).hexdigest()

    return sorted(files, key=key)


def crop(photos: Sequence[Tensor], size: int, generator: torch.Generator) -> Tensor:
    """A random square of a random photograph, of up to half its height and never fewer pixels than `size`."""
    photo = photos[draw(len(photos), generator)]
    height, width = photo.shape[1:]
    most = min(height, width)
    side = min(most, size + draw(max(1, most // 2 - size + 1), generator))
    top, left = draw(height - side + 1, generator), draw(width - side + 1, generator)
    crop = photo[:, top : top + side, left : left + side]
    return F.interpolate(crop[None], size=(size, size), mode="bilinear", align_corners=False, antialias=True)[
        0
    ]


# --- pictures in files -------------------------------------------------------------------------


def pillow() -> Any:
    """Pillow, with what draws letters.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import PIL.Image
        import PIL.ImageDraw
        import PIL.ImageFont
    except ImportError as error:
        raise MissingPackageError(
            "letters, stamps and photographs are read with Pillow: pip install pillow"
        ) from error
    return PIL


def tensor_of(image: Any) -> Tensor:
    """A picture of Pillow's, (channels, height, width) in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
