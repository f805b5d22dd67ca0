"""Blocks come in the dtype and on the device of the values that they work on."""

from __future__ import annotations

import pytest
import torch
from small import Around, Through, images, se
from torch import nn
from torch.nn import functional as F

import attninject as ai


class FloatNorm(nn.LayerNorm):
    """Keeps its weights in float32 beside a network in half precision, as large models do."""

    def forward(self, x):
        return F.layer_norm(x.float(), self.normalized_shape, self.weight, self.bias, self.eps).to(x.dtype)


class Mixed(nn.Module):
    """Half precision but for its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4).bfloat16()
        self.norm = FloatNorm(8)
        self.head = nn.Linear(8, 4).bfloat16()

    def forward(self, x):
        return self.head(self.norm(self.stem(x).flatten(2).transpose(1, 2)).mean(1))


def test_a_block_behind_a_module_of_another_precision_has_that_of_the_value() -> None:
    """The block hangs on a norm in float32 and works on what that gives, in bfloat16."""
    model, x = Mixed().eval(), images().bfloat16()
    before = model(x)
    ai.inject(model, **se(after="norm"))
    assert {p.dtype for p in model.norm.se.parameters()} == {torch.bfloat16}
    assert torch.equal(model(x), before)


class Looks(nn.Module):
    """Decides by values, so that planning runs it for real."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Around(Through(lambda self, x: self.b(self.a(x))))

    def forward(self, x):
        return x if float(x.sum()) == 12345 else self.body(x)


def test_a_model_moved_between_plan_and_injection_takes_its_blocks_along() -> None:
    """A plan that saw real tensors on the CPU puts the blocks where the model is by then."""
    model = Looks()
    plan = ai.plan(model, **se(after="body.inner.a"))
    ai.inject(model.to("meta"), plan)
    assert {p.device.type for p in ai.injected(model)["body.inner.se"].parameters()} == {"meta"}


def test_blocks_that_come_in_inference_mode_can_be_trained() -> None:
    """The model is of before; its blocks are ordinary tensors, too."""
    model = Around(Through(lambda self, x: self.b(self.a(x))))
    with torch.inference_mode():
        ai.inject(model, **se(after="inner.a"), example_inputs=images())
    model(images()).sum().backward()
    assert any(p.grad is not None for p in ai.injected(model)["inner.se"].parameters())


class Tokens(nn.Module):
    """A map as tokens, and one layer on them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8)

    def forward(self, x):
        return self.mix(self.stem(x).flatten(2).transpose(1, 2))


class Halved(nn.Module):
    """A block of somebody else's: the identity, with a weight."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x):
        return x + self.weight * x


@pytest.mark.parametrize("block", ["cbam", Halved])
def test_a_model_on_the_meta_device_by_default_is_planned(block: object) -> None:
    """`with torch.device("meta")` around it all, as large models are made."""
    with torch.device("meta"):
        model = ai.inject(Tokens(), block=block, after="mix", example_inputs=torch.empty(2, 3, 32, 32))
    (made,) = ai.injected(model).values()
    assert {p.device.type for p in made.parameters()} == {"meta"}
