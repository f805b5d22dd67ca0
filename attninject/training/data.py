"""Images for fine-tuning: folders, timm's and torchvision's data sets on disk, and scikit-learn's digits.

What a sample looks like depends on (seed, epoch, index) alone: its augmentation draws from generators seeded
with these three. So a run can stop and go on anywhere, and the number of loader processes or devices changes
nothing.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import DecompressionBombError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from attninject.errors import DataError, MissingPackageError
from attninject.training import runs

from .experiment import Data

DIGITS_SIZE, DIGITS_TEST = 32, 0.3
UNREADABLE = (OSError, SyntaxError, ValueError, DecompressionBombError)  # what Pillow raises on broken files


@dataclass(frozen=True)
class Images:
    """Training and validation images, as data sets of (image, label), and the names of the classes."""

    train: Any
    val: Any
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Look:
    """How images enter the model: size, mean, standard deviation, and how they are resized."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop: float


def open_images(data: Data) -> Images:
    """Open the data sets; nothing is read but lists of files.

    Raises:
        DataError: a folder is missing or empty, or the splits have different classes.
        MissingPackageError: the digits without scikit-learn.
    """
    kinds = {"digits": _digits, "imagefolder": _folders, "timm": _timm, "torchvision": _torchvision}
    opened = kinds[data.kind](data)
    for name, part in (("training", opened.train), ("validation", opened.val)):
        if len(part) == 0:
            raise DataError(f"there are no {name} images in {data.root or data.kind}")
    return opened


def look_of(model: nn.Module | None, data: Data) -> Look:
    """What timm says of the model, ImageNet's usual values otherwise; `size` overrides."""
    from timm.data import resolve_model_data_config

    found = resolve_model_data_config(model) if model is not None else {}
    size = data.size or (DIGITS_SIZE if data.kind == "digits" else found.get("input_size", (3, 224, 224))[-1])
    return Look(
        size,
        tuple(found.get("mean", (0.485, 0.456, 0.406))),
        tuple(found.get("std", (0.229, 0.224, 0.225))),
        found.get("interpolation", "bilinear"),
        found.get("crop_pct", 0.875),
    )


# --- kinds -------------------------------------------------------------------------------------


class Digits(Dataset):
    """Scikit-learn's handwritten digits as RGB images in [0, 1], 8×8."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


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
    return Images(Digits(images[train], labels[train]), Digits(images[val], labels[val]), names)


def _held_out(count: int, fraction: float) -> tuple[list[int], list[int]]:
    """Numbers for training and for validation; the same split whatever the seed of the run."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    held = max(1, round(count * fraction))
    return sorted(order[held:]), sorted(order[:held])


def _folders(data: Data) -> Images:
    root = Path(str(data.root))
    if not root.is_dir():
        raise DataError(f"there is no folder {root}")
    if data.val_fraction is not None:
        whole = _folder(root / data.train_split if (root / data.train_split).is_dir() else root)
        return _divided(whole, data.val_fraction)
    for split in (data.train_split, data.val_split):
        if not (root / split).is_dir():
            there = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())[:6]) or "no folders"
            raise DataError(
                f"there is no folder {root / split} ({root} has {there}); name the splits with `train_split` "
                f"and `val_split`, or hold out a part of all images with `val_fraction: 0.2` (--data-val-fraction 0.2)"
            )
    train_set, val_set = _folder(root / data.train_split), _folder(root / data.val_split)
    if train_set.classes != val_set.classes:
        _refuse_classes(str(root), train_set.classes, val_set.classes)
    return Images(train_set, val_set, tuple(train_set.classes))


def _divided(whole: Any, fraction: float) -> Images:
    train, val = _held_out(len(whole), fraction)
    return Images(Part(whole, train), Part(whole, val), classes_of(whole))


def _folder(path: Path) -> Any:
    from torchvision.datasets import ImageFolder

    try:
        return ImageFolder(str(path))
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
            return Read(made) if isinstance(made, ImageDataset) else made
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
        from attninject.wording import nearest

        raise DataError(f"torchvision has no data set {name!r}; nearest: {', '.join(nearest(name, known))}")
    cls = getattr(datasets, name)

    def make(split: str) -> Any:
        import inspect

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


