"""Blocks of one's own, tried at plan time: what is accepted in place of a name, and what is refused in words."""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from small import Net, images
from torch import nn

import attninject as ai
from attninject import errors
from attninject.blocks import registry

SITE: dict[str, Any] = {"after": "units.*.norm", "example_inputs": images()}


class Mixes(nn.Module):
    """A convolution that keeps the shape."""

    def __init__(self, channels: int, kernel: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class Strides(Mixes):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)[..., ::2]


class Broadcasts(Mixes):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3), keepdim=True)


class TakesTwo(Mixes):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y


class GivesTwo(Mixes):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x


class Widens(Mixes):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.double()


class Raises(Mixes):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("not this map")


class Unbuilt(Mixes):
    def __init__(self, channels: int) -> None:
        raise ValueError(f"no {channels} today")


class Decides(Mixes):
    """Asks for a value, which meta tensors do not have."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) if x.sum().item() > 0 else -self.conv(x)


def wide(channels: int) -> nn.Module:
    """A factory."""
    return Mixes(channels, kernel=3)


def se(channels: int) -> nn.Module:
    """A factory of a name that is another block's."""
    return Mixes(channels)


@pytest.fixture(autouse=True)
def _own_registrations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test starts with no third-party block and leaves none."""
    monkeypatch.setattr(registry, "_REGISTERED", {})


@pytest.mark.parametrize("init", ["blend", "paper"])
@pytest.mark.parametrize(
    ("block", "words"),
    [
        (Strides, "gives (1, 32, 16, 8) for (1, 32, 16, 16); a block keeps the shape"),
        (Broadcasts, "gives (1, 32, 1, 1) for"),
        (TakesTwo, "; a block is called with one tensor"),
        (GivesTwo, "gives a tuple; a block gives one tensor"),
        (Widens, "gives torch.float64 for torch.float32"),
        (Raises, "fails on a tensor (1, 32, 16, 16): ValueError: not this map"),
        (Unbuilt, "cannot be built for 32 channels: ValueError: no 32 today"),
        (lambda channels: channels, "made a int, no torch.nn.Module"),
    ],
)
def test_a_class_that_is_no_block_is_refused_at_plan_time(block: Any, init: Any, words: str) -> None:
    """Under every init the plan names the site, what the class does there, and what a block does."""
    with pytest.raises(errors.BlockError) as caught:
        ai.plan(Net(), block=block, init=init, name="mine", **SITE)
    assert "at units.0.norm: " in str(caught.value)
    assert words in str(caught.value)


def test_a_class_that_asks_for_values_is_tried_for_real() -> None:
    """What cannot run on meta tensors runs on numbers, and its cost is known all the same."""
    plan = ai.plan(Net(), block=Decides, init="blend", **SITE)
    assert [site.macs for site in plan.sites] == [32 * 32 * 16 * 16] * 2


@pytest.mark.parametrize(
    ("block", "parameters", "name"),
    [
        (wide, 32 * 32 * 9 + 32, "wide"),
        (functools.partial(Mixes, kernel=3), 32 * 32 * 9 + 32, "mixes"),
        (functools.partial(wide), 32 * 32 * 9 + 32, "wide"),
        (functools.partial(registry.get("se").cls, reduction=8), 2 * 32 * 4 + 4 + 32, "se"),
        (Mixes(32), 32 * 32 + 32, "mixes"),
    ],
)
def test_what_makes_a_block_serves_as_one(block: Any, parameters: int, name: str) -> None:
    """A function, a partial and an instance: each site has a block of its own, copied and pickled with the model."""
    model = Net()
    before = model(images())
    ai.inject(model, block=block, init="blend", **SITE)
    first, second = ai.injected(model).values()
    assert list(ai.injected(model)) == [f"units.0.{name}", f"units.1.{name}"]
    assert sum(p.numel() for p in first.parameters()) == parameters + 1
    assert not {*map(id, first.modules())} & {id(block), *map(id, second.modules())}
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images()), before)
        assert not ai.injected(ai.eject(other))


def test_a_partial_of_a_class_is_the_class_with_arguments() -> None:
    """So it can be written down and read again; `args` given beside it win."""
    block = functools.partial(registry.get("se").cls, reduction=8, bias=False)
    plan = ai.plan(Net(), block=block, args={"reduction": 4}, **SITE)
    assert dict(plan.sites[0].args) == {"reduction": 4, "bias": False}
    assert plan.recipe.to_dict()["rules"][0]["args"] == {"reduction": 4, "bias": False}


def test_instances_are_copied_as_they_are() -> None:
    """Their weights come along, and the one that was given stays apart."""
    block = Mixes(32)
    model = ai.inject(Net(), block=block, init="paper", **SITE)
    for one in ai.injected(model).values():
        assert torch.equal(one.conv.weight, block.conv.weight)
        assert one.conv.weight is not block.conv.weight


def test_a_delta_asks_for_the_factory_by_name(tmp_path: Path) -> None:
    """A function is stored by its name, apart from a block that has the same, and must be registered to load."""
    for factory, name in ((wide, "wide"), (se, "factory/se")):
        base = Net()
        model = ai.inject(copy.deepcopy(base), block=factory, init="paper", **SITE)
        ai.save(model, tmp_path / "run.safetensors")
        with pytest.raises(errors.DeltaError, match="register the missing block first"):
            ai.load(copy.deepcopy(base), tmp_path / "run.safetensors", example_inputs=images())
        ai.register_block(name)(factory)
        loaded = ai.load(copy.deepcopy(base), tmp_path / "run.safetensors", example_inputs=images())
        assert torch.equal(loaded(images()), model(images()))
