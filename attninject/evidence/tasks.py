"""Labelled images for studies, made of what packages carry: nothing is downloaded, and no image is kept here.

Each loader says where its images come from and under which licence, draws everything from its `seed`, and divides by
source, so that a test image shares no digit, photograph, font or file with a training image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attninject.errors import DataError, MissingPackageError

from .samples import Samples

FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts")
STAMP_FOLDER = "/usr/share/tuxpaint/stamps"
LETTERS = "ABCDEFGHIJ"


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


# --- digits on photographs ---------------------------------------------------------------------


def digits_on_photos(seed: int = 0, size: int = 64, train: int = 1000, test: int = 500) -> Task:
    """Handwritten digits in ink of random lightness on random crops of two photographs.

    After the "MNIST with background images" of Larochelle et al. (2007, doi:10.1145/1273496.1273556), with colour,
    and with ink as dark or light as chance has it. The left two thirds of each photograph are for training, the
    right third for test; the digits are divided too (4 to 1).
    """
    try:
        from sklearn.datasets import load_digits, load_sample_images
    except ImportError as error:
        raise MissingPackageError(
            "digits and photographs come with scikit-learn: pip install attninject[train]"
        ) from error
    digits = load_digits()
    strokes = torch.from_numpy(digits.images).float()[:, None] / 16
    labels = torch.from_numpy(digits.target).long()
    photos = [
        torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255 for image in load_sample_images().images
    ]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    border = len(order) * 4 // 5
    cuts = [p.shape[2] * 2 // 3 for p in photos]
    parts = (
        (order[:border], [p[:, :, :c] for p, c in zip(photos, cuts, strict=True)], train),
        (order[border:], [p[:, :, c:] for p, c in zip(photos, cuts, strict=True)], test),
    )
    made = [_on_photos(strokes[i], labels[i], backs, size, n, generator) for i, backs, n in parts]
    return Task(
        "digits on photographs", made[0], made[1], tuple("0123456789"),
        "scikit-learn's load_digits (UCI, Alpaydin and Kaynak 1998) on its load_sample_images (Flickr, danielbuechele "
        "and vultilion)",
        "CC BY 4.0 (digits), CC BY 2.0 (photographs)",
    )  # fmt: skip


def _on_photos(
    strokes: Tensor,
    labels: Tensor,
    photos: Sequence[Tensor],
    size: int,
    count: int,
    generator: torch.Generator,
) -> Samples:
    """strokes: (m, 1, 8, 8) in [0, 1] → `count` images."""
    chosen = torch.arange(count) % len(labels)
    alpha = F.interpolate(strokes[chosen], size=(size, size), mode="bilinear", align_corners=False)
    ink = torch.rand(count, 1, 1, 1, generator=generator)
    back = torch.stack([_crop(photos, size, generator) for _ in range(count)])
    return Samples(back * (1 - alpha) + ink * alpha, labels[chosen])


def _crop(photos: Sequence[Tensor], size: int, generator: torch.Generator) -> Tensor:
    """A random square of a random photograph, of up to half its height and never fewer pixels than `size`."""
    photo = photos[_draw(len(photos), generator)]
    height, width = photo.shape[1:]
    most = min(height, width)
    side = min(most, size + _draw(max(1, most // 2 - size + 1), generator))
    top, left = _draw(height - side + 1, generator), _draw(width - side + 1, generator)
    crop = photo[:, top : top + side, left : left + side]
    return F.interpolate(crop[None], size=(size, size), mode="bilinear", align_corners=False, antialias=True)[
        0
    ]


def _draw(below: int, generator: torch.Generator) -> int:
    return int(torch.randint(max(1, below), (1,), generator=generator))


# --- letters in many fonts ---------------------------------------------------------------------


def letters(
    seed: int = 0,
    size: int = 64,
    train: int = 1000,
    test: int = 500,
    folders: Iterable[str | Path] = FONT_FOLDERS,
) -> Task:
    """The letters A to J in the fonts that are installed, light on dark or dark on light, moved and scaled.

    Like notMNIST. Fonts are divided by maker (the first word of the family's name: DejaVu, Liberation), about 3 to 1,
    so that no test font looks like one in training.

    Raises:
        DataError: fonts of fewer than four makers; names packages that bring more.
    """
    by_maker = _fonts(folders)
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


def _pillow() -> Any:
    try:
        import PIL.Image
        import PIL.ImageDraw
        import PIL.ImageFont
    except ImportError as error:
        raise MissingPackageError("letters and stamps are read with Pillow: pip install pillow") from error
    return PIL


def _fonts(folders: Iterable[str | Path]) -> dict[str, list[Path]]:
    """Maker → files of fonts that have all the letters."""
    font = _pillow().ImageFont
    found: dict[str, list[Path]] = {}
    for folder in folders:
        root = Path(folder).expanduser()
        for file in sorted(p for p in root.rglob("*") if p.suffix.lower() in (".ttf", ".otf")):
            try:
                loaded = font.truetype(str(file), 24)
                if _has_letters(loaded):
                    found.setdefault(str(loaded.getname()[0]).split()[0], []).append(file)
            except OSError:
                continue  # no font after all
    return found


def _has_letters(font: Any) -> bool:
    """Whether every letter is drawn, and not as the box for what a font lacks."""
    drawn = [bytes(font.getmask(c)) for c in (*LETTERS, "\uffff")]
    return all(any(d) for d in drawn[:-1]) and len(set(drawn)) == len(drawn)


def _written(makers: Sequence[Sequence[Path]], size: int, count: int, generator: torch.Generator) -> Samples:
    labels = torch.arange(count) % len(LETTERS)
    images = []
    for label in labels.tolist():
        fonts = makers[_draw(len(makers), generator)]
        ink = _letter(LETTERS[label], fonts[_draw(len(fonts), generator)], size, generator)
        light, dark = torch.rand(2, 3, 1, 1, generator=generator).sort(0).values.flip(0)
        if _draw(2, generator):
            light, dark = dark, light
        images.append(ink * light + (1 - ink) * dark)
    return Samples(torch.stack(images), labels)


def _letter(letter: str, file: Path, size: int, generator: torch.Generator) -> Tensor:
    """One letter, (1, size, size) in [0, 1], between half and nine tenths of the height, anywhere it fits."""
    pil = _pillow()
    font = pil.ImageFont.truetype(str(file), size // 2 + _draw(size * 2 // 5, generator))
    left, top, right, bottom = font.getbbox(letter)
    x = _draw(size - (right - left) + 1, generator) - left
    y = _draw(size - (bottom - top) + 1, generator) - top
    canvas = pil.Image.new("L", (size, size))
    pil.ImageDraw.Draw(canvas).text((x, y), letter, fill=255, font=font)
    return torch.from_numpy(np.array(canvas)).float()[None] / 255


# --- photographs of things ---------------------------------------------------------------------


def stamps(seed: int = 0, size: int = 96, folder: str | Path = STAMP_FOLDER, least: int = 15) -> Task:
    """Photographs of animals, fruit, birds, houses, flowers … cut out, on random grey; a class is a folder.

    Classes are the folders one or two levels down with at least `least` photographs (drawings, folders named cartoon
    and files in SVG, are left out). A quarter of each class is for test; no file is in both.

    Raises:
        DataError: the folder is not there; names the package.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(
            f"there is no folder {root}: the photographs are Debian's package tuxpaint-stamps-default (GPL-2): "
            "apt install tuxpaint-stamps-default, or unpack it and give folder="
        )
    classes = {name: files for name, files in _by_folder(root).items() if len(files) >= least}
    if len(classes) < 2:
        raise DataError(
            f"{root} has {len(classes)} folders with at least {least} photographs; two are needed"
        )
    parts: dict[str, list[tuple[Path, int]]] = {"train": [], "test": []}
    for label, files in enumerate(classes.values()):
        for place, file in enumerate(sorted(files, key=lambda f: _shuffled(f, root, seed))):
            parts["test" if place < len(files) // 4 else "train"].append((file, label))
    generator = torch.Generator().manual_seed(seed)
    made = [_opened(parts[name], size, generator) for name in ("train", "test")]
    return Task(
        "stamps", made[0], made[1], tuple(classes),
        "Tux Paint's stamps (Debian's tuxpaint-stamps-default), collected by Bill Kendrick and contributors",
        "GPL-2",
    )  # fmt: skip


def _by_folder(root: Path) -> dict[str, list[Path]]:
    """Class → photographs: `animals/birds`, or `space` where nothing lies deeper."""
    found: dict[str, list[Path]] = {}
    for file in sorted(root.rglob("*.png")):
        within = file.relative_to(root).parts[:-1]
        if within and not any("cartoon" in part.lower() for part in within) and within[0] != "symbols":
            found.setdefault("/".join(within[:2]), []).append(file)
    return found


def _shuffled(file: Path, root: Path, seed: int) -> str:
    """A key that orders files by chance, the same on every machine."""
    return hashlib.sha256(f"{seed}:{file.relative_to(root).as_posix()}".encode()).hexdigest()


def _opened(files: Sequence[tuple[Path, int]], size: int, generator: torch.Generator) -> Samples:
    order = torch.randperm(len(files), generator=generator).tolist()
    images = [_stamp(files[i][0], size, generator) for i in order]
    return Samples(torch.stack(images), torch.tensor([files[i][1] for i in order]))


def _stamp(file: Path, size: int, generator: torch.Generator) -> Tensor:
    """The stamp, (3, size, size), whole and centred on a random grey."""
    image = _pillow().Image.open(file).convert("RGBA")
    image.thumbnail((size, size))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    canvas = torch.rand(1, 1, 1, generator=generator).expand(3, size, size).clone()
    height, width = pixels.shape[1:]
    top, left = (size - height) // 2, (size - width) // 2
    under = canvas[:, top : top + height, left : left + width]
    under.copy_(pixels[:3] * pixels[3:] + under * (1 - pixels[3:]))
    return canvas


TASKS: dict[str, Callable[..., Task]] = {
    "digits_on_photos": digits_on_photos,
    "letters": letters,
    "stamps": stamps,
}
"""Name → loader."""
