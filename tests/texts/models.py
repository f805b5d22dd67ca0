"""What is said about models that are not open to surgery, or cannot be run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from small import Around, Through, images, se
from torch import nn

import attninject as ai

from .registry import case, cases


def residual(self: Any, x: torch.Tensor) -> torch.Tensor:
    """A small residual block."""
    return x + self.b(torch.relu(self.a(x)))


def small() -> nn.Module:
    """A stem and one residual block, `inner`."""
    torch.manual_seed(0)
    return Around(Through(residual)).eval()


class Fails(nn.Module):
    """Its forward raises."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("no luck today")


class NoForward(nn.Module):
    """A child and nothing that calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Through(residual)


class Wants(NoForward):
    """Takes two keyword arguments of different shapes."""

    def forward(self, *, mask: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        if mask.shape == pixels.shape:
            raise ValueError("a mask has one channel")
        return self.inner(pixels) * mask


def _part(change: Callable[[nn.Module], nn.Module]) -> nn.Module:
    model = small()
    model.inner.a = change(model.inner.a)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "a function": lambda: residual,
    "a number": lambda: 3,
    "compiled": lambda: torch.compile(small(), backend="eager"),
    "compiled inside": lambda: _part(lambda m: torch.compile(m, backend="eager")),  # type: ignore[arg-type, return-value]
    "wrapped": lambda: nn.DataParallel(small()),
    "scripted inside": lambda: _part(torch.jit.script),  # type: ignore[arg-type]
    "a graph module": lambda: torch.fx.symbolic_trace(small()),
    "quantized": lambda: Around(torch.ao.nn.quantized.Conv2d(8, 8, 1)),
    "quantizable": lambda: _part(lambda m: torch.ao.nn.quantized.FloatFunctional()),
    "lazy": lambda: nn.Sequential(nn.LazyConv2d(8, 1)),
    "no forward": NoForward,
    "fails": Fails,
}


def _plan(make: Callable[[], Any], folder: Path) -> Any:
    return ai.plan(make(), **se(after="inner.a"), example_inputs=images())


cases("model", [(name, functools.partial(_plan, make)) for name, make in MODELS.items()])
cases(
    "model",
    [
        ("eject from a number", lambda folder: ai.eject(3)),  # type: ignore[arg-type]
        ("keywords", lambda folder: ai.plan(Wants(), **se(after="inner.a"))),
        ("no root", lambda folder: ai.sites(small(), root="iner", example_inputs=images())),
        ("no root near", lambda folder: ai.sites(small(), root="zzz", example_inputs=images())),
        ("no sites", lambda folder: ai.sites(small(), "iner.a", example_inputs=images())),
        ("a class", lambda folder: ai.plan(nn.Conv2d, **se(after="x"))),  # type: ignore[arg-type]
    ],
)


@case("model: extended by a parametrization")
def _(folder: Path) -> Any:
    model = small()
    model.inner.scale = nn.Parameter(torch.ones(1))
    ai.inject(model, **se(after="inner::add"), example_inputs=images())
    torch.nn.utils.parametrize.register_parametrization(model.inner, "scale", nn.Identity())
    return ai.eject(model)


@case("model: eject what is not there")
def _(folder: Path) -> Any:
    return ai.eject(ai.inject(small(), **se(after="inner.a"), example_inputs=images()), "inner.b.*")


@case("model: eject from a clean model")
def _(folder: Path) -> Any:
    return ai.eject(small(), "inner.se")


@case("model: changed after injection")
def _(folder: Path) -> Any:
    def either(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) if self.on else self.b(x)

    model = Around(Through(either)).eval()
    model.inner.on = True
    ai.inject(model, **se(after="inner.a", pick="all"), example_inputs=images())
    model.inner.on = False
    return type(model(images())).__name__
