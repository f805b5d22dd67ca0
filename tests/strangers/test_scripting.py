"""TorchScript of networks with blocks inside: compiled as the bare ones are, with the same numbers."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn

import attninject as ai

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning"),
]


class Unit(nn.Module):
    """A convolution and a norm, by a forward whose arguments have types that TorchScript must know."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor, mask: Tensor | None = None, times: int = 2, quiet: bool = False) -> Tensor:
        """x: (B, 8, H, W) → the same shape."""
        y = self.norm(self.conv(x))
        if mask is not None:
            y = y * mask
        return y if quiet else y * times


class Net(nn.Module):
    """Two units in a chain, the second in a Sequential beside an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rest = Unit(), nn.Sequential(Unit(), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 8, H, W) → the same shape."""
        return self.rest(self.first(x) + x)


class Grown(nn.ModuleDict):
    """A container whose forward goes over its own children."""

    def __init__(self) -> None:
        super().__init__({"0": nn.Conv2d(8, 8, 1), "1": nn.Conv2d(8, 8, 1)})

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 8, H, W) → the same shape."""
        for layer in self.values():
            x = layer(x)
        return x


def awake(model: nn.Module) -> nn.Module:
    """With random weights where injection zeroed them, so that a block that did not run would show."""
    torch.manual_seed(0)
    for block in ai.injected(model).values():
        for p in block.parameters():
            nn.init.normal_(p, std=0.5)
    return model


def agrees(model: nn.Module, x: Tensor) -> None:
    """The compiled network computes what the network does, in both modes, and the blocks stay listed."""
    scripted = torch.jit.script(awake(model))
    for mode in (False, True):
        model.train(mode), scripted.train(mode)
        with torch.no_grad():
            torch.testing.assert_close(scripted(x), model(x))
    assert ai.injected(model)


@pytest.mark.parametrize("where", [
    {"after": "first.conv"}, {"after": "first"}, {"before": "first"}, {"after": "rest"}, {"before": "rest"},
    {"after": "rest.0"},
], ids=str)  # fmt: skip
def test_every_way_in_is_scripted(where):
    """Within a forward, around a module and around a Sequential, which hides the block from its iteration."""
    x = torch.randn(2, 8, 6, 6)
    agrees(ai.inject(Net(), block="cbam", example_inputs=x, **where), x)


@pytest.mark.parametrize("place", ["residual_branch", "stage_end"])
def test_scripted_resnet(place):
    """torch.jit.script of torchvision's resnet18 with blocks, as without."""
    x = torch.randn(2, 3, 32, 32)
    agrees(
        ai.inject(torchvision.models.resnet18(num_classes=3), block="se", place=place, example_inputs=x), x
    )


def test_scripted_transformer():
    """Blocks on tokens with a grid are given the map and give tokens back, at another aspect ratio's size too."""
    make = torchvision.models.VisionTransformer
    x = torch.randn(2, 3, 32, 32)
    model = make(32, 8, 1, 2, 16, 32, num_classes=3)
    agrees(ai.inject(model, block="cbam", place="block_end", example_inputs=x), x)


def test_what_cannot_be_scripted_is_said():
    """A container whose forward goes over its children would run the block as one of them: refused by name."""
    x = torch.randn(2, 8, 6, 6)
    model = ai.inject(nn.Sequential(nn.Conv2d(8, 8, 1), Grown()), block="se", after="1", example_inputs=x)
    with pytest.raises(RuntimeError, match=r"Grown: its forward goes over its own children"):
        torch.jit.script(model)


def test_a_changed_network_is_scripted_as_it_is():
    """A forward assigned since is named in the refusal, and after `eject` the bare network compiles again."""
    x = torch.randn(2, 8, 6, 6)
    model = ai.inject(Net(), block="se", after="first", example_inputs=x)
    model.first.forward = lambda x: x * 2
    with pytest.raises(RuntimeError, match="a forward was assigned to this instance"):
        torch.jit.script(model)
    del model.first.forward
    ai.eject(model)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))
