"""Which damage a photograph has, or in which order its colours are."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..samples import Samples
from .damages import DAMAGES, Damage, damaged
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
    return _crops("corruptions", DAMAGES, seed, size, (train, test), folder)


def channels(
    seed: int = 0, size: int = 64, train: int = 1000, test: int = 500, folder: str | Path = WALLPAPER_FOLDER
) -> Task:
    """In which of the six orders the colours of a crop of a photograph are; divided as `corruptions` is.

    A grey crop is the same in every order, so that there is a ceiling below 100 %.

    Raises:
        DataError: the photographs are not there; names the package.
    """
    orders = {"".join("RGB"[i] for i in o): _ordered(o) for o in itertools.permutations(range(3))}
    return _crops("channels", orders, seed, size, (train, test), folder)


def _ordered(order: Sequence[int]) -> Damage:
    return lambda x, strength, generator: x[list(order)]


class Origin(NamedTuple):
    """Of photographs, in words."""

    origin: str
    licence: str


def divided_photos(
    folder: str | Path, generator: torch.Generator
) -> tuple[list[Tensor], list[Tensor], Origin]:
    """Photographs for training and for test, and where they come from."""
    found = list(wallpapers(folder).values())
    order = torch.randperm(len(found), generator=generator).tolist()
    held = [found[i] for i in order[:HELD]]
    used = [found[i] for i in order[HELD:]] + list(scikit_learns().values())
    return used, held, Origin(
        f"{len(found)} photographs of Debian's lomiri-wallpapers-16.04 (contributors to Ubuntu Touch) and "
        "scikit-learn's load_sample_images (Flickr, danielbuechele and vultilion)",
        "CC BY 4.0, CC BY-SA 4.0 and CC0 1.0 (wallpapers), CC BY 2.0 (scikit-learn's)",
    )  # fmt: skip


def _crops(
    name: str, kinds: Mapping[str, Damage], seed: int, size: int, counts: Sequence[int], folder: str | Path
) -> Task:
    """Crops of photographs with what makes each class done to them, as many for training and test as `counts` says."""
    generator = torch.Generator().manual_seed(seed)
    used, held, origin = divided_photos(folder, generator)
    parts = []
    for photos, count in zip((used, held), counts, strict=True):
        labels = torch.arange(count) % len(kinds)
        makers = list(kinds.values())
        images = [damaged(crop(photos, size, generator), makers[n], generator) for n in labels.tolist()]
        parts.append(Samples(torch.stack(images), labels))
    return Task(name, parts[0], parts[1], tuple(kinds), *origin)
