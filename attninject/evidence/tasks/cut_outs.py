"""Photographs of things, cut out: what they show, and which way up they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from attninject.errors import DataError

from ..samples import Samples
from .task import Task, pillow, shuffled, tensor_of

STAMP_FOLDER = "/usr/share/tuxpaint/stamps"
ORIGIN = "Tux Paint's stamps (Debian's tuxpaint-stamps-default), collected by Bill Kendrick and contributors"
LICENCE = "GPL-2"
WITH_AN_UP = ("animals", "food", "plants", "town", "vehicles")
"""Folders of photographs that stand upright; in others are drawings, and one thing in several turns."""


def stamps(seed: int = 0, size: int = 96, folder: str | Path = STAMP_FOLDER, least: int = 15) -> Task:
    """Photographs of animals, fruit, birds, houses, flowers … cut out, on random grey; a class is a folder.

    Classes are the folders one or two levels down with at least `least` photographs (drawings, folders named cartoon
    and files in SVG, are left out). A quarter of each class is for test; no file is in both.

    Raises:
        DataError: the folder is not there; names the package.
    """
    root = _folder(folder)
    classes = {name: files for name, files in _by_folder(root).items() if len(files) >= least}
    if len(classes) < 2:
        raise DataError(
            f"{root} has {len(classes)} folders with at least {least} photographs; two are needed"
        )
    parts: dict[str, list[tuple[Path, int]]] = {"train": [], "test": []}
    for label, files in enumerate(classes.values()):
        for place, file in enumerate(shuffled(files, root, seed)):
            parts["test" if place < len(files) // 4 else "train"].append((file, label))
    generator = torch.Generator().manual_seed(seed)
    made = [_opened(parts[name], size, generator) for name in ("train", "test")]
    return Task("stamps", made[0], made[1], tuple(classes), ORIGIN, LICENCE)


def rotations(
    seed: int = 0, size: int = 64, train: int = 1000, test: int = 500, folder: str | Path = STAMP_FOLDER
) -> Task:
    """Which way up a photograph of a thing is: as it was, or turned by one, two or three quarters.

    After Gidaris et al. (arXiv:1803.07728), whose labels for learning without labels these are. From the photographs
    of animals, food, plants, town and vehicles, a quarter of each folder for test: a file is in one of both alone,
    and comes back in another turn once all have been. Of some (an orange, an insect from above) nobody could tell, so
    there is a ceiling below 100 %; and as things keep their outline, a wide one on its side gives itself away.

    Raises:
        DataError: the folder is not there, or has too few photographs to divide them.
    """
    root = _folder(folder)
    parts: tuple[list[Path], list[Path]] = [], []
    for name, files in _by_folder(root).items():
        standing = files if name.split("/")[0] in WITH_AN_UP else []
        for place, file in enumerate(shuffled(standing, root, seed)):
            parts[place < len(files) // 4].append(file)
    if not all(len(part) >= 2 for part in parts):
        raise DataError(
            f"{root} has {sum(map(len, parts))} photographs in {', '.join(WITH_AN_UP)}; more are needed to divide them"
        )
    generator = torch.Generator().manual_seed(seed)
    made = [_turned(part, size, n, generator) for part, n in zip(parts, (train, test), strict=True)]
    classes = ("upright", "left", "upside down", "right")
    return Task("rotations", made[0], made[1], classes, ORIGIN, LICENCE)


def _folder(folder: str | Path) -> Path:
    root = Path(folder)
    if not root.is_dir():
        raise DataError(
            f"there is no folder {root}: the photographs are Debian's package tuxpaint-stamps-default (GPL-2): "
            "apt install tuxpaint-stamps-default, or unpack it and give folder="
        )
    return root


def _by_folder(root: Path) -> dict[str, list[Path]]:
    """Class → photographs: `animals/birds`, or `space` where nothing lies deeper."""
    found: dict[str, list[Path]] = {}
    for file in sorted(root.rglob("*.png")):
        within = file.relative_to(root).parts[:-1]
        if within and not any("cartoon" in part.lower() for part in within) and within[0] != "symbols":
            found.setdefault("/".join(within[:2]), []).append(file)
    return found


def _opened(files: Sequence[tuple[Path, int]], size: int, generator: torch.Generator) -> Samples:
    order = torch.randperm(len(files), generator=generator).tolist()
    images = [_stamp(files[i][0], size, generator) for i in order]
    return Samples(torch.stack(images), torch.tensor([files[i][1] for i in order]))


def _turned(files: Sequence[Path], size: int, count: int, generator: torch.Generator) -> Samples:
    """`count` images; every file in one turn before any comes in a second, and each turn about as often."""
    order = torch.randperm(len(files), generator=generator).tolist()
    numbers = torch.arange(count)
    labels = (numbers + numbers // len(files)) % 4
    images = [
        torch.rot90(_stamp(files[order[n % len(files)]], size, generator), label, (1, 2))
        for n, label in enumerate(labels.tolist())
    ]
    return Samples(torch.stack(images), labels)


def _stamp(file: Path, size: int, generator: torch.Generator) -> Tensor:
    """The stamp, (3, size, size), whole and centred on a random grey."""
    with pillow().Image.open(file) as opened:
        image = opened.convert("RGBA")
    image.thumbnail((size, size))
    pixels = tensor_of(image)
    canvas = torch.rand(1, 1, 1, generator=generator).expand(3, size, size).clone()
    height, width = pixels.shape[1:]
    top, left = (size - height) // 2, (size - width) // 2
    under = canvas[:, top : top + height, left : left + width]
    under.copy_(pixels[:3] * pixels[3:] + under * (1 - pixels[3:]))
    return canvas
