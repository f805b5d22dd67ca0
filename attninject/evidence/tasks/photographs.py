"""Photographs that packages carry, whole: scikit-learn's two, and those among Debian's lomiri-wallpapers-16.04."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from attninject.errors import DataError, MissingPackageError

from .task import pillow, tensor_of

WALLPAPER_FOLDER = "/usr/share/backgrounds"
WALLPAPERS = (
    "Bridge_by_Sander_Klootwijk", "Dragonfly_by_Bolly", "Picture_0B_by_freespace", "Picture_1A_by_freespace",
    "Wine_by_Jakkub_Mede", "aitzgorri_by_Aitzol_Berasategi", "free_by_Peter_Nerlich",
    "friends_by_Aitzol_Berasategi", "greentock_by_Peter_Nerlich", "life_by_Aitzol_Berasategi",
    "picosdeeuropa_by_Aitzol_Berasategi", "seeding_by_Clements_Engelhardt", "sunset_by_Aitzol_Berasategi",
)  # fmt: skip
"""Those of the package that are photographs; the others are painted. CC BY 4.0, CC BY-SA 4.0, and `seeding` CC0 1.0."""

SHORT_SIDE = 480
"""Pixels to which the wallpapers are reduced, near to scikit-learn's photographs (427 × 640)."""


def scikit_learns() -> dict[str, Tensor]:
    """china.jpg and flower.jpg, (3, 427, 640) in [0, 1], by name (CC BY 2.0).

    Raises:
        MissingPackageError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise MissingPackageError(
            "two photographs come with scikit-learn: pip install attninject[train]"
        ) from error
    found = load_sample_images()
    pixels = [torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255 for image in found.images]
    return dict(zip((Path(name).name for name in found.filenames), pixels, strict=True))


def wallpapers(folder: str | Path = WALLPAPER_FOLDER) -> dict[str, Tensor]:
    """The photographs of lomiri-wallpapers-16.04 by name, (3, height, width) in [0, 1], the shorter of both `SHORT_SIDE`.

    Raises:
        DataError: they are not in the folder; names the package.
    """
    files = [Path(folder) / f"{name}.jpg" for name in WALLPAPERS]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(files)} photographs are not in {folder} ({missing[0]}); they are in Debian's "
            "package lomiri-wallpapers-16.04 (CC BY 4.0, CC BY-SA 4.0, CC0): apt install lomiri-wallpapers-16.04, or "
            "unpack it and give folder="
        )
    return {file.name: _reduced(file) for file in files}


def _reduced(file: Path) -> Tensor:
    with pillow().Image.open(file) as image:
        scale = SHORT_SIDE / min(image.size)
        width, height = (round(side * scale) for side in image.size)
        image.draft("RGB", (width, height))  # a JPEG is decoded at a fraction of its size where that suffices
        return tensor_of(image.convert("RGB").resize((width, height)))
