"""Losses with weights of the classes, and of images with several labels each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attninject.errors import DataError
from attninject.wording import listed, nearest_hint

from .data.datasets import Images, labels_of
from .experiment import Training


class WeightedCrossEntropy(nn.Module):
    """Mean over images of −Σ w_c t_c log p_c; `smoothing` takes from a class's target and gives to all alike.

    The mean is over images, not over weights: so a batch is the mean of its halves, on any number of processes.
    """

    def __init__(self, weights: Tensor, smoothing: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("weights", weights)
        self.smoothing = smoothing

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """logits: (B, classes); target: (B,) of numbers, or (B, classes) of shares → a number."""
        if target.ndim == 1:
            hot = nn.functional.one_hot(target, logits.shape[1]).to(logits.dtype)
            target = hot * (1 - self.smoothing) + self.smoothing / logits.shape[1]
        return nn.functional.cross_entropy(logits, target, weight=self.weights)  # type: ignore[arg-type]


class LabelsCrossEntropy(nn.Module):
    """Binary cross-entropy over images and classes; `smoothing` draws targets towards a half.

    `weights`: how much more an image that has the class counts than one that has it not.
    """

    def __init__(self, weights: Tensor | None, smoothing: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("weights", weights)
        self.smoothing = smoothing

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """logits, target: (B, classes) → a number."""
        soft = target * (1 - self.smoothing) + self.smoothing / 2
        return nn.functional.binary_cross_entropy_with_logits(logits, soft, pos_weight=self.weights)  # type: ignore[arg-type]


def class_weights(train: Training, images: Images) -> Tensor | None:
    """The weights of the setting, (classes,); None: it is not set.

    `balanced`: n / (classes · n_c) of n training images with n_c of a class, so that all classes count alike and an
    image 1 on average; in a binary loss (n − n_c) / n_c, as many as there are without to one with it.

    Raises:
        DataError: weights of other classes, or a data set that does not tell its labels.
    """
    given = train.class_weights
    if given is None:
        return None
    if isinstance(given, tuple):
        return _named(dict(given), images.classes)
    labels = torch.stack([torch.as_tensor(label) for label in labels_of(images.train)])
    hot = labels if images.many else nn.functional.one_hot(labels.long(), len(images.classes))
    counts = hot.sum(0).clamp(min=1)  # a class without an image has no part in the loss
    if images.many or train.loss == "bce":
        return (len(labels) - counts).clamp(min=1) / counts
    return len(labels) / (len(images.classes) * counts)


def _named(weights: dict[str, float], classes: tuple[str, ...]) -> Tensor:
    unknown, missing = (
        [a for a in one if a not in other] for one, other in ((weights, classes), (classes, weights))
    )
    if unknown:
        near = nearest_hint(unknown[0], classes)
        raise DataError(f"class_weights: the images have no class {listed(unknown, 5)}{near}")
    if missing:
        raise DataError(f"class_weights: no weight of {listed(missing, 5)}")
    return torch.tensor([weights[name] for name in classes])
