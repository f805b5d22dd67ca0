"""What a model's forward may be called with, when nobody said."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Inputs:
    """What the model's forward is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(example: Any) -> Inputs:
        """From what a user gives: a tensor, a tuple of positional or a dict of keyword arguments."""
        if isinstance(example, Mapping):
            return Inputs((), dict(example))
        if isinstance(example, tuple):
            return Inputs(example)
        return Inputs((example,))


def first_float(module: nn.Module, otherwise: Tensor | None = None) -> Tensor:
    """The first floating-point parameter of a module, whose dtype and device its inputs share; or `otherwise`.

    Without either: an empty tensor of torch's default dtype.
    """
    fallback = torch.empty(0) if otherwise is None else otherwise
    return next((p for p in module.parameters() if p.is_floating_point()), fallback)


def candidates(model: nn.Module, batch: int = 2) -> Iterator[Inputs]:
    """Inputs to try on a model that nobody gave an example for, the likeliest first.

    timm's models say their input size; others get an image, clip, signal or vector that fits the first
    layer with weights, at usual sizes.
    """
    dtype = first_float(model, torch.empty(0, dtype=torch.float32)).dtype
    count, names = _required_arguments(model)
    shapes = itertools.chain(_declared_shapes(model), _guessed_shapes(model))
    for shape in dict.fromkeys(shapes):
        x = torch.empty((batch, *shape), dtype=dtype, device="meta")
        yield Inputs((x,) * count, dict.fromkeys(names, x))


def _required_arguments(model: nn.Module) -> tuple[int, list[str]]:
    """How many arguments a forward needs by position (one at least, if it takes any), and the names of the others."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return 1, []
    needed = [p for p in parameters if p.default is p.empty]
    names = [p.name for p in needed if p.kind is p.KEYWORD_ONLY]
    count = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in needed)
    return count if names else max(1, count), names


def _declared_shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    channels, nd = _first_conv(model) or (3, 2)
    holders = (model, getattr(model, "patch_embed", None))  # perhaps built for another size than declared
    for size in (getattr(h, name, None) for h in holders for name in ("img_size", "image_size")):
        if isinstance(size, int) and not isinstance(size, bool):
            yield (channels, *(size,) * nd)
        elif isinstance(size, (tuple, list)) and len(size) == nd:
            yield (channels, *size)
    if isinstance(config, Mapping) and isinstance(config.get("input_size"), (tuple, list)):
        yield (channels, *config["input_size"][1:])  # built with in_chans, it may take others than declared
        yield tuple(config["input_size"])


def _first_conv(model: nn.Module) -> tuple[int, int] | None:
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            return module.in_channels, len(module.kernel_size)
    return None


def _guessed_shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    conv = _first_conv(model)
    if conv is None:
        first = next((m for m in model.modules() if isinstance(m, nn.Linear)), None)
        if first is not None:
            yield (first.in_features,)
            yield (16, first.in_features)
        conv = (3, 2)
    channels, nd = conv
    if nd == 1:
        yield from ((channels, n) for n in (256, 64, 1024))
    elif nd == 3:
        yield from ((channels, 16, 112, 112), (channels, 16, 224, 224), (channels, 32, 32, 32))
    else:
        yield from ((channels, s, s) for s in (224, 256, 64, 32, 299, 384, 512, 28))
