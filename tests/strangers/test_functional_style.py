"""Networks as tutorials write them: layers in the constructor, activations and pools as functions in one forward."""

from __future__ import annotations

import copy

import pytest
import torch
from small import calls_of, se, stir
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

import attninject as ai


class Classic(nn.Module):
    """Activations as functions behind the norms, pools behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        return self.fc(x.mean((2, 3)))


class Pooled(Classic):
    """The pool stands before the activation."""

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        return self.fc(x.mean((2, 3)))


class Layer(nn.Module):
    """A convolution whose activation is a function at its end."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, 2, 1)

    def forward(self, x):
        return F.relu(self.conv(x))


class Critic(nn.Module):
    """Spectral norms and leaky activations, as a discriminator has them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = spectral_norm(nn.Conv2d(3, 8, 3, 2, 1)), spectral_norm(nn.Conv2d(8, 16, 3, 2, 1))

    def forward(self, x):
        x = F.leaky_relu(self.b(F.leaky_relu(self.a(x), 0.1)), 0.1)
        return x.mean((1, 2, 3))


class Rescaled(Classic):
    """Gives a map that is divided by its norm beside what goes on, as SSD does."""

    def forward(self, x):
        x = F.relu(self.conv1(x))
        return F.normalize(x), F.relu(self.conv2(F.max_pool2d(x, 2))).mean((2, 3))


class Decides(nn.Module):
    """Asks for values of what it is given."""

    def forward(self, given):
        return given[1] if bool((given[0] > 0).all()) else given[0].mean((2, 3))


class Several(Classic):
    """A part of the forward has a name of its own, by which callers may pass the rest."""

    def forward_features(self, x):
        return F.relu(self.bn1(self.conv1(x)))

    def forward(self, x):
        return self.fc(F.relu(self.conv2(self.forward_features(x))).mean((2, 3)))


@pytest.mark.parametrize(
    ("net", "where", "sites"),
    [
        (Classic, {"place": "stage_end"}, ["::relu", "::relu_1"]),
        (Classic, {"place": "head_input"}, ["::relu_1"]),
        (Classic, {"after": "bn*"}, ["bn1", "bn2"]),
        (Pooled, {"place": "stage_end"}, ["::relu", "::relu_1"]),
        (lambda: nn.Sequential(Layer(3, 8), Layer(8, 16)), {"place": "stage_end"}, ["0", "1"]),
        (Critic, {"place": "stage_end"}, ["::leaky_relu", "::leaky_relu_1"]),
        (Critic, {"after": "a"}, ["a"]),
    ],
)
def test_functions_in_a_forward_are_seen_as_modules_are(net, where: dict, sites: list[str]) -> None:
    """A stage ends with them, and a norm or a parametrized layer that carries nothing has its block in the forward."""
    x, bare = torch.randn(2, 3, 16, 16), net()
    twin = copy.deepcopy(bare)
    plan = ai.plan(twin, **se(**where), example_inputs=x)
    assert [site.path for site in plan.sites] == sites
    ai.inject(twin, plan)
    with torch.no_grad():
        for mode in (True, False):
            assert torch.equal(twin.train(mode)(x), bare.train(mode)(x))
        assert set(calls_of(twin, x).values()) == {1}
        stir(twin)
        assert not torch.equal(twin(x), bare(x))


def test_a_forward_that_others_enter_half_way_takes_no_block_of_a_norm() -> None:
    """There a caller of the part would miss it, or meet it alone."""
    with pytest.raises(ai.errors.CannotRewriteError, match="name the module in front of it, conv1"):
        ai.plan(Several(), **se(after="bn1"), example_inputs=torch.zeros(1, 3, 16, 16))


class Heads(nn.Module):
    """One trunk, and a head of convolutions for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
        self.heads = nn.ModuleDict(
            {name: nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1)) for name in "ab"}
        )

    def forward(self, x):
        x = self.trunk(x)
        return {name: head(x) for name, head in self.heads.items()}


class Denoiser(nn.Module):
    """Keeps the resolution: its last convolution makes the result."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.tail = (
            nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()),
            nn.Conv2d(8, 3, 3, padding=1),
        )

    def forward(self, x):
        return x - self.tail(self.body(x))


def test_a_norm_of_a_map_is_no_activation() -> None:
    """Also where a run that stopped early does not tell what the net gives."""
    model = nn.Sequential(Rescaled())
    model.append(Decides())
    plan = ai.plan(model, **se(place="stage_end"), example_inputs=torch.randn(2, 3, 16, 16))
    assert [site.path for site in plan.sites] == ["0::relu", "0::relu_1"]


@pytest.mark.parametrize(("net", "site"), [(Heads, "trunk.1"), (Denoiser, "body.1")])
@pytest.mark.parametrize("place", ["stage_end", "head_input"])
def test_no_stage_ends_in_a_head(net: type, site: str, place: str) -> None:
    """It was in the last head of several, or behind the layer that makes the net's result."""
    plan = ai.plan(net(), **se(place=place), example_inputs=torch.randn(2, 3, 16, 16))
    assert [s.path for s in plan.sites] == [site]
