"""Letters drawn in the fonts that are installed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    by_maker = fonts_by_maker(folders, LETTERS)
    if len(by_maker) < 4:
        raise DataError(
            f"letters need fonts of at least 4 makers, found {len(by_maker)} ({', '.join(by_maker) or 'none'}) under "
            f"{', '.join(map(str, folders))}; on Debian for example: apt install fonts-liberation fonts-lobster "
            "fonts-cantarell fonts-inconsolata"
        )
    generator = torch.Generator().manual_seed(seed)
    makers = sorted(by_maker)
    order = torch.randperm(len(makers), generator=generator).tolist()
    border = max(1, len(makers) // 4)
    held = [by_maker[makers[i]] for i in order[:border]]
    used = [by_maker[makers[i]] for i in order[border:]]
    made = [_written(fonts, size, n, generator) for fonts, n in ((used, train), (held, test))]
    return Task(
        "letters in unseen fonts", made[0], made[1], tuple(LETTERS),
        f"letters drawn in {sum(map(len, by_maker.values()))} installed fonts of {len(makers)} makers",
        "each font's own (Debian's font packages: SIL OFL, GPL with font exception, Bitstream Vera); no drawing is kept",
    )  # fmt: skip


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
        light, dark = torch.rand(2, 3, 1, 1, generator=generator).sort(0).values.flip(0)
        if draw(2, generator):
            light, dark = dark, light
        images.append(ink * light + (1 - ink) * dark)
    return Samples(torch.stack(images), labels)


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
