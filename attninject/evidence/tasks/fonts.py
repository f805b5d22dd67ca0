"""More of what is drawn in the fonts that are installed: digits on photographs, whose font it is, how many letters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..samples import Samples
from .damaged_photos import divided_photos
from .drawn_letters import FONT_FOLDERS, LICENCE, coloured, counted, divided_makers, enough_makers, letter
from .photographs import WALLPAPER_FOLDER
from .task import Task, crop, draw

DIGITS = "0123456789"
SEEN, UNSEEN = "ABCDEFGHIJ", "KLMNOPQRST"
"""Letters of `typefaces` for training and for test."""
MAKERS = 10
MOST = 6
"""Letters of `counts`, each in one of nine cells."""


def numerals(
    seed: int = 0, size: int = 64, train: int = 1000, test: int = 500, fonts: Iterable[str | Path] = FONT_FOLDERS,
    folder: str | Path = WALLPAPER_FOLDER,
) -> Task:  # fmt: skip
    """The digits in installed fonts, in ink as dark or light as chance has it, on crops of photographs.

    Fonts are divided by maker as `letters` does, photographs as `corruptions` does: neither is in training and in test.

    Raises:
        DataError: too few fonts, or no photographs; names packages.
    """
    generator = torch.Generator().manual_seed(seed)
    used, held, drawn = divided_makers(fonts, DIGITS, generator)
    backs, kept, photos = divided_photos(folder, generator)

    def one(digit: int, makers: Sequence[Sequence[Path]], photos: Sequence[Tensor]) -> Tensor:
        ink = letter(DIGITS[digit], _file(makers, generator), size, generator)
        return crop(photos, size, generator) * (1 - ink) + ink * torch.rand(1, generator=generator)

    parts = []
    for makers, behind, count in ((used, backs, train), (held, kept, test)):
        labels = torch.arange(count) % len(DIGITS)
        images = [one(digit, makers, behind) for digit in labels.tolist()]
        parts.append(Samples(torch.stack(images), labels))
    origin = f"digits drawn in {drawn}, on {photos.origin}"
    return Task("numerals", parts[0], parts[1], tuple(DIGITS), origin, f"{LICENCE}; {photos.licence}")


def typefaces(
    seed: int = 0, size: int = 64, train: int = 1000, test: int = 500, folders: Iterable[str | Path] = FONT_FOLDERS
) -> Task:  # fmt: skip
    """Which of ten makers' fonts a letter is drawn in, in any of their fonts: A to J in training, K to T in test.

    The ten are drawn from the seed.

    Raises:
        DataError: fonts of fewer than ten makers; names packages.
    """
    by_maker = enough_makers(folders, SEEN + UNSEEN, MAKERS)
    generator = torch.Generator().manual_seed(seed)
    makers = sorted(by_maker)
    chosen = [makers[i] for i in sorted(torch.randperm(len(makers), generator=generator)[:MAKERS].tolist())]
    parts = []
    for letters, count in ((SEEN, train), (UNSEEN, test)):
        labels = torch.arange(count) % MAKERS
        images = [
            coloured(letter(letters[draw(10, generator)], _file([by_maker[chosen[m]]], generator), size, generator),
                generator)
            for m in labels.tolist()
        ]  # fmt: skip
        parts.append(Samples(torch.stack(images), labels))
    return Task(
        "typefaces", parts[0], parts[1], tuple(chosen), f"letters drawn in {counted(by_maker)}", LICENCE
    )


def counts(
    seed: int = 0, size: int = 64, train: int = 1000, test: int = 500, folders: Iterable[str | Path] = FONT_FOLDERS
) -> Task:  # fmt: skip
    """How many letters, one to six of A to J, all in one font and colour; fonts divided by maker as `letters` does.

    Raises:
        DataError: too few fonts; names packages.
    """
    generator = torch.Generator().manual_seed(seed)
    used, held, drawn = divided_makers(folders, SEEN, generator)
    parts = []
    for makers, count in ((used, train), (held, test)):
        labels = torch.arange(count) % MOST
        images = [
            coloured(_several(n + 1, _file(makers, generator), size, generator), generator)
            for n in labels.tolist()
        ]
        parts.append(Samples(torch.stack(images), labels))
    return Task("counts", parts[0], parts[1], tuple("123456"), f"letters drawn in {drawn}", LICENCE)


def _file(makers: Sequence[Sequence[Path]], generator: torch.Generator) -> Path:
    """A font of a maker, both by chance."""
    files = makers[draw(len(makers), generator)]
    return files[draw(len(files), generator)]


def _several(count: int, file: Path, size: int, generator: torch.Generator) -> Tensor:
    """Letters in as many of nine cells: ink (1, size, size)."""
    side = size // 3
    canvas = torch.zeros(1, size, size)
    for cell in torch.randperm(9, generator=generator)[:count].tolist():
        large = letter(
            SEEN[draw(10, generator)], file, 3 * side, generator
        )  # drawn large: small, it may not fit
        small = F.interpolate(large[None], size=(side, side), mode="area")[0]
        top, left = cell // 3 * side, cell % 3 * side
        canvas[:, top : top + side, left : left + side] = small
    return canvas
