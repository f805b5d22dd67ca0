"""A finished run measured again: on its validation images or others, with its blocks and without."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attninject import api, hub
from attninject.errors import DataError, RunError

from . import devices, runs
from .data.datasets import Images, Part, class_names
from .data.loaders import Schedule, batches, loader
from .data.multilabel import open_labelled
from .data.opening import open_folder, open_images
from .data.preprocessing import preprocessing_of, transforms
from .data.samples import Padded
from .engine import trained
from .experiment import Data, Experiment, read_experiment
from .measuring import Measured, evaluate
from .metrics import ClassCounts, Metrics
from .multilabel_metrics import LabelMetrics
from .nets import placed

FILES = {"best": runs.BEST, "last": runs.LAST}
"""Which of a run's two files: that of the epoch which its monitor found best, or that of the last epoch."""


_LATER = {"best": " (see what the last epoch's do: file last)", "last": ""}


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        run: folder of the run.
        file: `best` or `last`.
        data: where the images are from, in words.
        metrics: with the blocks.
        without: with the blocks switched off; None where that was not asked for.
    """

    run: Path
    file: str
    data: str
    metrics: Measured
    without: Measured | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        found = {"run": str(self.run), "file": self.file, "data": self.data, **self.metrics.to_dict()}
        return found if self.without is None else {**found, "without_blocks": self.without.to_dict()}

    def csv(self) -> str:
        """A row per class: its images, counts and rates; with `without`, those columns once more."""
        parts = {"": self.metrics, "without_": self.without}
        rows = [
            {"class": one.name, "images": one.images} | {k: v for d in rates for k, v in d.items()}
            for one, *rates in zip(
                self.metrics.classes,
                *([_rates(c, prefix) for c in m.classes] for prefix, m in parts.items() if m is not None),
                strict=True,
            )
        ]
        return _table(list(rows[0]), [list(row.values()) for row in rows])

    def confusion_csv(self) -> str:
        """Rows: the class of the image; columns: the class it was taken for.

        Raises:
            RunError: the matrix was not counted.
        """
        if not isinstance(self.metrics, Metrics) or self.metrics.confusion is None:
            raise RunError("the confusion matrix was not counted: evaluate_run(…, confusion=True)")
        names = [c.name for c in self.metrics.classes]
        rows = [[name, *counts] for name, counts in zip(names, self.metrics.confusion, strict=True)]
        return _table(["class", *names], rows)

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def evaluate_run(
    folder: Any,
    data: Any = None,
    *,
    file: str = "best",
    without_blocks: bool = False,
    confusion: bool = False,
    batch_size: int | None = None,
) -> Evaluation:
    """Measure the model of a run of `attninject finetune`, in the run's own precision and preprocessing.

    Args:
        folder: of the run.
        data: a folder with a folder of images per class, or with such folders under the run's `val_split`; its classes
            are some of the run's, by name. Of a run on images with several labels each: a folder with `labels.csv`
            or `labels` in it. None: the run's own validation images.
        file: `best` or `last`.
        without_blocks: measure once more with the blocks switched off: what the trained blocks are worth.
        confusion: count which class is taken for which.
        batch_size: None: the run's.

    Raises:
        RunError: the folder holds no such run, or one without blocks where they are to be switched off.
        DataError: the images cannot be had, or are of classes that the run does not know.
    """
    where = hub.folder_of(folder)
    model = trained(where, FILES[file])
    if without_blocks and not api.injected(model):
        raise RunError(f"{where} is a run of plain fine-tuning: there are no blocks to switch off")
    experiment = read_experiment(where / runs.SETTINGS)
    classes = runs.classes_in(where)
    read = experiment.data
    images = _images(read, classes, where) if data is None else _other(read, data, classes)
    if data is not None and read.kind != "multilabel":  # from files, at the size of the run's images
        read = replace(read, kind="imagefolder", root=str(data), size=preprocessing_of(model, read).size)
    measure = _Measure(model, replace(experiment, data=read), images, classes, batch_size)
    found = measure(confusion)
    without = measure(False, blocks=False) if without_blocks else None
    said = "its validation images" if data is None else str(data)
    return Evaluation(where, file, said, found, without)


class _Measure:
    """A run's model and images; each call is one pass over them."""

    def __init__(
        self,
        model: nn.Module,
        experiment: Experiment,
        images: Any,
        classes: Sequence[str],
        batch_size: int | None,
    ) -> None:
        self.model, self.train, self.data = model, experiment.train, experiment.data
        self.images, self.classes = images, classes
        self.batch_size = batch_size or experiment.train.batch_size

    def __call__(self, confusion: bool, blocks: bool = True) -> Measured:
        """Metrics, with the blocks or with them switched off."""
        accelerator = devices.open_accelerator(self.train)
        try:
            self.model.to(accelerator.device)
            if self.train.channels_last:
                self.model.to(memory_format=torch.channels_last)
            coming = batches(self._loader(accelerator.device.type == "cuda"))
            with devices.deterministic(), nullcontext() if blocks else api.disabled(self.model):
                return evaluate(
                    self.model, coming, lambda x: placed(x, self.train, accelerator.device), accelerator,
                    self.classes, confusion,
                )  # fmt: skip
        finally:
            devices.forget_accelerator()

    def _loader(self, pin: bool) -> Any:
        _, plain = transforms(self.data, preprocessing_of(self.model, self.data))
        skip = self.data.unreadable == "skip"
        many = self.data.kind == "multilabel"
        held = Padded(self.images, plain, self.train.seed, skip, len(self.classes), many)
        return loader(held, Schedule(len(held), self.batch_size, train=False), self.data.workers, pin)


