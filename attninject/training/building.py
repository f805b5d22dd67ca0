"""From a model's name to a model with a head for so many classes."""

from __future__ import annotations

from torch import nn

from attninject import models
from attninject.errors import UnknownModelError

from .heads import head_of


def build(name: str, weights: str, classes: int) -> nn.Module:
    """The model with a head for so many classes; where the weights have others, with a new last layer."""
    try:
        return models.build(name, weights, num_classes=classes)
    except UnknownModelError:
        if weights == "none":
            raise
    last = _last_layer(models.build(name, "none"))
    held = models.shapes(weights).get(f"{last}.weight")
    model = models.build(name, weights, **({"num_classes": held[0]} if held else {}))
    if callable(getattr(model, "reset_classifier", None)):
        model.reset_classifier(classes)  # type: ignore[operator]
    else:
        model.set_submodule(last, _with_outputs(model.get_submodule(last), classes))
    return model


def _last_layer(model: nn.Module) -> str:
    """Name of the layer that gives the logits."""
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and f"{name}.".startswith(tuple(f"{h}." for h in head_of(model)))
    ]
    if not found:
        raise UnknownModelError(f"{type(model).__name__} has no layer that gives logits")
    return str(found[-1])


def _with_outputs(layer: nn.Module, classes: int) -> nn.Module:
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, classes, bias=layer.bias is not None)
    assert isinstance(layer, nn.Conv2d)
    return nn.Conv2d(layer.in_channels, classes, layer.kernel_size, bias=layer.bias is not None)  # type: ignore[arg-type]
