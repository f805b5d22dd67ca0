"""What a classifier is worth on images with several labels each: mAP, macro-F1, and per class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attninject.errors import DataError

from .metrics import ClassCounts, macro_f1


class LabelTally:
    """Logits and labels of all images that count: an average precision needs them in order, sums do not do."""

    def __init__(self, confusion: bool = False) -> None:
        if confusion:
            raise DataError(
                "a confusion matrix is of one class per image; these images have several labels each"
            )
        self.logits: list[Tensor] = []  # of each batch
        self.labels: list[Tensor] = []
        self.unreadable = 0

    def add(self, logits: Tensor, labels: Tensor, skipped: Tensor) -> None:
        """A batch: logits and labels (B, classes), labels in rows of -1 for what does not count; skipped (B,)."""
        counts = labels[:, 0] >= 0
        self.logits.append(logits[counts])
        self.labels.append(labels[counts])
        self.unreadable += int(skipped.sum())

    def reduced(self, accelerator: Any) -> LabelTally:
        """The images of all processes, in place."""
        if accelerator.num_processes > 1:
            found: list[Any] = [None] * accelerator.num_processes
            torch.distributed.all_gather_object(found, (self.logits, self.labels, self.unreadable))
            self.logits, self.labels = ([batch for part in found for batch in part[i]] for i in (0, 1))
            self.unreadable = sum(part[2] for part in found)
        return self

    @property
    def images(self) -> int:
        """Images that count."""
        return sum(map(len, self.labels))

    def metrics(self, names: Sequence[str]) -> LabelMetrics:
        """What follows; a class counts as predicted where its probability is above a half."""
        logits, labels = torch.cat(self.logits), torch.cat(self.labels)
        loss = nn.functional.binary_cross_entropy_with_logits(logits.double(), labels.double())
        said, true = logits > 0, labels > 0
        counts = [t.sum(0).tolist() for t in (true, said, said & true)]
        precisions = [average_precision(s, t) for s, t in zip(logits.T, true.T, strict=True)]
        per_class = [LabelCounts(*one) for one in zip(names, *counts, precisions, strict=True)]
        return LabelMetrics(self.images, self.unreadable, float(loss), tuple(per_class))


def average_precision(scores: Tensor, true: Tensor) -> float | None:
    """Σ over thresholds, from the highest, of (recall gained there) · precision; None where nothing is true.

    Images of equal scores fall under one threshold; nothing is interpolated (scikit-learn's definition).

    Args:
        scores: (n,).
        true: (n,), of booleans.
    """
    if not bool(true.any()):
        return None
    order = scores.argsort(descending=True)
    sorted_scores, hits = scores[order], true[order].double().cumsum(0)
    last = torch.ones_like(true)
    last[:-1] = sorted_scores[1:] != sorted_scores[:-1]
    seen = torch.arange(1, len(scores) + 1, dtype=torch.float64)[last]
    hits = hits[last]
    gained = torch.diff(hits, prepend=hits.new_zeros(1))
    return float((gained * hits / seen).sum() / hits[-1])


@dataclass(frozen=True)
class LabelCounts(ClassCounts):
    """One class of several; `ap` is its average precision, None where it has no image."""

    ap: float | None


@dataclass(frozen=True)
class LabelMetrics:
    """A classifier on some images with several labels each.

    Attributes:
        images: that count.
        unreadable: images that were left out.
        loss: mean binary cross-entropy over images and classes.
        classes: counts of each.
    """

    images: int
    unreadable: int
    loss: float
    classes: tuple[LabelCounts, ...]

    FIGURES = (("loss", "loss", False), ("mAP", "map", True), ("macro-F1", "macro_f1", True))
    """What is shown: its name in words, its attribute, and whether it is shown in percent."""

    @property
    def map(self) -> float:
        """Mean of the classes' average precisions, over those that have an image; 0 where none has."""
        found = [c.ap for c in self.classes if c.ap is not None]
        return math.fsum(found) / len(found) if found else 0.0

    @property
    def macro_f1(self) -> float:
        """As of images with one class each."""
        return macro_f1(self.classes)

    def row(self) -> dict[str, Any]:
        """The columns of a run's log."""
        figures = {"val_loss": self.loss, "map": self.map, "macro_f1": self.macro_f1}
        return {**figures, "val_skipped": self.unreadable}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: what is measured, and what it follows from."""
        return {
            "images": self.images, "unreadable": self.unreadable, "loss": self.loss, "map": self.map,
            "macro_f1": self.macro_f1, "classes": [c.to_dict() for c in self.classes],
        }  # fmt: skip
