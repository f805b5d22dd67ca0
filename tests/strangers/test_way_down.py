"""Where a net's way down ends: not on paths past the bottom, not in a neck; and shortcuts padded with zeros."""

from __future__ import annotations

import copy

import pytest
import torch
from small import calls_of, se, stir
from torch import Tensor, nn
from torch.nn import functional as F

import attninject as ai

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Unit(nn.Module):
    """A residual unit of one width."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.norm(self.conv(x)))


class Wide(Unit):
    """A unit of another class."""


class Net(nn.Module):
    """A stem and a head around what the subclass does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, 2, padding=1), nn.Conv2d(8, 2, 1)

    def features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(self.stem(x)))


class Hourglass(Net):
    """At each resolution one unit goes past the bottom, and one down."""

    def __init__(self) -> None:
        super().__init__()
        self.begin, self.bottom = Unit(), Unit()
        self.past, self.down, self.up = (nn.ModuleList(Unit() for _ in range(2)) for _ in range(3))

    def features(self, x: Tensor) -> Tensor:
        return self.around(self.begin(x), 0)

    def around(self, x: Tensor, n: int) -> Tensor:
        if n == 2:
            return self.bottom(x)
        beside = self.past[n](x)
        y = self.up[n](self.around(self.down[n](F.max_pool2d(x, 2)), n + 1))
        return beside + F.interpolate(y, scale_factor=2)


class Neck(Net):
    """Units at one resolution, of which a neck makes three, with units of another class."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(8, 8, 2, 2)
        self.layers = nn.ModuleList(Wide() for _ in range(3))
        self.lower, self.fine = nn.Conv2d(8, 8, 3, 2, padding=1), nn.ConvTranspose2d(8, 8, 2, 2)
        self.fuse = nn.ModuleList(Unit() for _ in range(4))

    def features(self, x: Tensor) -> Tensor:
        a = self.layers[0](self.patches(x))
        b = self.layers[1](a)
        c = self.lower(self.layers[2](b))
        y = F.interpolate(self.fuse[0](c), scale_factor=2) + self.fuse[1](b)
        return F.interpolate(self.fuse[2](y), scale_factor=2) + self.fuse[3](self.fine(a))


class Middle(Net):
    """The way up begins at the lowest resolution: it joins what the way down kept there."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(Unit() for _ in range(2))
        self.middle = Unit()
        self.up = nn.ModuleList([Unit(16), Unit(16)])
        self.less = nn.ModuleList(nn.Conv2d(16, 8, 1) for _ in range(2))

    def features(self, x: Tensor) -> Tensor:
        first = self.down[0](x)
        second = self.down[1](F.max_pool2d(first, 2))
        y = self.less[0](self.up[0](torch.cat([self.middle(second), second], 1)))
        return self.less[1](self.up[1](torch.cat([F.interpolate(y, scale_factor=2), first], 1)))


@pytest.mark.parametrize(
    ("net", "ends"),
    [
        (Hourglass, ["begin", "down.0", "up.1"]),  # which runs before the first step up
        (Neck, ["layers.0", "layers.1", "layers.2"]),
        (Middle, ["down.0", "middle"]),
    ],
)
def test_stage_ends_lie_on_the_way_down(net: type, ends: list[str]) -> None:
    """Where a reader of the net would put them; blocks there run once, and stirred ones change the result."""
    torch.manual_seed(0)
    base = net().eval()
    for norm in (m for m in base.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.running_mean, 0, 0.2)
    made = ai.inject(copy.deepcopy(base), **se(place="stage_end"), example_inputs=X)
    plan = ai.plan(base, **se(place="stage_end"), example_inputs=X)
    assert [site.path for site in plan.sites] == ends
    assert torch.equal(made(X), base(X))
    assert set(calls_of(made, X).values()) == {1}
    stir(made)
    assert not torch.equal(made(X), base(X))
    for site, block in zip(plan.sites, ai.injected(made).values(), strict=True):
        base.get_submodule(site.path).register_forward_hook(lambda m, args, out, b=block: b(out))
    torch.testing.assert_close(made(X), base(X))


# --- a shortcut that is padded with zeros -------------------------------------------------------


class Padded(nn.Module):
    """A residual unit whose shortcut gets zeros for the channels that it lacks: option A of the first ResNets."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, outputs - inputs

    def shortcut(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, 1, self.stride)
        zeros = torch.zeros(x.size(0), self.more, x.size(2), x.size(3))
        if isinstance(x.data, torch.cuda.FloatTensor):
            zeros = zeros.cuda()
        return torch.cat([x.data, zeros], 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y += self.shortcut(x) if self.more else x
        return F.relu(y)


class Small(nn.Module):
    """Three stages."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.units = nn.Sequential(Padded(4, 4, 1), Padded(4, 8, 2), Padded(8, 12, 2))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.units(self.stem(x)).mean((2, 3)))


def test_a_shortcut_padded_with_zeros() -> None:
    """Zeros made on the CPU stop no recorded run half-way: all stages are there, branches end at their batch norms."""
    torch.manual_seed(0)
    base = Small().eval()
    for norm in (m for m in base.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.normal_(norm.running_mean, 0, 0.2)
    ends = ai.plan(base, **se(place="stage_end"), example_inputs=X)
    assert [site.path for site in ends.sites] == ["units.0", "units.1", "units.2"]
    net = ai.inject(copy.deepcopy(base), **se(place="residual_branch"), example_inputs=X)
    assert list(ai.injected(net)) == ["units.0.se", "units.1.se", "units.2.se"]
    for x in (X, X[:1], X[:, :, :24]):
        for training in (True, False):
            assert torch.equal(net.train(training)(x), base.train(training)(x))
    stir(net)
    unit, bare = net.units[1], base.units[1]
    x = base.units[0](base.stem(X))
    y = unit.se(bare.bn2(bare.conv2(F.relu(bare.bn1(bare.conv1(x))))))
    torch.testing.assert_close(unit(x), F.relu(y + bare.shortcut(x)))
