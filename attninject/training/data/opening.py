"""From the settings to data sets: digits, folders, timm's and torchvision's, chance. Nothing is downloaded."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from attninject.errors import DataError, MissingPackageError
from attninject.wording import nearest

from ..experiment import HELD_OUT, Data
from .datasets import Images, InMemory, Part, TimmImages, class_names, classes_of
from .multilabel import open_labelled
from .reading import read_rgb

DIGITS_TEST = 0.3  # held out for validation, unless `val_fraction` says otherwise
RANDOM_SIZE = 32  # pixels of the noise, before it is enlarged to the model's size


def open_images(data: Data) -> Images:
    """Open the data sets; nothing is read but lists of files.

    Raises:
        DataError: a folder is missing or empty, or the splits have different classes.
        MissingPackageError: the digits without scikit-learn.
    """
    kinds = {
        "digits": _digits, "imagefolder": _folders, "multilabel": _multilabel, "random": _random, "timm": _timm,
        "torchvision": _torchvision,
    }  # fmt: skip
    opened = kinds[data.kind](data)
    for name, part in (("training", opened.train), ("validation", opened.val)):
        if len(part) == 0:
            raise DataError(f"there are no {name} images in {data.root or data.kind}")
    return opened


# --- kinds -------------------------------------------------------------------------------------


def _digits(data: Data) -> Images:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingPackageError(
            'the digits come with scikit-learn, which is not installed: pip install "attninject[train]"'
        ) from error
    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1).expand(-1, 3, -1, -1) / 16
    labels = torch.tensor(raw.target)
    train, val = _held_out(len(labels), data.val_fraction or DIGITS_TEST)
    names = tuple(str(n) for n in range(10))
    return Images(InMemory(images[train], labels[train]), InMemory(images[val], labels[val]), names)


def _random(data: Data) -> Images:
    """Noise with labels by chance: a set-up is tried with it, nothing is learnt that holds for other images."""
    generator = torch.Generator().manual_seed(data.seed)
    images = torch.rand(data.images, 3, RANDOM_SIZE, RANDOM_SIZE, generator=generator)
    labels = torch.randint(data.classes, (data.images,), generator=generator)
    train, val = _held_out(data.images, data.val_fraction or HELD_OUT)
    names = tuple(str(n) for n in range(data.classes))
    return Images(InMemory(images[train], labels[train]), InMemory(images[val], labels[val]), names)


def _folders(data: Data) -> Images:
    root = Path(str(data.root))
    if not root.is_dir():
        raise DataError(f"there is no folder {root}")
    if data.val_fraction is not None:
        whole = open_folder(root / data.train_split if (root / data.train_split).is_dir() else root)
        return _divided(whole, data.val_fraction)
    for split in (data.train_split, data.val_split):
        if not (root / split).is_dir():
            there = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())[:6]) or "no folders"
            raise DataError(
                f"there is no folder {root / split} ({root} has {there}); name the splits with `train_split` "
                f"and `val_split`, or hold out a part of all images with `val_fraction: 0.2` (--data-val-fraction 0.2)"
            )
    return paired(open_folder(root / data.train_split), open_folder(root / data.val_split), f" under {root}")


def _multilabel(data: Data) -> Images:
    root = Path(str(data.root))
    whole = open_labelled(root, data.labels)
    if data.val_fraction is not None:
        train, val = _held_out(len(whole), data.val_fraction)
    else:
        train, val = whole.under(data.train_split), whole.under(data.val_split)
    if not train or not val:
        name = data.val_split if train else data.train_split
        raise DataError(
            f"no labelled image is in {root / name}; name the folders of the splits with `train_split` and "
            f"`val_split`, or hold out a part of all images with `val_fraction: 0.2` (--data-val-fraction 0.2)"
        )
    return Images(Part(whole, train), Part(whole, val), whole.classes, many=True)


def open_folder(path: Path) -> Any:
    """A folder with a folder of images per class; no image is read.

    Raises:
        DataError: it is none.
    """
    from torchvision.datasets import ImageFolder

    try:
        return ImageFolder(str(path), loader=read_rgb)
    except FileNotFoundError as error:
        raise DataError(
            f"{path} is no image folder: {str(error).splitlines()[0]}; each class is a folder of images"
        ) from error


def _timm(data: Data) -> Images:
    from timm.data import ImageDataset, create_dataset

    def make(split: str) -> Any:
        try:
            name, learning = str(data.name), split == data.train_split
            made = create_dataset(name, root=data.root, split=split, is_training=learning)
            return TimmImages(made) if isinstance(made, ImageDataset) else made
        except (AssertionError, OSError, RuntimeError, ValueError, ImportError) as error:
            raise DataError(
                f"timm cannot open {data.name!r}, split {split!r}, in {data.root}: {error}"
            ) from error

    return _opened(make, data)


def _torchvision(data: Data) -> Images:
    from torchvision import datasets

    name = str(data.name)
    known = [n for n in datasets.__all__ if isinstance(getattr(datasets, n), type)]
    if name not in known:
        raise DataError(f"torchvision has no data set {name!r}; nearest: {', '.join(nearest(name, known))}")
    cls = getattr(datasets, name)

    def make(split: str) -> Any:
        taken = inspect.signature(cls).parameters
        which = {"split": split} if "split" in taken else {"train": split == data.train_split}
        try:
            return cls(root=data.root, **which)
        except (OSError, RuntimeError, ValueError, TypeError) as error:
            raise DataError(
                f"torchvision's {name} cannot be opened in {data.root}, split {split!r}: "
                f"{str(error).splitlines()[0]}; nothing is downloaded here"
            ) from error

    return _opened(make, data)


# --- splits ------------------------------------------------------------------------------------


def _opened(make: Callable[[str], Any], data: Data) -> Images:
    """Both splits by name, or the training split divided."""
    train = _by_number(make(data.train_split), data)
    if data.val_fraction is not None:
        return _divided(train, data.val_fraction)
    return paired(train, _by_number(make(data.val_split), data), f" under {data.name}")


def _by_number(part: Any, data: Data) -> Any:
    """The split, unless it can only be streamed."""
    if hasattr(part, "__getitem__") and hasattr(part, "__len__"):
        return part
    raise DataError(f"{data.name} can only be streamed; fine-tuning needs images that are found by number")


def paired(train: Any, val: Any, where: str = "", many: bool = False) -> Images:
    """Two data sets whose labels mean the same.

    Raises:
        DataError: both tell their classes, and those differ; or the first tells none.
    """
    ours, theirs = class_names(train), class_names(val)
    if ours and theirs and ours != theirs:
        differ = sorted(set(ours) ^ set(theirs)) or ["another order"]
        raise DataError(f"the classes{where} differ between training and validation: {', '.join(differ[:6])}")
    return Images(train, val, classes_of(train), many)


def _divided(whole: Any, fraction: float) -> Images:
    train, val = _held_out(len(whole), fraction)
    return Images(Part(whole, train), Part(whole, val), classes_of(whole))


def _held_out(count: int, fraction: float) -> tuple[list[int], list[int]]:
    """Numbers for training and for validation; the same split whatever the seed of the run."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    held = max(1, round(count * fraction))
    return sorted(order[held:]), sorted(order[:held])
