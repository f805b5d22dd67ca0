"""By which figure a run is judged: which epoch is the best, and whether later ones still get better. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attninject.errors import ExperimentError, Fault

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Monitor:
    """A column of the log. `said`: its name in words; `falls`: whether less is better; `share`: shown in percent."""

    key: str
    said: str
    falls: bool = False
    share: bool = True

    def worth(self, row: Row) -> float:
        """The figure of a row of the log, so that more is better; one that is no number is worth nothing."""
        found = float(row[self.key]) * (-1 if self.falls else 1)
        return -math.inf if math.isnan(found) else found

    def waited(self, history: Sequence[Row], by: float = 0.0) -> int:
        """Epochs since the last one that was better, by more than `by`, than the last such before it."""
        best = 0
        for number, row in enumerate(history):
            if self.worth(row) - self.worth(history[best]) > by:
                best = number
        return len(history) - 1 - best

    def words(self, row: Row) -> str:
        """`top-1 91.20%`."""
        return f"{self.said} {row[self.key]:{'.2%' if self.share else '.4f'}}"


MONITORS = {
    m.key: m
    for m in (
        Monitor("val_loss", "validation loss", falls=True, share=False),
        Monitor("top1", "top-1"),
        Monitor("top5", "top-5"),
        Monitor("map", "mAP"),
        Monitor("macro_f1", "macro-F1"),
    )
}
OF_LABELS, OF_CLASSES = ("val_loss", "map", "macro_f1"), ("val_loss", "top1", "top5", "macro_f1")


def monitor_of(key: str | None, many: bool) -> Monitor:
    """The monitor of a setting; None: top-1, or mAP of images with `many` labels each.

    Raises:
        ExperimentError: such a run does not measure it.
    """
    found = key or ("map" if many else "top1")
    there = OF_LABELS if many else OF_CLASSES
    if found not in there:
        labels = "several labels" if many else "one class"
        raise ExperimentError(
            [Fault(f"train, monitor: images of {labels} each have {', '.join(there)}, not {found}")]
        )
    return MONITORS[found]


def ended_early(train: Any, many: bool, history: Sequence[Row]) -> bool:
    """Whether the monitor has got no better for as many epochs as `patience` of the settings `train` says."""
    patience: int | None = train.patience
    return (
        patience is not None and monitor_of(train.monitor, many).waited(history, train.min_delta) >= patience
    )


def shown(row: Row) -> str:
    """All figures of a row in words, in the log's order."""
    return ", ".join(m.words(row) for m in MONITORS.values() if m.key in row)
