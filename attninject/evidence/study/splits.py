"""Training, validation and test images of a task, drawn from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from attninject.evidence import tasks
from attninject.evidence.samples import Samples

from .design import BATCH, SIZE, TEST, TRAIN, VALIDATION

Parts = dict[str, Samples]
"""`train`, `val` and `test`."""


def parts_of(task: str, seed: int, mean: Sequence[float], std: Sequence[float]) -> Parts:
    """Normalised images; validation images are from the sources of the training images, test images are not.

    `stamps` has as many photographs as there are: a quarter of those for training is for validation. The number of
    training images is whole batches.
    """
    counts: dict[str, Any] = {} if task == "stamps" else {"train": TRAIN + VALIDATION, "test": TEST}
    made = tasks.TASKS[task](seed=seed, size=SIZE, **counts).normalised(mean, std)
    order = torch.randperm(len(made.train), generator=torch.Generator().manual_seed(seed))
    held = min(VALIDATION, len(order) // 4 if task == "stamps" else VALIDATION)
    use = (len(order) - held) // BATCH * BATCH
    return {
        "train": _some(made.train, order[held : held + use]),
        "val": _some(made.train, order[:held]),
        "test": made.test,
    }


def _some(samples: Samples, at: torch.Tensor) -> Samples:
    return Samples(samples.images[at], samples.labels[at])
