"""What a run measured at its last epoch beside its log: counts per class, and how far its confidence is off."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from attninject.training import runs
from attninject.training.metrics import ClassCounts


@dataclass(frozen=True)
class Measured:
    """Of the last epoch: expected calibration error, macro-F1, and a count per class."""

    ece: float
    macro_f1: float
    classes: tuple[ClassCounts, ...]


def read_measured(folder: Path, last: Mapping[str, float]) -> Measured | None:
    """What a run's folder says of its last epoch; None where it says nothing, as runs of earlier versions do.

    Args:
        folder: of the run.
        last: the last row of its log.

    Raises:
        ValueError: the file is damaged, or contradicts the log.
    """
    file = folder / runs.MEASURED
    if not file.exists():
        return None
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        keys = ("name", "images", "predicted", "right")
        classes = tuple(ClassCounts(*(one[key] for key in keys)) for one in said["classes"])
        found = Measured(float(said["ece"]), float(said["macro_f1"]), classes)
        same = (said["epoch"], said["top1"]) == (last["epoch"], last["top1"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{runs.MEASURED} is damaged ({type(error).__name__}: {error})") from error
    if not same:
        raise ValueError(f"{runs.MEASURED} says otherwise than the log of epoch {last['epoch']:g}")
    return found
