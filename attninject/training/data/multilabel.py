"""Images with several labels each: their names in a CSV file, or in a text file beside each image."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from attninject.errors import DataError
from attninject.wording import listed

from .reading import read_rgb

Table = Mapping[str, Sequence[str]]
"""File of an image, as the labels name it → its labels."""


class Labelled(Dataset[tuple[Any, Tensor]]):
    """Image files below a folder, each with a row of zeros and ones: `targets` (n, classes)."""

    def __init__(self, root: Path, table: Table, classes: Sequence[str]) -> None:
        self.root, self.files, self.classes = root, list(table), tuple(classes)
        number = {name: i for i, name in enumerate(classes)}
        self.targets = torch.zeros(len(table), len(classes))
        for row, names in enumerate(table.values()):
            self.targets[row, [number[name] for name in names]] = 1

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        return read_rgb(self.path(index)), self.targets[index]

    def path(self, index: int) -> str:
        """The file of an image."""
        return str(self.root / self.files[index])

    def under(self, folder: str) -> list[int]:
        """Numbers of the images in a folder below the root."""
        return [i for i, file in enumerate(self.files) if Path(file).is_relative_to(folder)]


def open_labelled(root: Path, labels: str | None = None, classes: Sequence[str] | None = None) -> Labelled:
    """The labelled images below a folder; what the labels do not name is left out, and no image is read.

    Args:
        root: the folder.
        labels: a CSV file, or a folder with a text file per image; None: `labels.csv` or `labels` in the root.
        classes: all that there are, in their order; None: as the CSV's head has them, or by the alphabet.

    Raises:
        DataError: no labels, labels that cannot be read, of images that are not there, or of other classes.
    """
    if not root.is_dir():
        raise DataError(f"there is no folder {root}")
    places = [Path(labels)] if labels else [root / "labels.csv", root / "labels"]
    place = next((p for p in places if p.exists()), None)
    if place is None:
        raise DataError(
            f"there is no {' and no '.join(map(str, places))}: labels are a CSV file with the image's file and a column "
            f"of 0 and 1 per class (or one called labels), or a folder with a text file per image"
        )
    table, head = _texts(root, place) if place.is_dir() else _csv(place)
    gone = [file for file in table if not (root / file).is_file()]
    if gone:
        raise DataError(f"{len(gone)} images of {place} are not in {root}: {listed(gone)}")
    found = head or sorted({name for names in table.values() for name in names})
    unknown = [name for name in found if classes is not None and name not in classes]
    if unknown:
        raise DataError(f"{place} has classes that the run does not know: {listed(unknown, 5)}")
    if not found:
        raise DataError(f"{place} holds no label")
    return Labelled(root, table, classes or found)


def _csv(file: Path) -> tuple[Table, list[str]]:
    """A column of 0 and 1 per class; or two columns, of which the second is called `labels`."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            head, *rows = [row for row in csv.reader(stream) if row] or [[]]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{file} cannot be read as CSV: {error}") from error
    if len(head) < 2 or len(set(head)) < len(head):
        raise DataError(f"{file}: expected a head of the image's file and different classes, found {head}")
    short = next((n for n, row in enumerate(rows, 2) if len(row) != len(head)), None)
    if short:
        raise DataError(f"{file}, row {short}: expected {len(head)} cells, as in the head")
    twice = [file for file, count in Counter(row[0] for row in rows).items() if count > 1]
    if twice:
        raise DataError(f"{file} names images more than once: {listed(twice)}")
    if head[1:] == ["labels"]:
        return {row[0]: _names(row[1]) for row in rows}, []
    odd = [(n, cell) for n, row in enumerate(rows, 2) for cell in row[1:] if cell.strip() not in ("0", "1")]
    if odd:
        raise DataError(f"{file}, row {odd[0][0]}: expected 0 or 1, found {odd[0][1]!r}")
    names = head[1:]
    return {row[0]: [n for n, cell in zip(names, row[1:], strict=True) if "1" in cell] for row in rows}, names


def _texts(root: Path, folder: Path) -> tuple[Table, list[str]]:
    """A text file for each image, of its name and at its place: a label to a line."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    images = {
        str(p.relative_to(root).with_suffix("")): str(p.relative_to(root))
        for p in sorted(root.rglob("*"))
        if p.suffix.lower() in IMG_EXTENSIONS
    }
    table: dict[str, list[str]] = {}
    for file in sorted(folder.rglob("*.txt")):
        name = str(file.relative_to(folder).with_suffix(""))
        if name not in images:
            raise DataError(f"{file} is of no image: there is no {root / name} of any kind of image")
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise DataError(f"{file} cannot be read as text: {error}") from error
        table[images[name]] = [line.strip() for line in lines if line.strip()]
    return table, []


def _names(cell: str) -> list[str]:
    """Labels of a cell: parted by semicolons, or else by spaces."""
    parts = cell.split(";") if ";" in cell else re.split(r"\s+", cell)
    return [part.strip() for part in parts if part.strip()]
