"""Checkpointing that a layer's own class wraps around its forward, switched on when the blocks are already there."""

from __future__ import annotations

import copy
from functools import partial, wraps

import pytest
import torch
from small import Calls, images, se, stir
from torch import nn
from torch.utils.checkpoint import checkpoint

import attninject as ai


class Checkpointing(nn.Module):
    """Every subclass gets a forward that checkpoints itself while training, unless a further subclass does."""

    checkpointing, reentrant = False, False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        forward = cls.forward

        @wraps(forward)
        def wrapped(self, *args, **kwargs):
            outermost = type(self).forward is wrapped
            if self.checkpointing and self.training and torch.is_grad_enabled() and outermost:
                return checkpoint(partial(forward, self, **kwargs), *args, use_reentrant=self.reentrant)
            return forward(self, *args, **kwargs)

        cls.forward = wrapped


class Layer(Checkpointing):
    """A residual unit with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        y = self.conv(self.norm(x).relu())
        return x + nn.functional.dropout(y, 0.2, self.training)


class Net(nn.Module):
    """Three such layers between a stem and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 4)
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def checkpoint(self, on: bool, reentrant: bool = False) -> None:
        """Switch it for all layers, as transformers and its Trainer do."""
        for layer in self.layers:
            layer.checkpointing, layer.reentrant = on, reentrant

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean((2, 3)))


def step(model: nn.Module) -> list[torch.Tensor | None]:
    """The gradients of one step."""
    torch.manual_seed(0)
    model.zero_grad()
    model(images()).square().sum().backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("where", [{"after": "layers.*.conv"}, {"place": "block_end"}])
def test_switched_on_after_injection(where: dict, reentrant: bool) -> None:
    """The same gradients as without, and each block runs once forward and once more for the backward."""
    plain = Net()
    ai.inject(plain, **se(**where), example_inputs=images())
    assert len(ai.injected(plain)) == 3
    stir(plain)
    model = copy.deepcopy(plain.train())
    model.checkpoint(True, reentrant)
    for _ in range(2):
        torch.testing.assert_close(step(model), step(plain), rtol=0, atol=0)
        with Calls(model) as calls:
            step(model)
        assert calls.order == [*ai.injected(model), *reversed(ai.injected(model))]
    assert torch.equal(model.eval()(images()), plain.eval()(images()))
    model.checkpoint(False)
    torch.testing.assert_close(step(model.train()), step(plain.train()))


def test_switched_on_before_injection() -> None:
    """A place inside the layer goes by module then, and is the same function."""
    plain = Net().train()
    model = copy.deepcopy(plain)
    model.checkpoint(True)
    for net in (plain, model):
        ai.inject(net, **se(after="layers.*.conv"), example_inputs=images())
        stir(net)
    torch.testing.assert_close(step(model), step(plain), rtol=0, atol=0)


class ByGradMode(nn.Module):
    """Leaves a layer out where no gradients are wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        y = self.a(x)
        return self.b(y) if torch.is_grad_enabled() else y


def test_a_forward_that_does_something_else_without_gradients_goes_by_module() -> None:
    """Its graph would be that of one of the two modes."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner = nn.Conv2d(3, 8, 1), ByGradMode()

        def forward(self, x):
            return self.inner(self.stem(x))

    model = Model().eval()
    with torch.no_grad():
        without = model(images())
    with_gradients = model(images())
    plan = ai.plan(model, **se(after="inner.a"), example_inputs=images())
    assert (plan.sites[0].mechanism, plan.sites[0].reason) == (
        "module",
        "ByGradMode: its forward depends on the grad mode",
    )
    ai.inject(model, plan)
    assert torch.equal(model(images()), with_gradients)
    with torch.no_grad():
        assert torch.equal(model(images()), without)
