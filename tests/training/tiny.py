"""A tiny net and tiny images for the tests of the training loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import small
import torch
from torch import nn
from torch.utils.data import Dataset

import attninject as ai
from attninject.training.callbacks import Lines


class Net(small.Net):
    """Two residual units between a stem and a head behind dropout."""

    def __init__(self, width: int = 8, classes: int = 3, drop: float = 0.2) -> None:
        super().__init__(width, classes)
        self.drop = nn.Dropout(drop)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(super().features(x))


class Shades(Dataset):
    """Noisy images (3, 8, 8) whose class is their brightest channel; noise is drawn anew at every reading."""

    classes = ("red", "green", "blue")

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = torch.randn(3, 8, 8)  # from the global generator, as a random augmentation does
        image[index % 3] += 1
        return image, index % 3


def net(block: str | None = "se", seed: int = 0, **kw: Any) -> nn.Module:
    """The tiny net, with a block behind both norms."""
    torch.manual_seed(seed)
    model = Net(**kw)
    if block is None:
        return model
    args = {"reduction": 4}
    return ai.inject(
        model, block=block, after="units.*.norm", args=args, example_inputs=torch.zeros(2, 3, 8, 8)
    )


DATA = Shades(48), Shades(18)
QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 8, "lr": 1e-2}


def hears(say: Callable[[str], Any]) -> dict[str, Any]:
    """For `finetune`: a callback that hands the lines of the run to a function."""
    return {"callbacks": [Lines(say)]}
