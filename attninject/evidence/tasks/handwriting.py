"""Digits on photographs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from attninject.errors import MissingPackageError

from ..samples import Samples
from .photographs import scikit_learns
from .task import Task, crop


def digits_on_photos(seed: int = 0, size: int = 64, train: int = 1000, test: int = 500) -> Task:
    """Handwritten digits in ink of random lightness on random crops of two photographs.

    After the "MNIST with background images" of Larochelle et al. (2007, doi:10.1145/1273496.1273556), with colour,
    and with ink as dark or light as chance has it. The left two thirds of each photograph are for training, the
    right third for test; the digits are divided too (4 to 1).
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingPackageError(
            "digits and photographs come with scikit-learn: pip install attninject[train]"
        ) from error
    digits, photos = load_digits(), list(scikit_learns().values())
    strokes = torch.from_numpy(digits.images).float()[:, None] / 16
    labels = torch.from_numpy(digits.target).long()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    border = len(order) * 4 // 5
    cuts = [p.shape[2] * 2 // 3 for p in photos]
    parts = (
        (order[:border], [p[:, :, :c] for p, c in zip(photos, cuts, strict=True)], train),
        (order[border:], [p[:, :, c:] for p, c in zip(photos, cuts, strict=True)], test),
    )
    made = [_on_photos(strokes[i], labels[i], backs, size, n, generator) for i, backs, n in parts]
    return Task(
        "digits on photographs", made[0], made[1], tuple("0123456789"),
        "scikit-learn's load_digits (UCI, Alpaydin and Kaynak 1998) on its load_sample_images (Flickr, danielbuechele "
        "and vultilion)",
        "CC BY 4.0 (digits), CC BY 2.0 (photographs)",
    )  # fmt: skip


def _on_photos(
    strokes: Tensor,
    labels: Tensor,
    photos: Sequence[Tensor],
    size: int,
    count: int,
    generator: torch.Generator,
) -> Samples:
    """strokes: (m, 1, 8, 8) in [0, 1] → `count` images."""
    chosen = torch.arange(count) % len(labels)
    alpha = F.interpolate(strokes[chosen], size=(size, size), mode="bilinear", align_corners=False)
    ink = torch.rand(count, 1, 1, 1, generator=generator)
    back = torch.stack([crop(photos, size, generator) for _ in range(count)])
    return Samples(back * (1 - alpha) + ink * alpha, labels[chosen])
