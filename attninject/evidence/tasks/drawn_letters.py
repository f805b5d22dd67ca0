"""Letters drawn in the fonts that are installed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attninject.errors import DataError

from ..samples import Samples
from .task import Task, draw, pillow

FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts")
LETTERS = "ABCDEFGHIJ"
DERIVED = {
    "Arimo": "Liberation", "Cousine": "Liberation", "Tinos": "Liberation", "Carlito": "Lato", "Hack": "DejaVu",
}  # fmt: skip
"""First word of a family's name → that of the one whose letters it has, by what each font says of itself."""
LICENCE = "each font's own (Debian's font packages: SIL OFL, GPL with font exception, Bitstream Vera); no drawing is kept"


def letters(
    seed: int = 0,
    size: int = 64,
    train: int = 1000,
    test: int = 500,
    folders: Iterable[str | Path] = FONT_FOLDERS,
) -> Task:
    """The letters A to J in the fonts that are installed, light on dark or dark on light, moved and scaled.

    Like notMNIST. Fonts are divided by maker (the first word of the family's name: DejaVu, Liberation; fonts drawn
    after another's count as that one's, see `DERIVED`), about 3 to 1, so that no test font looks like one in training.

    Raises:
        DataError: fonts of fewer than four makers; names packages that bring more.
    """
    generator = torch.Generator().manual_seed(seed)
    used, held, origin = divided_makers(folders, LETTERS, generator)
    made = [_written(fonts, size, n, generator) for fonts, n in ((used, train), (held, test))]
    return Task(
        "letters in unseen fonts", made[0], made[1], tuple(LETTERS),
        f"letters drawn in {origin}", LICENCE,
    )  # fmt: skip


def divided_makers(
    folders: Iterable[str | Path], characters: str, generator: torch.Generator
) -> tuple[list[list[Path]], list[list[Path]], str]:
    """Files of fonts by maker, of three quarters of the makers and of the others, and how many there are in words.

    Raises:
        DataError: fonts of fewer than four makers.
    """
    by_maker = enough_makers(folders, characters, 4)
    makers = sorted(by_maker)
    order = torch.randperm(len(makers), generator=generator).tolist()
    border = max(1, len(makers) // 4)
    held = [by_maker[makers[i]] for i in order[:border]]
    used = [by_maker[makers[i]] for i in order[border:]]
    return used, held, counted(by_maker)


def counted(by_maker: Mapping[str, Sequence[Path]]) -> str:
    """`102 installed fonts of 20 makers`."""
    return f"{sum(map(len, by_maker.values()))} installed fonts of {len(by_maker)} makers"


def enough_makers(folders: Iterable[str | Path], characters: str, least: int) -> dict[str, list[Path]]:
    """`fonts_by_maker`; a `DataError` with fewer than `least` names packages that bring more."""
    by_maker = fonts_by_maker(folders, characters)
    if len(by_maker) < least:
        raise DataError(
            f"letters need fonts of at least {least} makers, found {len(by_maker)} ({', '.join(by_maker) or 'none'}) "
            f"under {', '.join(map(str, folders))}; on Debian for example: apt install fonts-liberation fonts-lobster "
            "fonts-cantarell fonts-inconsolata"
        )
    return by_maker


def fonts_by_maker(folders: Iterable[str | Path], letters: str) -> dict[str, list[Path]]:
    """Maker → files of fonts that have all the letters."""
    font = pillow().ImageFont
    found: dict[str, list[Path]] = {}
    for folder in folders:
        root = Path(folder).expanduser()
        for file in sorted(p for p in root.rglob("*") if p.suffix.lower() in (".ttf", ".otf")):
            try:
                loaded = font.truetype(str(file), 24)
                if _has_letters(loaded, letters):
                    maker = str(loaded.getname()[0]).split()[0]
                    found.setdefault(DERIVED.get(maker, maker), []).append(file)
            except OSError:
                continue  # no font after all
    return found


def _has_letters(font: Any, letters: str) -> bool:
    """Whether every letter is drawn, and not as the box for what a font lacks."""
    drawn = [bytes(font.getmask(c)) for c in (*letters, "\uffff")]
    return all(any(d) for d in drawn[:-1]) and len(set(drawn)) == len(drawn)


def _written(makers: Sequence[Sequence[Path]], size: int, count: int, generator: torch.Generator) -> Samples:
    labels = torch.arange(count) % len(LETTERS)
    images = []
    for label in labels.tolist():
        fonts = makers[draw(len(makers), generator)]
        ink = letter(LETTERS[label], fonts[draw(len(fonts), generator)], size, generator)
        images.append(coloured(ink, generator))
    return Samples(torch.stack(images), labels)


def coloured(ink: Tensor, generator: torch.Generator) -> Tensor:
    """Ink (1, size, size) in [0, 1] in one colour on another, light on dark or dark on light: (3, size, size)."""
    light, dark = torch.rand(2, 3, 1, 1, generator=generator).sort(0).values.flip(0)
    if draw(2, generator):
        light, dark = dark, light
    mixed: Tensor = ink * light + (1 - ink) * dark
    return mixed


def letter(which: str, file: Path, size: int, generator: torch.Generator) -> Tensor:
    """One letter, (1, size, size) in [0, 1], between half and nine tenths of the height, anywhere it fits."""
    pil = pillow()
    font = pil.ImageFont.truetype(str(file), size // 2 + draw(size * 2 // 5, generator))
    left, top, right, bottom = font.getbbox(which)
    x = draw(size - (right - left) + 1, generator) - left
    y = draw(size - (bottom - top) + 1, generator) - top
    canvas = pil.Image.new("L", (size, size))
    pil.ImageDraw.Draw(canvas).text((x, y), which, fill=255, font=font)
    return torch.from_numpy(np.array(canvas)).float()[None] / 255
