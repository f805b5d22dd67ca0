"""Losses: weights of classes, label smoothing, several labels; each against its formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import DATA, QUICK, Shades, net
from torch import Tensor
from torch.utils.data import TensorDataset

from attninject import errors
from attninject.training import factories, finetune
from attninject.training.data.datasets import Images, Part, labels_of
from attninject.training.experiment import settings
from attninject.training.losses import class_weights

LABELS = torch.tensor([0, 0, 0, 1, 1, 2, 0, 0])
IMAGES = Images(TensorDataset(torch.zeros(8, 3, 4, 4), LABELS), None, ("red", "green", "blue", "grey"))
ROWS = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0.0]])
MANY = Images(TensorDataset(torch.zeros(4, 3, 4, 4), ROWS), None, ("red", "green", "blue"), many=True)


def loss_of(images: Images, logits: Tensor, target: Tensor, **train: Any) -> float:
    """The loss of the settings, in double precision."""
    criterion, mixup = factories.make_loss(settings("digits", **train)[1], images)
    assert mixup is None
    return float(criterion.double()(logits, target))


def test_balanced_weights_are_those_of_the_counts() -> None:
    """n / (classes · n_c), as scikit-learn has it; binary losses count what lacks the class over what has it."""
    from sklearn.utils.class_weight import compute_class_weight

    balanced = settings("digits", class_weights="balanced")[1]
    found = class_weights(balanced, IMAGES)
    assert found is not None
    expected = (
        compute_class_weight("balanced", classes=np.arange(3), y=LABELS.numpy()) * 3 / 4
    )  # `grey` is a class too
    assert found[:3].tolist() == pytest.approx(expected.tolist())
    binary = settings("digits", class_weights="balanced", loss="bce")[1]
    assert class_weights(binary, IMAGES).tolist() == pytest.approx([3 / 5, 6 / 2, 7, 7])  # type: ignore[union-attr]
    assert class_weights(balanced, MANY).tolist() == pytest.approx([1 / 3, 1 / 3, 3])  # type: ignore[union-attr]


def test_a_weighted_loss_is_the_mean_over_images() -> None:
    """Σ w_y · CE / n, with smoothing as without; a batch is the mean of its halves."""
    torch.manual_seed(0)
    logits, y = torch.randn(8, 4, dtype=torch.float64), LABELS
    weights = {"red": 2, "green": 0.5, "blue": 1, "grey": 0}
    w, logs = torch.tensor([2, 0.5, 1, 0], dtype=torch.float64), logits.log_softmax(1)
    plain = -(w[y] * logs[torch.arange(8), y]).mean()
    assert loss_of(IMAGES, logits, y, class_weights=weights) == pytest.approx(float(plain))
    smooth = -(0.8 * w[y] * logs[torch.arange(8), y] + 0.05 * (w * logs).sum(1)).mean()
    assert loss_of(IMAGES, logits, y, class_weights=weights, smoothing=0.2) == pytest.approx(float(smooth))
    halves = [loss_of(IMAGES, logits[h], y[h], class_weights=weights) for h in (slice(0, 4), slice(4, 8))]
    assert sum(halves) / 2 == pytest.approx(float(plain))


def test_label_smoothing_is_torchs() -> None:
    """Without weights it is what `cross_entropy(label_smoothing=…)` gives."""
    torch.manual_seed(0)
    logits = torch.randn(8, 4, dtype=torch.float64)
    expected = torch.nn.functional.cross_entropy(logits, LABELS, label_smoothing=0.1)
    assert loss_of(IMAGES, logits, LABELS, smoothing=0.1) == pytest.approx(float(expected))


def test_several_labels_have_a_binary_loss_each() -> None:
    """Whatever `loss` says; weights are of what has the class, smoothing draws targets towards a half."""
    torch.manual_seed(0)
    logits = torch.randn(4, 3, dtype=torch.float64)
    p, t, w = logits.sigmoid(), ROWS.double(), torch.tensor([1.0, 2, 3], dtype=torch.float64)
    expected = -(w * t * p.log() + (1 - t) * (1 - p).log()).mean()
    given = {"red": 1, "green": 2, "blue": 3}
    assert loss_of(MANY, logits, t, class_weights=given) == pytest.approx(float(expected))
    soft = 0.8 * t + 0.1
    smooth = -(soft * p.log() + (1 - soft) * (1 - p).log()).mean()
    assert loss_of(MANY, logits, t, smoothing=0.2) == pytest.approx(float(smooth))


def test_weights_from_a_file_and_what_is_refused(tmp_path: Path) -> None:
    """Two columns, with a head or without; other names, other numbers, other forms are said in words."""
    file = tmp_path / "weights.csv"
    read = lambda: settings("digits", class_weights=str(file))[1]  # noqa: E731
    for text in ("class,weight\nred,2\ngreen,1\n", "red, 2\n\ngreen,1.0\n"):
        file.write_text(text)
        assert read().class_weights == (("red", 2.0), ("green", 1.0))
        assert read().to_dict()["class_weights"] == {"red": 2.0, "green": 1.0}
        assert settings("digits", **read().to_dict())[1] == read()
    for text, said in (
        ("red,2,3\n", "rows that are not of two cells"),
        ("red,2\ngreen,lots\n", "the weight of 'green' must be a number from 0, found 'lots'"),
        ("red,-1\n", "must be a number from 0, found -1"),
    ):
        file.write_text(text)
        with pytest.raises(errors.ExperimentError, match=said):
            read()
    for given, said in (
        ("balancd", "expected balanced, or a CSV file with `class,weight` in each row: .*No such file"),
        (3, "expected balanced, a file, or a mapping"),
        ({"red": True}, "found True"),
    ):
        with pytest.raises(errors.ExperimentError, match=said):
            settings("digits", class_weights=given)
    with pytest.raises(errors.DataError, match=r"the images have no class gren; the nearest names are green"):
        finetune(net(), DATA, **QUICK, class_weights={"red": 1, "gren": 1, "blue": 1})
    with pytest.raises(errors.DataError, match="no weight of blue"):
        finetune(net(), DATA, **QUICK, class_weights={"red": 1, "green": 1})
    with pytest.raises(
        errors.DataError, match="Shades does not tell its labels; give it an attribute `targets`"
    ):
        finetune(net(), DATA, **QUICK, class_weights="balanced")


def test_labels_are_told_without_reading(tmp_path: Path) -> None:
    """A part's labels are those of its images; data sets tell them as targets, samples or tensors."""

    class Told(Shades):
        @property
        def targets(self) -> list[int]:
            return [index % 3 for index in range(self.count)]

    assert labels_of(Part(Told(9), [2, 4])) == [2, 1]
    weighted, plain = net(), net()
    finetune(
        weighted, (Told(48), DATA[1]), **QUICK, class_weights="balanced"
    )  # all classes alike: weights of 1
    finetune(plain, DATA, **QUICK)
    for a, b in zip(weighted.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    finetune(weighted, (Told(48), DATA[1]), **QUICK, class_weights="balanced", cutmix=1.0, loss="bce")
