"""Labelled images by a word or a folder, as a model takes them: what `attninject rank --data` opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from attninject.errors import DataError
from attninject.training.data.opening import open_images
from attninject.training.data.preprocessing import preprocessing_of, transforms
from attninject.training.data.samples import Samples as Transformed
from attninject.training.experiment import Data, data_of
from attninject.wording import did_you_mean

from . import tasks

WORDS = ("digits", *tasks.TASKS)
"""What is named by a word; anything else is a folder with a folder of images per class."""


def open_source(model: nn.Module, source: str, size: int | None = None, seed: int = 0) -> Any:
    """The training images of a source, resized and normalised as the model wants them.

    Args:
        model: says size, mean and deviation, where timm knows them; else ImageNet's.
        source: one of `WORDS`, or a folder.
        size: pixels of height and width; None: the model's own.
        seed: of what a task draws.

    Returns:
        What `rank_sites` takes as `data`.

    Raises:
        DataError: no such folder, or a word that names nothing.
        MissingPackageError: the images of a task are not installed.
    """
    if source in WORDS and source != "digits":
        return _task(model, source, size, seed)
    if source != "digits" and not Path(source).is_dir():
        near = did_you_mean(source, WORDS)
        raise DataError(f"--data: there is no folder {source}{near}; known by name are {', '.join(WORDS)}")
    data = data_of({"kind": source, "size": size})
    _, plain = transforms(data, preprocessing_of(model, data))
    return _Pairs(Transformed(open_images(data).train, plain, seed, skip=False))


def _task(model: nn.Module, name: str, size: int | None, seed: int) -> Any:
    wanted = preprocessing_of(model, Data(kind="imagefolder", size=size))
    task = tasks.TASKS[name](seed=seed, size=wanted.size).normalised(wanted.mean, wanted.std)
    return task.train.images, task.train.labels


class _Pairs:
    """(image, label) by number."""

    def __init__(self, samples: Transformed) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[0, index][:2]
