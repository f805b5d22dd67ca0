"""What a classifier is worth on labelled images: loss, accuracy, per class, and whether its confidence is to be believed.

Everything follows from sums over images, a `Tally`; those of several batches or processes add.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

BINS = 15
"""Bins of the calibration error, of equal width, as in Guo et al. (arXiv:1706.04599)."""


class Tally:
    """Sums over images: losses, right answers, counts per class, and confidence in bins."""

    def __init__(self, classes: int, confusion: bool = False) -> None:
        self.sums = torch.zeros(5, dtype=torch.float64)  # loss, top-1, top-5, images, unreadable
        self.bins = torch.zeros(3, BINS, dtype=torch.float64)  # images, confidence, right
        self.counts = torch.zeros(3, classes, dtype=torch.float64)  # images, predicted, both
        self.confusion = torch.zeros(classes, classes, dtype=torch.int64) if confusion else None

    def add(self, logits: Tensor, labels: Tensor, skipped: Tensor) -> None:
        """A batch: logits (B, classes), labels (B,) with -1 for what does not count, skipped (B,)."""
        counts, target = labels >= 0, labels.clamp(min=0)
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices == target[:, None]
        losses = nn.functional.cross_entropy(logits, target, reduction="none").double()
        rows = (losses, top[:, 0].double(), top.any(1).double(), torch.ones_like(losses))
        self.sums += torch.stack([*(r[counts].sum() for r in rows), skipped.sum().double()])
        self._count(logits[counts], target[counts])

    def _count(self, logits: Tensor, target: Tensor) -> None:
        """logits: (n, classes), target: (n,)."""
        confidence, predicted = logits.double().softmax(1).max(1)
        right = (predicted == target).double()
        bin_of = (confidence * BINS).ceil().long().clamp(1, BINS) - 1  # of ((m − 1)/M, m/M]
        for row, value in zip(self.bins, (torch.ones_like(right), confidence, right), strict=True):
            row.index_add_(0, bin_of, value)
        one = torch.ones_like(right)
        for row, which, value in zip(
            self.counts, (target, predicted, target), (one, one, right), strict=True
        ):
            row.index_add_(0, which, value)
        if self.confusion is not None:
            size = len(self.confusion)
            pairs = torch.bincount(target * size + predicted, minlength=size * size)
            self.confusion += pairs.view(size, size)

    def reduced(self, accelerator: Any) -> Tally:
        """The sums of all processes, in place; the confusion matrix stays this process's own."""
        if accelerator.num_processes > 1:
            own = [t.to(accelerator.device) for t in (self.sums, self.bins, self.counts)]
            self.sums, self.bins, self.counts = accelerator.reduce(own, "sum")
        return self

    def metrics(self, names: Sequence[str]) -> Metrics:
        """What follows from sums over at least one image; `names` are the classes'."""
        return Metrics.of(self, names)

    @property
    def images(self) -> int:
        """Images that count."""
        return int(self.sums[3])


@dataclass(frozen=True)
class ClassCounts:
    """One class: its images, how often it was predicted, and how often rightly."""

    name: str
    images: int
    predicted: int
    right: int

    @property
    def precision(self) -> float | None:
        """right / predicted; None where it was never predicted."""
        return self.right / self.predicted if self.predicted else None

    @property
    def recall(self) -> float | None:
        """right / images; None where it has no image."""
        return self.right / self.images if self.images else None

    @property
    def f1(self) -> float | None:
        """Harmonic mean of both, 2 · right / (images + predicted); None where neither."""
        both = self.images + self.predicted
        return 2 * self.right / both if both else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the counts, and what follows from them."""
        return {**asdict(self), "precision": self.precision, "recall": self.recall, "f1": self.f1}


def macro_f1(classes: Sequence[ClassCounts]) -> float:
    """Mean of the classes' F1, over those that have an image or were predicted; 0 where none has."""
    found = [c.f1 for c in classes if c.f1 is not None]
    return math.fsum(found) / len(found) if found else 0.0


@dataclass(frozen=True)
class Metrics:
    """A classifier on some images.

    Attributes:
        images: that count.
        unreadable: images that were left out.
        loss: mean cross-entropy.
        top1: fraction of right answers.
        top5: fraction of images whose class is among the five likeliest.
        classes: counts of each.
        bins: (images, sum of confidences, right answers) of each bin of confidence.
        confusion: images of class i that were taken for j; None where it was not asked for.
    """

    images: int
    unreadable: int
    loss: float
    top1: float
    top5: float
    classes: tuple[ClassCounts, ...]
    bins: tuple[tuple[int, float, int], ...]
    confusion: tuple[tuple[int, ...], ...] | None = None

    FIGURES = (
        ("loss", "loss", False), ("top-1", "top1", True), ("top-5", "top5", True), ("macro-F1", "macro_f1", True),
        ("calibration error", "ece", True),
    )  # fmt: skip
    """What is shown: its name in words, its attribute, and whether it is shown in percent."""

    @classmethod
    def of(cls, tally: Tally, names: Sequence[str]) -> Metrics:
        """From sums over at least one image."""
        loss, top1, top5, count, lost = tally.sums.tolist()
        per_class = [
            ClassCounts(n, *map(int, c)) for n, c in zip(names, tally.counts.T.tolist(), strict=True)
        ]
        bins = [(int(n), confidence, int(right)) for n, confidence, right in tally.bins.T.tolist()]
        matrix = None if tally.confusion is None else tuple(map(tuple, tally.confusion.tolist()))
        return cls(
            int(count),
            int(lost),
            loss / count,
            top1 / count,
            top5 / count,
            tuple(per_class),
            tuple(bins),
            matrix,
        )

    @property
    def macro_f1(self) -> float:
        """See the function of that name."""
        return macro_f1(self.classes)

    @property
    def ece(self) -> float:
        """Expected calibration error: Σ over bins of |right answers − confidences| / images.

        Confidence is the largest probability of the softmax. In bins of equal width by Guo et al. (arXiv:1706.04599,
        eq. 3), after Naeini et al. (2015); it is biased upwards where a bin has few images.
        """
        return math.fsum(abs(right - confidence) for _, confidence, right in self.bins) / self.images

    def row(self) -> dict[str, Any]:
        """The columns of a run's log."""
        figures = {"val_loss": self.loss, "top1": self.top1, "top5": self.top5, "macro_f1": self.macro_f1}
        return {**figures, "val_skipped": self.unreadable}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: what is measured, and what it follows from."""
        rates = [c.to_dict() for c in self.classes]
        found = {
            "images": self.images, "unreadable": self.unreadable, "loss": self.loss, "top1": self.top1,
            "top5": self.top5, "macro_f1": self.macro_f1, "ece": self.ece, "classes": rates,
            "bins": [list(b) for b in self.bins],
        }  # fmt: skip
        return found if self.confusion is None else {**found, "confusion": [list(r) for r in self.confusion]}
