"""Data sets of images in parts: which of them, what their classes are called, and where an image lies."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from attninject.errors import DataError

from .reading import read_rgb


@dataclass(frozen=True)
class Images:
    """Training and validation images, as data sets of (image, label), and the names of the classes.

    A label is a class's number; of images with `many` labels each it is a row of zeros and ones, one to a class.

    Raises:
        DataError: all images are of one class.
    """

    train: Any
    val: Any
    classes: tuple[str, ...]
    many: bool = False

    def __post_init__(self) -> None:
        if len(self.classes) < 2 and not self.many:
            raise DataError(f"there is one class only ({self.classes[0]}), and nothing to tell it from")


class InMemory(Dataset[tuple[Tensor, int]]):
    """RGB images in [0, 1], (n, 3, H, W), with labels: scikit-learn's handwritten digits, or chance."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


class TimmImages(Dataset[tuple[Any, int]]):
    """A data set of timm's without its way with unreadable images, which puts others in their place unasked."""

    def __init__(self, whole: Any) -> None:
        self.whole, self.reader = whole, whole.reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        file, label = self.reader[index][:2]
        with closing(file):
            if label is None:
                raise DataError("it has no label")
            return read_rgb(file), label

    def path(self, index: int) -> str:
        """The file of an image, for messages."""
        return str(self.whole.filename(index))


class Part(Dataset[Any]):
    """Some of the images of a data set."""

    def __init__(self, whole: Any, indices: Sequence[int]) -> None:
        self.whole, self.indices = whole, list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.whole[self.indices[index]]

    def path(self, index: int) -> str:
        """The file of an image, for messages."""
        return path_of(self.whole, self.indices[index])


def path_of(dataset: Any, index: int) -> str:
    """The file of an image where the data set knows it, or its number."""
    if callable(getattr(dataset, "path", None)):
        return str(dataset.path(index))
    samples = getattr(dataset, "samples", None)
    if isinstance(samples, list) and index < len(samples):
        return str(samples[index][0])
    return f"image {index} of {type(dataset).__name__}"


def classes_of(dataset: Any) -> tuple[str, ...]:
    """Names of the classes, from whatever the data set tells; at worst their numbers."""
    names = class_names(dataset)
    if names:
        return names
    labels = _field_of_labels(dataset)
    if labels is not None:
        return tuple(str(n) for n in range(int(max(int(x) for x in labels)) + 1))
    raise DataError(f"{type(dataset).__name__} does not tell its classes; give it an attribute `classes`")


def labels_of(dataset: Any) -> Sequence[Any]:
    """The label of each image, without reading one.

    Raises:
        DataError: the data set does not tell them.
    """
    if isinstance(dataset, Part):
        whole = labels_of(dataset.whole)
        return [whole[index] for index in dataset.indices]
    samples = getattr(dataset, "samples", getattr(getattr(dataset, "reader", None), "samples", None))
    tensors = getattr(dataset, "tensors", (None,))  # a TensorDataset's
    for found in (_field_of_labels(dataset), tensors[-1]):
        if found is not None:
            return found  # type: ignore[no-any-return]
    if samples is not None:
        return [sample[1] for sample in samples]
    raise DataError(f"{type(dataset).__name__} does not tell its labels; give it an attribute `targets`")


def _field_of_labels(dataset: Any) -> Any:
    for field in ("targets", "labels", "_labels"):
        labels = getattr(dataset, field, None)
        if labels is not None and len(labels):
            return labels
    return None


def class_names(dataset: Any) -> tuple[str, ...] | None:
    """Names of the classes, where the data set itself, its index or timm's reader has them."""
    names = getattr(dataset, "classes", None)
    if isinstance(names, list | tuple) and names:
        return tuple(str(n) for n in names)
    reader = getattr(dataset, "reader", None)
    mapping = getattr(dataset, "class_to_idx", None) or getattr(reader, "class_to_idx", None)
    if mapping:
        return tuple(str(n) for n, _ in sorted(mapping.items(), key=lambda item: item[1]))
    return None
