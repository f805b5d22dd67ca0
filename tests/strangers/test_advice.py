"""What a message advises: a module without a forward, an operand that is a list."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import attninject as ai
from attninject import errors


class Lightning(nn.Module):
    """As a LightningModule without a forward: the network, its teacher and a loss are children."""

    def __init__(self) -> None:
        super().__init__()
        self.loss, self.small = nn.CrossEntropyLoss(), nn.Conv2d(3, 3, 1)
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))


class Detect(nn.Module):
    """Takes its maps in a list."""

    def forward(self, maps):
        return sum(maps)


class Net(nn.Module):
    """Two convolutions whose maps enter a head in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 1), nn.Sequential(nn.Conv2d(3, 8, 1)), Detect()

    def forward(self, x):
        return self.head([self.first(x), self.second(x)])


def test_a_module_without_a_forward_names_the_network_in_it():
    """And what is advised works: the blocks are in the outer module too."""
    model, x = Lightning(), torch.randn(1, 3, 8, 8)
    with pytest.raises(errors.UnsupportedModelError, match=r"the network that it holds, lightning\.net$"):
        ai.plan(model, block="se", after="0", example_inputs=x)
    ai.inject(model.net, block="se", after="0", example_inputs=x)
    assert [name for name, m in model.named_modules() if name.endswith("se")] == ["net.0.se"]


def test_a_list_as_operand_points_to_what_made_its_tensors():
    """By the outermost names, which take the block."""
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(
        errors.NoTensorError, match=r"operand 0 of head is no tensor; .*`after`.*: first, second$"
    ):
        ai.plan(Net(), block="se", before="head", example_inputs=x)
    assert len(ai.plan(Net(), block="se", after=["first", "second"], example_inputs=x).sites) == 2