# --- the images --------------------------------------------------------------------------------


def _images(data: Data, classes: tuple[str, ...], where: Path) -> Any:
    opened: Images = open_images(data)
    if opened.classes != classes:
        raise DataError(
            f"the images of {where} have other classes now than the run ({_differ(opened.classes, classes)})"
        )
    return opened.val


def _other(data: Data, folder: Any, classes: tuple[str, ...]) -> Any:
    """Images of another folder, their labels as the run numbers its classes."""
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"--data: there is no folder {root}")
    if data.kind == "multilabel":
        labelled = open_labelled(root, classes=classes)
        split = labelled.under(data.val_split)
        return Part(labelled, split) if split else labelled
    found = open_folder(root / data.val_split if (root / data.val_split).is_dir() else root)
    names = class_names(found) or ()
    unknown = [name for name in names if name not in classes]
    if unknown:
        raise DataError(
            f"{root} has classes that the run does not know: {', '.join(unknown[:5])}; the run's are "
            f"{', '.join(classes[:5])}{' …' if len(classes) > 5 else ''}"
        )
    return Renumbered(found, [classes.index(name) for name in names])


class Renumbered(Part):
    """A data set whose labels are looked up in a list."""

    def __init__(self, whole: Any, labels: Sequence[int]) -> None:
        super().__init__(whole, range(len(whole)))
        self.labels_of = list(labels)

    def __getitem__(self, index: int) -> Any:
        image, label = self.whole[index][:2]
        return image, self.labels_of[int(label)]


def _differ(now: Sequence[str], then: Sequence[str]) -> str:
    return ", ".join(sorted(set(now) ^ set(then))[:5]) or "another order"


# --- words -------------------------------------------------------------------------------------


def _rates(one: ClassCounts, prefix: str) -> dict[str, Any]:
    numbers = {key: value for key, value in one.to_dict().items() if key not in ("name", "images")}
    return {prefix + key: value for key, value in numbers.items()}


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(["" if cell is None else cell for cell in row] for row in rows)
    return stream.getvalue()


def _lines(of: Evaluation) -> list[str]:
    """The table of metrics, then that of classes."""
    found, without = of.metrics, of.without
    lost = f"; {found.unreadable} could not be read and are left out" if found.unreadable else ""
    lines = [f"{of.run}, the {of.file} epoch, on {found.images} images of {of.data}{lost}", ""]
    head = ["", "value"] if without is None else ["", "value", "without blocks", "difference"]
    rows = [head] + [
        _compared(name, *(getattr(m, key) for m in (found, without) if m is not None), percent=percent)
        for name, key, percent in found.FIGURES
    ]
    lines += [*columns(rows), ""]
    if without is not None and all(
        getattr(found, key) == getattr(without, key) for _, key, _ in found.FIGURES
    ):
        lines += [
            f"the blocks of this file change nothing: they stand as before training{_LATER[of.file]}",
            "",
        ]
    head = ["class", "images", "predicted", "precision", "recall"]
    rows = [head] + [
        [c.name, str(c.images), str(c.predicted), _percent(c.precision), _percent(c.recall)]
        for c in found.classes
    ]
    if isinstance(found, LabelMetrics):
        rows = [
            [*row, ap] for row, ap in zip(rows, ["AP", *(_percent(c.ap) for c in found.classes)], strict=True)
        ]
    if without is not None:
        rows = [
            [*row, "recall without" if number == 0 else _percent(without.classes[number - 1].recall)]
            for number, row in enumerate(rows)
        ]
    return lines + columns(rows)


def _compared(name: str, value: float, other: float | None = None, *, percent: bool) -> list[str]:
    shown = _percent if percent else "{:.4f}".format
    if other is None:
        return [name, shown(value)]
    difference = f"{100 * (value - other):+.2f}" if percent else f"{value - other:+.4f}"
    return [name, shown(value), shown(other), difference]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2%}"


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Cells under one another, the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