def _opened(make: Callable[[str], Any], data: Data) -> Images:
    """Both splits by name, or the training split divided."""
    train = _by_number(make(data.train_split), data)
    if data.val_fraction is not None:
        return _divided(train, data.val_fraction)
    val = _by_number(make(data.val_split), data)
    ours, theirs = _class_names(train), _class_names(val)
    if ours and theirs and ours != theirs:
        _refuse_classes(str(data.name), ours, theirs)
    return Images(train, val, classes_of(train))


def _by_number(part: Any, data: Data) -> Any:
    """The split, unless it can only be streamed."""
    if hasattr(part, "__getitem__") and hasattr(part, "__len__"):
        return part
    raise DataError(f"{data.name} can only be streamed; fine-tuning needs images that are found by number")


def _refuse_classes(where: str, ours: Sequence[str], theirs: Sequence[str]) -> None:
    differ = sorted(set(ours) ^ set(theirs)) or ["another order"]
    raise DataError(
        f"the classes under {where} differ between training and validation: {', '.join(differ[:6])}"
    )


def classes_of(dataset: Any) -> tuple[str, ...]:
    """Names of the classes, from whatever the data set tells; at worst their numbers."""
    names = _class_names(dataset)
    if names:
        return names
    for field in ("targets", "labels", "_labels"):
        labels = getattr(dataset, field, None)
        if labels is not None and len(labels):
            return tuple(str(n) for n in range(int(max(int(x) for x in labels)) + 1))
    raise DataError(f"{type(dataset).__name__} does not tell its classes; give it an attribute `classes`")


def _class_names(dataset: Any) -> tuple[str, ...] | None:
    names = getattr(dataset, "classes", None)
    if isinstance(names, list | tuple) and names:
        return tuple(str(n) for n in names)
    reader = getattr(dataset, "reader", None)
    mapping = getattr(dataset, "class_to_idx", None) or getattr(reader, "class_to_idx", None)
    if mapping:
        return tuple(str(n) for n, _ in sorted(mapping.items(), key=lambda item: item[1]))
    return None


class Read(Dataset):
    """A data set of timm's without its way with unreadable images, which puts others in their place unasked."""

    def __init__(self, whole: Any) -> None:
        self.whole, self.reader = whole, whole.reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        file, label = self.reader[index][:2]
        with closing(file), Image.open(file) as image:
            if label is None:
                raise DataError("it has no label")
            return image.convert("RGB"), label

    def path(self, index: int) -> str:
        """The file of an image, for messages."""
        return str(self.whole.filename(index))


class Part(Dataset):
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
    if isinstance(dataset, Part | Read):
        return dataset.path(index)
    samples = getattr(dataset, "samples", None)
    if isinstance(samples, list) and index < len(samples):
        return str(samples[index][0])
    return f"image {index} of {type(dataset).__name__}"


# --- samples -----------------------------------------------------------------------------------


def mixed_seed(*numbers: int) -> int:
    """One seed below 2**63 from several numbers; neighbouring ones give unrelated seeds."""
    digest = hashlib.sha256(":".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@contextmanager
def drawn_from(*numbers: int) -> Iterator[None]:
    """All three generators of the CPU seeded by these numbers for a while, then put back."""
    seed = mixed_seed(*numbers)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.random.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class Samples(Dataset):
    """(image, label, skipped) by (epoch, index); the transform draws from a generator of the sample's own."""

    def __init__(
        self,
        dataset: Any,
        transform: Callable[[Any], Tensor] | None,
        seed: int,
        skip: bool,
        classes: int | None = None,
    ) -> None:
        self.dataset, self.transform, self.seed, self.skip = dataset, transform, seed, skip
        self.classes = classes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int]:
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
                self._check_label(int(label), index)
                return (image if self.transform is None else self.transform(image)), int(label), skipped
        raise DataError(f"not one of the {len(self.dataset)} images can be read")

    def _check_label(self, label: int, index: int) -> None:
        if self.classes is not None and not 0 <= label < self.classes:
            raise DataError(
                f"{path_of(self.dataset, index)} has label {label}; there are {self.classes} classes, "
                f"from 0 to {self.classes - 1}"
            )


