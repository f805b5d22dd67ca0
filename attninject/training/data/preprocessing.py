"""How an image enters the model: its size, its mean, and the transforms of training and of validation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..experiment import Data
from .reading import rgb

DIGITS_SIZE = 32


@dataclass(frozen=True)
class Preprocessing:
    """How images enter the model: size, mean, standard deviation, and how they are resized."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop: float


def preprocessing_of(model: nn.Module | None, data: Data) -> Preprocessing:
    """What timm says of the model, ImageNet's usual values otherwise; `size` overrides."""
    from timm.data import resolve_model_data_config

    found = resolve_model_data_config(model) if model is not None else {}
    size = data.size or (DIGITS_SIZE if data.kind == "digits" else found.get("input_size", (3, 224, 224))[-1])
    return Preprocessing(
        size,
        tuple(found.get("mean", (0.485, 0.456, 0.406))),
        tuple(found.get("std", (0.229, 0.224, 0.225))),
        found.get("interpolation", "bilinear"),
        found.get("crop_pct", 0.875),
    )


class TensorTransform:
    """Of images in memory: enlarge to the model's size and normalise; no augmentation, as flips change digits."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.size = preprocessing.size
        self.mean, self.std = (torch.tensor(v).view(3, 1, 1) for v in (preprocessing.mean, preprocessing.std))

    def __call__(self, image: Tensor) -> Tensor:
        """image: (3, H, W) in [0, 1] → (3, size, size)."""
        big = nn.functional.interpolate(
            image[None], size=(self.size, self.size), mode="bilinear", align_corners=False
        )
        return (big[0] - self.mean) / self.std


def transforms(
    data: Data, preprocessing: Preprocessing
) -> tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]]:
    """For training and for validation: timm's, from the data settings and the model's preprocessing."""
    if data.kind in ("digits", "random"):
        return TensorTransform(preprocessing), TensorTransform(preprocessing)
    from timm.data import create_transform

    shared: dict[str, Any] = {
        "input_size": (3, preprocessing.size, preprocessing.size),
        "interpolation": preprocessing.interpolation,
        "mean": preprocessing.mean,
        "std": preprocessing.std,
    }
    plain = create_transform(**shared, is_training=False, crop_pct=preprocessing.crop)
    if data.augment == "none":
        return _rgb(plain), _rgb(plain)
    augmented = create_transform(
        **shared,
        is_training=True,
        hflip=data.hflip,
        color_jitter=data.color_jitter,
        auto_augment=data.auto_augment,
        re_prob=data.reprob,
    )
    return _rgb(augmented), _rgb(plain)


class _rgb:
    """Grey and transparent images as RGB, then a transform."""

    def __init__(self, then: Any) -> None:
        self.then = then

    def __call__(self, image: Any) -> Tensor:
        """image: of Pillow, or whatever the transform takes."""
        made: Tensor = self.then(rgb(image) if hasattr(image, "convert") else image)
        return made
