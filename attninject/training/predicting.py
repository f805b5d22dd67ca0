"""What a trained run says of image files: the likeliest classes of each."""

from __future__ import annotations

import csv
import io
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from attninject import hub
from attninject.errors import DataError
from attninject.wording import aligned, listed

from . import runs
from .data.preprocessing import preprocessing_of, transforms
from .data.reading import read_rgb
from .data.samples import UNREADABLE
from .engine import trained
from .experiment import Data, read_experiment


@dataclass(frozen=True)
class Prediction:
    """One image: its likeliest classes, best first, with their probabilities."""

    file: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Predictions:
    """All images in order. `unreadable`: file → why it could not be read. `seconds`: for reading and computing."""

    rows: tuple[Prediction, ...]
    unreadable: dict[str, str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        rows = [asdict(row) for row in self.rows]
        return {"predictions": rows, "unreadable": self.unreadable, "seconds": self.seconds}

    def csv(self) -> str:
        """A row per image: its file, then class and probability by rank."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        ranks = range(1, 1 + max((len(row.classes) for row in self.rows), default=0))
        writer.writerow(["file", *(f"{name}_{rank}" for rank in ranks for name in ("class", "probability"))])
        for row in self.rows:
            pairs = zip(row.classes, row.probabilities, strict=True)
            writer.writerow([row.file, *(v for name, p in pairs for v in (name, f"{p:.6f}"))])
        return text.getvalue()

    def __str__(self) -> str:
        rows = [
            (row.file, *(f"{n} {p:.1%}" for n, p in zip(row.classes, row.probabilities, strict=True)))
            for row in self.rows
        ]
        lines = aligned(rows) if rows else []
        lines.append(f"{len(rows)} images, {len(rows) / max(self.seconds, 1e-9):.1f} per second")
        if self.unreadable:
            lines.append(f"{len(self.unreadable)} could not be read: {listed(list(self.unreadable))}")
        return "\n".join(lines)


def predict(
    run: str | os.PathLike[str], images: Sequence[str | os.PathLike[str]], *, topk: int = 5, batch_size: int = 64,
    workers: int = 0, skip: bool = False,
) -> Predictions:  # fmt: skip
    """The likeliest classes of image files, by the best model of a run of `attninject finetune`.

    Of a run on images with several labels each, every class has a probability of its own.

    Files are read and transformed as the run's validation images were: grey, transparent and CMYK images become RGB,
    of sixteen bits and floats are scaled; a rotation that only EXIF tells is not applied, as it is not in training.

    Args:
        run: a folder, `hf-hub:user/name` or `local-dir:FOLDER`.
        images: files, and folders that are searched for image files.
        topk: how many classes of each.
        batch_size: images per forward.
        workers: loader processes; 0: read in this one.
        skip: go on past unreadable files, and say which they are.

    Raises:
        RunError, HubError: there is no such run.
        DataError: no image is found, or one cannot be read.
    """
    folder = hub.folder_of(run)
    model = trained(folder)
    data = read_experiment(folder / runs.SETTINGS).data
    classes = runs.classes_in(folder)
    size = preprocessing_of(model, data).size
    _, transform = transforms(Data("imagefolder"), preprocessing_of(model, Data("imagefolder", size=size)))
    files = Files(found_in(images), transform)
    began = time.perf_counter()
    loader = DataLoader(files, batch_size=batch_size, num_workers=workers, collate_fn=list)
    rows, unreadable = [], {}
    shares = torch.sigmoid if data.kind == "multilabel" else _softmax
    for found, said in _batches(model, loader, shares):
        unreadable.update(said)
        if unreadable and not skip:
            file, why = next(iter(unreadable.items()))
            raise DataError(
                f"{file} cannot be read as an image ({why}); leave such files out, or give --skip"
            )
        rows += [_prediction(file, p, classes, topk) for file, p in found]
    return Predictions(tuple(rows), unreadable, time.perf_counter() - began)


def found_in(images: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The files that are named, and the image files below the folders that are, in order.

    Raises:
        DataError: a name that is neither, or nothing found.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    files: list[Path] = []
    for name in images:
        path = Path(name)
        if path.is_dir():
            files += sorted(p for p in path.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS and p.is_file())
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"there is no file or folder {path}")
    if not files:
        raise DataError(f"there is no image file in {', '.join(map(str, images))}")
    return files


class Files(Dataset[tuple[str, Tensor | None, str]]):
    """(file, image as the model takes it, "") or (file, None, why it cannot be read)."""

    def __init__(self, files: Sequence[Path], transform: Any) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[str, Tensor | None, str]:
        file = str(self.files[index])
        try:
            return file, self.transform(read_rgb(file)), ""
        except UNREADABLE as error:
            return file, None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


Batch = Sequence[tuple[str, Tensor | None, str]]


@torch.inference_mode()
def _batches(
    model: nn.Module, loader: Iterable[Batch], shares: Callable[[Tensor], Tensor]
) -> Iterator[tuple[list[tuple[str, Tensor]], dict[str, str]]]:
    """Of each batch: files with their probabilities (classes,), and files that cannot be read, with the reason."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).eval()
    for batch in loader:
        readable = [(file, x) for file, x, _ in batch if x is not None]
        unreadable = {file: why for file, x, why in batch if x is None}
        if not readable:
            yield [], unreadable
            continue
        logits = model(torch.stack([x for _, x in readable]).to(device))
        yield list(zip([file for file, _ in readable], shares(logits.float()).cpu(), strict=True)), unreadable


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(1)


def _prediction(file: str, shares: Tensor, classes: Sequence[str], topk: int) -> Prediction:
    values, places = shares.topk(min(topk, len(shares)))
    return Prediction(file, tuple(classes[i] for i in places.tolist()), tuple(values.tolist()))