class Schedule:
    """A batch sampler: which (epoch, index) each rank loads, batch by batch, from any batch on.

    Training: the same permutation on every rank, cut into batches of batch_size · ranks, of which a rank
    takes every ranks-th; a last batch that is not full is left out, but images that do not fill one are one.
    Validation: in order, and filled up with -1 so that every rank runs the same number of batches.
    """

    def __init__(
        self, count: int, batch_size: int, rank: int = 0, ranks: int = 1, seed: int = 0, train: bool = True
    ) -> None:
        self.count, self.rank, self.ranks, self.seed, self.train = count, rank, ranks, seed, train
        self.batch_size = min(batch_size, max(1, count // ranks)) if train else batch_size
        self.epoch = self.start = 0

    def __len__(self) -> int:
        whole, rest = divmod(self.count, self.batch_size * self.ranks)
        return whole + (0 if self.train else bool(rest)) - self.start

    def at(self, epoch: int, start: int = 0) -> Schedule:
        """Set the epoch and the first batch of the next pass; returns itself."""
        self.epoch, self.start = epoch, start
        return self

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = torch.arange(self.count)
        if self.train:
            generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch))
            order = torch.randperm(self.count, generator=generator)
        size = self.batch_size * self.ranks
        for begin in range(self.start * size, (self.start + len(self)) * size, size):
            batch = order[begin : begin + size]
            batch = torch.cat([batch, batch.new_full((size - len(batch),), -1)])
            yield [(self.epoch, int(index)) for index in batch[self.rank :: self.ranks]]


class Padded(Samples):
    """Samples for validation: number -1 is padding, and an unreadable image is left out: weight 0."""

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int]:
        """Label -1 marks what does not count."""
        epoch, index = key
        image, label, skipped = super().__getitem__((epoch, max(index, 0)))
        return image, (-1 if index < 0 or skipped else label), (0 if index < 0 else min(skipped, 1))


def loader(samples: Samples, schedule: Schedule, workers: int, pin: bool) -> DataLoader:
    """Batches in the schedule's order; loader processes live through all epochs."""
    return DataLoader(
        samples,
        batch_sampler=schedule,  # type: ignore[arg-type]
        num_workers=workers,
        pin_memory=pin,
        persistent_workers=workers > 0,
        worker_init_fn=_quiet_worker if workers else None,
    )


def batches(of: DataLoader) -> Iterator[Any]:
    """The loader's batches; what a loader process refuses is said as it would be here, without its traceback."""
    return _plainly(iter(of))  # made at once: it draws from the generator, which a step seeds anew


def _plainly(iterator: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from iterator
    except DataError as error:
        _, found, said = str(error).strip().rpartition(f"{DataError.__name__}: ")
        raise DataError(said if found else str(error)) from error


def _quiet_worker(_: int) -> None:
    runs.let_go_in_child()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


# --- transforms --------------------------------------------------------------------------------


class DigitsTransform:
    """Enlarge to the model's size and normalise; no augmentation, as flips and crops change digits."""

    def __init__(self, look: Look) -> None:
        self.size = look.size
        self.mean, self.std = (torch.tensor(v).view(3, 1, 1) for v in (look.mean, look.std))

    def __call__(self, image: Tensor) -> Tensor:
        """image: (3, 8, 8) in [0, 1] → (3, size, size)."""
        big = nn.functional.interpolate(
            image[None], size=(self.size, self.size), mode="bilinear", align_corners=False
        )
        return (big[0] - self.mean) / self.std


def transforms(data: Data, look: Look) -> tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]]:
    """For training and for validation: timm's, from the data settings and the model's look."""
    if data.kind == "digits":
        return DigitsTransform(look), DigitsTransform(look)
    from timm.data import create_transform

    shared: dict[str, Any] = {
        "input_size": (3, look.size, look.size),
        "interpolation": look.interpolation,
        "mean": look.mean,
        "std": look.std,
    }
    plain = create_transform(**shared, is_training=False, crop_pct=look.crop)
    if data.augment == "none":
        return _rgb(plain), _rgb(plain)
    augmented = create_transform(
        **shared,
        is_training=True,
        hflip=data.hflip,
        color_jitter=data.color_jitter,
        auto_augment=data.auto_augment,
        re_prob=data.reprob,
    )
    return _rgb(augmented), _rgb(plain)


class _rgb:
    """Grey and transparent images as RGB, then a transform."""

    def __init__(self, then: Any) -> None:
        self.then = then

    def __call__(self, image: Any) -> Tensor:
        """image: of Pillow, or whatever the transform takes."""
        return self.then(image.convert("RGB") if hasattr(image, "convert") else image)
