"""Samples: an image transformed, its label, and how many unreadable ones were passed over for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL.Image import DecompressionBombError
from torch import Tensor
from torch.utils.data import Dataset

from attninject.errors import DataError

from .datasets import path_of
from .seeds import drawn_from

UNREADABLE = (OSError, SyntaxError, ValueError, DecompressionBombError)  # what Pillow raises on broken files


Label = int | Tensor
"""The number of a class; of images with several labels each a row of zeros and ones, (classes,)."""


class Samples(Dataset[tuple[Tensor, Label, int]]):
    """(image, label, skipped) by (epoch, index); the transform draws from a generator of the sample's own."""

    def __init__(
        self,
        dataset: Any,
        transform: Callable[[Any], Tensor] | None,
        seed: int,
        skip: bool,
        classes: int | None = None,
        many: bool = False,
    ) -> None:
        self.dataset, self.transform, self.seed, self.skip = dataset, transform, seed, skip
        self.classes, self.many = classes, many

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Label, int]:
        """The image at an index in an epoch, or the next readable one and how many were passed over."""
        epoch, first = key
        for skipped in range(len(self.dataset)):
            index = (first + skipped) % len(self.dataset)
            with drawn_from(self.seed, epoch, index):
                try:
                    image, label = self.dataset[index][:2]
                except UNREADABLE as error:
                    if self.skip:
                        continue
                    raise DataError(
                        f"{path_of(self.dataset, index)} cannot be read as an image ({type(error).__name__}: "
                        f"{error}); mend it, or leave such images out with `unreadable: skip`"
                    ) from error
                label = self._row(label, index) if self.many else self._number(label, index)
                return (image if self.transform is None else self.transform(image)), label, skipped
        raise DataError(f"not one of the {len(self.dataset)} images can be read")

    def _number(self, given: Any, index: int) -> int:
        label = int(given)
        if self.classes is not None and not 0 <= label < self.classes:
            raise DataError(
                f"{path_of(self.dataset, index)} has label {label}; there are {self.classes} classes, "
                f"from 0 to {self.classes - 1}"
            )
        return label

    def _row(self, given: Any, index: int) -> Tensor:
        row = torch.as_tensor(given, dtype=torch.float32)
        if row.shape != (self.classes,) or not bool(((row == 0) | (row == 1)).all()):
            raise DataError(
                f"{path_of(self.dataset, index)} has labels {given}; expected {self.classes} zeros and ones"
            )
        return row


class Padded(Samples):
    """Samples for validation: number -1 is padding, and an unreadable image is left out: weight 0."""

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Label, int]:
        """Label -1, or a row of -1, marks what does not count."""
        epoch, index = key
        image, label, skipped = super().__getitem__((epoch, max(index, 0)))
        if index < 0 or skipped:
            label = torch.full_like(label, -1) if isinstance(label, Tensor) else -1
        return image, label, (0 if index < 0 else min(skipped, 1))
