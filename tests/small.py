"""Small nets and looks at a model's state that several test files share."""

from __future__ import annotations

import functools
import random
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy
import pytest
import torch
import torch.utils.checkpoint
from torch import nn

import attninject as ai

SILENT_CHECKPOINTS = pytest.mark.skipif(
    not hasattr(torch.utils.checkpoint, "_checkpoint_without_reentrant_generator_impl"),
    reason="this torch's checkpoints make tensors of their own in the forward, which is refused",
)


def older(version: str, other: str) -> bool:
    """Whether 1.0.15 comes before 1.0.31; what stands behind the numbers does not count."""
    one, two = ([int(n) for n in re.findall(r"\d+", v)[:3]] for v in (version, other))
    return one < two


class Around(nn.Module):
    """A model whose root does nothing worth naming: a stem, then the module under test as `inner`."""

    def __init__(self, inner: nn.Module, channels: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 1)
        self.inner = inner

    def forward(self, x):
        return self.inner(self.stem(x))


class Unit(nn.Module):
    """A residual unit."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.norm(self.conv(x)))


class Net(nn.Module):
    """Two residual units between a stem and a head."""

    def __init__(self, width: int = 32, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.units = nn.Sequential(Unit(width), Unit(width))
        self.head = nn.Linear(width, classes)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) → (B, width), what the head reads."""
        return self.units(self.stem(x)).mean((2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))


class ManyTypes(nn.Module):
    """A net whose delta holds several dtypes: float32, bfloat16 in the head, an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 4).to(torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, 3, H, W) → (B, 4)."""
        return self.head(self.norm(self.stem(x)).mean((2, 3)).to(torch.bfloat16))


class Through(nn.Module):
    """An owner with children `a` and `b` whose forward is given as a function of (self, x)."""

    def __init__(self, body: Callable, channels: int = 8, **children: nn.Module) -> None:
        super().__init__()
        self.a = nn.Conv2d(channels, channels, 3, padding=1)
        self.b = nn.Conv2d(channels, channels, 1)
        for name, child in children.items():
            self.add_module(name, child)
        self.body = body

    def describe(self) -> str:
        """A method, whose name no child may take."""
        return "through"

    def forward(self, x):
        return self.body(self, x)


def which(*parts: Any) -> Callable[[str], str]:
    """`msg=` of torch.testing.assert_close: its text behind the name of the one of a loop's cases that failed."""
    return lambda text: f"{' '.join(map(str, parts))}: {text}"


def images(batch: int = 2, size: int = 16, channels: int = 3, seed: int = 0) -> torch.Tensor:
    """Random images."""
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(seed))


def se(**where: Any) -> dict[str, Any]:
    """The fields of a rule: SE with two hidden channels or so."""
    return {"block": "se", "args": {"reduction": 4}, **where}


class Calls:
    """Counts the calls of every injected block while it is entered.

    At their beginning, since checkpointing stops its second run once it has what the backward needs.
    """

    def __init__(self, model: nn.Module) -> None:
        self.blocks = ai.injected(model)
        self.order: list[str] = []

    def __enter__(self) -> Calls:
        self.handles = [
            block.register_forward_pre_hook(lambda *_, name=name: self.order.append(name))
            for name, block in self.blocks.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    @property
    def counts(self) -> dict[str, int]:
        return {name: self.order.count(name) for name in self.blocks}


def calls_of(model: nn.Module, *args: Any, run: Callable | None = None) -> dict[str, int]:
    """How often each block runs in one forward (or in `run`)."""
    with Calls(model) as calls, torch.no_grad():
        (run or model)(*args)
    return calls.counts


def stir(model: nn.Module, seed: int = 5, scale: float = 0.3) -> None:
    """Random values into every injected block, so that it changes what the model computes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in ai.injected(model).values():
            for p in block.parameters():
                p.copy_(torch.empty(p.shape).normal_(0, scale, generator=generator))


def _contents(value: Any) -> Any:
    """Identity of a value, and of what plain containers hold, down to the bottom."""
    if isinstance(value, Mapping):
        return (id(value), type(value), [(k, _contents(v)) for k, v in value.items()])
    if isinstance(value, (list, tuple, set)):
        return (id(value), type(value), [_contents(v) for v in value])
    return value if isinstance(value, (bool, int, float, str, type(None))) else id(value)


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that looking at a model must not change, deeply: compare two of these with ==."""
    tensors = {
        name: (
            id(t),
            t.device,
            t.dtype,
            t.requires_grad,
            t.stride(),
            t.data_ptr(),
            t.detach().numpy().tobytes(),
        )
        for name, t in (*model.named_parameters(), *model.named_buffers())
    }
    grads = {
        n: None if p.grad is None else (id(p.grad), p.grad.numpy().tobytes())
        for n, p in model.named_parameters()
    }
    modules = [(n, id(m), type(m), m.training, _contents(m.__dict__)) for n, m in model.named_modules()]
    generators = (
        torch.get_rng_state().numpy().tobytes(),
        random.getstate(),
        numpy.random.get_state()[1].tobytes(),
        numpy.random.get_state()[2],  # how many of these are used up
    )
    classes = {name: value for name, value in nn.Module.__dict__.items() if callable(value)}
    return {"tensors": tensors, "grads": grads, "modules": modules, "rng": generators, "Module": classes}


@functools.cache
def exports_batch_norm() -> bool:
    """Whether torch and onnxscript together export torch's own batch norm: torch 2.6 does not with a newer onnxscript."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(nn.BatchNorm2d(2).eval(), (torch.ones(1, 2, 3, 3),), dynamo=True, verbose=False)
    except Exception as error:
        if "_native_batch_norm_legit_no_training" not in str(error):
            raise
        return False
    return True


def skip_onnx_of_norms(model: nn.Module) -> None:
    """Skip the test of a model with batch norms where the installed torch and onnxscript export none."""
    if any(isinstance(m, nn.BatchNorm2d) for m in model.modules()) and not exports_batch_norm():
        pytest.skip("this torch and this onnxscript do not export torch's own batch norm")
