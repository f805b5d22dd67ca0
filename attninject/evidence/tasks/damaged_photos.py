"""Which damage a photograph has."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..samples import Samples
from .damages import DAMAGES, damaged
from .photographs import WALLPAPER_FOLDER, scikit_learns, wallpapers
from .task import Task, crop

HELD = 4
"""Photographs for test."""


def corruptions(
    seed: int = 0, size: int = 64, train: int = 1000, test: int = 500, folder: str | Path = WALLPAPER_FOLDER
) -> Task:
    """Crops of photographs, undamaged or with one of seven damages of five strengths (see `damages`).

    After Hendrycks and Dietterich (arXiv:1903.12261), who ask how well a classifier bears them; here they are the
    classes. What an image shows says nothing of its label. Divided by photograph: four of fifteen are for test,
    drawn from the seed among the wallpapers; scikit-learn's two are always for training.

    Args:
        folder: where Debian's package lomiri-wallpapers-16.04 has put its pictures.

    Raises:
        DataError: they are not there; names the package.
    """
    generator = torch.Generator().manual_seed(seed)
    found = list(wallpapers(folder).values())
    order = torch.randperm(len(found), generator=generator).tolist()
    held = [found[i] for i in order[:HELD]]
    used = [found[i] for i in order[HELD:]] + list(scikit_learns().values())
    made = [_crops(photos, size, n, generator) for photos, n in ((used, train), (held, test))]
    return Task(
        "corruptions", made[0], made[1], tuple(DAMAGES),
        f"{len(found)} photographs of Debian's lomiri-wallpapers-16.04 (contributors to Ubuntu Touch) and "
        "scikit-learn's load_sample_images (Flickr, danielbuechele and vultilion)",
        "CC BY 4.0, CC BY-SA 4.0 and CC0 1.0 (wallpapers), CC BY 2.0 (scikit-learn's)",
    )  # fmt: skip


def _crops(photos: Sequence[Tensor], size: int, count: int, generator: torch.Generator) -> Samples:
    labels = torch.arange(count) % len(DAMAGES)
    kinds = list(DAMAGES.values())
    images = [damaged(crop(photos, size, generator), kinds[label], generator) for label in labels.tolist()]
    return Samples(torch.stack(images), labels)
