"""One run of a sweep in its folder: how far it is, what it has found, and how it is carried on."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from attninject.errors import AttnInjectError, CheckpointError
from attninject.training import runs
from attninject.training.callbacks import Lines, printed
from attninject.training.engine import run_experiment
from attninject.training.experiment import Experiment, Training, read_experiment
from attninject.training.log_columns import renamed
from attninject.training.monitors import ended_early

from .run_measured import Measured, read_measured

Status = Literal["waiting", "begun", "finished", "damaged"]

Row = Mapping[str, float]
"""A row of a run's log: epoch, val_loss, top1, …; what has no value is left out."""


@dataclass(frozen=True)
class Outcome:
    """What a run's folder says.

    Attributes:
        status: `damaged` where the files contradict one another, themselves or the design.
        rows: of the log, from epoch 0, before any training.
        reason: of the damage.
        measured: per class and by confidence, after the last epoch; None unless finished, or of an earlier version.
    """

    status: Status
    rows: tuple[Row, ...] = ()
    reason: str = ""
    measured: Measured | None = None

    @property
    def top1(self) -> float | None:
        """Accuracy on the validation images after the last epoch; None unless finished.

        The last epoch's, not the best one's: choosing an epoch by the images that are then reported flatters.
        """
        return self.rows[-1]["top1"] if self.status == "finished" else None


def outcome(folder: Path, experiment: Experiment) -> Outcome:
    """How far a run is; its log is believed only where it agrees with the checkpoint's own, which has a checksum."""
    try:
        there = _experiment_in(folder)
        if there is None:
            return Outcome("waiting")
        changed = _difference(there, experiment)
        if changed:
            return Outcome("damaged", reason=f"its settings are not the design's ({changed})")
        rows = read_log(folder / runs.LOG)
        found = _compared(folder, rows, experiment.train)
        return (
            replace(found, measured=read_measured(folder, rows[-1])) if found.status == "finished" else found
        )
    except (AttnInjectError, OSError, ValueError, KeyError, TypeError) as error:
        return Outcome("damaged", reason=" ".join(str(error).split()) or type(error).__name__)


def _experiment_in(folder: Path) -> Experiment | None:
    """The settings in a run's folder; None where nothing was begun.

    The engine for Slurm writes settings before anything runs: they count once there is a checkpoint.
    """
    files = (folder / runs.CHECKPOINT, folder / runs.PREVIOUS, folder / runs.LOG)
    if not any(file.exists() for file in files):
        return None
    if not (folder / runs.SETTINGS).exists():
        if (folder / runs.LOG).exists() and not (folder / runs.CHECKPOINT).exists():
            return None  # stopped within its first evaluation: begun anew
        raise CheckpointError(f"{runs.SETTINGS} is missing")
    return read_experiment(folder / runs.SETTINGS)


def _difference(there: Experiment, wanted: Experiment) -> str:
    """The first setting that differs, apart from where the folder lies; "" where none does."""
    a, b = (json.loads(json.dumps(e.to_dict())) for e in (there, wanted))
    for part in ("model", "weights", "recipe"):
        if a[part] != b[part]:
            return part
    return next(
        (key for part in ("data", "train") for key in b[part] if a[part].get(key) != b[part][key]), ""
    )


def read_log(path: Path) -> tuple[Row, ...]:
    """The rows of a log.csv: () where there is none.

    Raises:
        ValueError: a cell is no number, or the epochs are not 0, 1, 2, …
    """
    if not path.exists():
        return ()
    with path.open(newline="", encoding="utf-8") as stream:
        rows = [renamed({k: float(v) for k, v in row.items() if k and v}) for row in csv.DictReader(stream)]
    if [row.get("epoch") for row in rows] != list(range(len(rows))):
        raise ValueError(f"{path.name}: the epochs are not 0, 1, 2, …")
    if any("map" in row for row in rows):
        raise ValueError(f"{path.name}: images with several labels each, and runs are compared by top-1")
    for row in rows:
        if not all(math.isfinite(row.get(key, math.nan)) for key in ("top1", "val_loss")):
            raise ValueError(f"{path.name}: epoch {row['epoch']:g} has no finite top1 and val_loss")
        if not 0 <= row["top1"] <= 1:
            raise ValueError(f"{path.name}: epoch {row['epoch']:g}: top1 is {row['top1']:g}")
    return tuple(rows)


def _compared(folder: Path, rows: tuple[Row, ...], train: Training) -> Outcome:
    """Log against checkpoint: a run that was killed between the two has one row more, and does that epoch again."""
    epochs, early = train.epochs, ended_early(train, False, rows)
    newest = next((p for p in (folder / runs.CHECKPOINT, folder / runs.PREVIOUS) if p.exists()), None)
    if newest is None:  # removed to save space
        return Outcome("finished" if early or len(rows) == epochs + 1 else "begun", rows)
    saved = runs.read_meta(newest)
    kept = saved["history"]
    if len(rows) < len(kept):
        raise CheckpointError(f"{runs.LOG} has {len(rows)} rows, the checkpoint {len(kept)}")
    for row, then in zip(rows, kept, strict=False):
        if any(row.get(key) != then[key] for key in ("top1", "val_loss")):
            raise CheckpointError(f"{runs.LOG} says otherwise than the checkpoint of epoch {then['epoch']}")
    if len(rows) > epochs + 1:
        raise CheckpointError(f"{runs.LOG} has {len(rows) - 1} epochs, the design {epochs}")
    done = saved["epoch"] >= epochs or (early and len(rows) == len(kept))
    return Outcome("finished" if done else "begun", rows)


def carry_on(settings: Mapping[str, Any], threads: int, say: Callable[[str], None]) -> None:
    """Carry a run out, or on from its checkpoint where there is one; a finished one is left as it is.

    Args:
        settings: an experiment as a dict; `out` is the run's folder.
        threads: of torch. The sum of floating-point numbers depends on how many add them, so that a sweep has one
            number for all its runs, however many are at work at a time.
        say: gets the lines of the run.
    """
    torch.set_num_threads(threads)
    experiment = read_experiment(None, settings)
    folder = Path(experiment.out)
    found = outcome(folder, experiment)
    if found.status == "finished":
        return
    if found.status == "damaged":
        raise CheckpointError(f"{folder}: {found.reason}")
    there = any((folder / name).exists() for name in (runs.CHECKPOINT, runs.PREVIOUS))
    with printed(quiet=True):
        run_experiment(experiment, resume=there, callbacks=[Lines(say)])
