"""Metrics from sums: against scikit-learn's, by hand, and the same however the images come."""

from __future__ import annotations

import pytest
import torch

from attninject.training.metrics import BINS, Metrics, Tally

NAMES = ("ant", "bee", "cow", "dog")


def tally(logits: torch.Tensor, labels: torch.Tensor, sizes: int = 1000) -> Tally:
    """Sums over the images in batches of at most that many."""
    found = Tally(len(NAMES), confusion=True)
    for x, y in zip(logits.split(sizes), labels.split(sizes), strict=True):
        found.add(x, y, torch.zeros(len(y)))
    return found


def test_rates_are_scikit_learns() -> None:
    """Precision, recall, macro-F1 and the confusion matrix of random answers; a class without images counts in none."""
    from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 4, generator=generator)
    labels = torch.randint(3, (200,), generator=generator)
    found = Metrics.of(tally(logits, labels, 7), NAMES)
    predicted = logits.argmax(1)
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predicted, labels=range(4), zero_division=0
    )
    for one, *expected in zip(found.classes, precision, recall, f1, support, strict=True):
        assert [one.precision, one.recall or 0.0, one.f1, one.images] == pytest.approx(expected)
    assert found.classes[3].recall is None
    assert found.macro_f1 == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert found.confusion == tuple(map(tuple, confusion_matrix(labels, predicted, labels=range(4)).tolist()))
    assert found.top1 == pytest.approx(float((predicted == labels).double().mean()))
    assert found.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-6)
    assert found.top5 == 1.0


def test_batches_make_no_difference_and_padding_does_not_count() -> None:
    """One batch or many give the same counts; label -1 is in none of them."""
    logits = torch.randn(30, 4, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(30) % 4
    whole, pieces = (Metrics.of(tally(logits, labels, n), NAMES) for n in (30, 4))
    assert (whole.classes, whole.confusion) == (pieces.classes, pieces.confusion)
    assert whole.ece == pytest.approx(pieces.ece, abs=1e-12)
    padded = torch.cat([labels, torch.full((5,), -1)])
    again = Metrics.of(tally(torch.cat([logits, torch.randn(5, 4)]), padded), NAMES)
    assert again.to_dict() == whole.to_dict()


def test_calibration_error_by_hand() -> None:
    """Ten images at confidence 0.62, half of them right, and ten at 0.92, all right: (1.2 + 0.8) / 20."""

    def logits(confidence: float) -> torch.Tensor:
        rest = (1 - confidence) / 3
        return torch.tensor([confidence, rest, rest, rest]).log()

    x = torch.stack([logits(0.62)] * 10 + [logits(0.92)] * 10)
    y = torch.tensor([0] * 5 + [1] * 5 + [0] * 10)
    found = Metrics.of(tally(x, y), NAMES)
    assert found.ece == pytest.approx(0.1, abs=1e-6)
    assert [n for n, _, _ in found.bins if n] == [10, 10]
    assert len(found.bins) == BINS
    sure = torch.tensor([[50.0, 0.0, 0.0, 0.0]])  # confidence 1 is in the last bin
    assert Metrics.of(tally(sure, torch.tensor([0])), NAMES).bins[-1] == (1, pytest.approx(1.0), 1)
