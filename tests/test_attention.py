"""Attention maps: what the blocks apply on an input, and a model that nobody notices has been looked at."""

from __future__ import annotations

import copy

import pytest
import torch
from small import Calls, images
from torch import Tensor, nn

import attninject as ai


class Unit(nn.Module):
    """A residual unit whose convolution may run several times."""

    def __init__(self, channels: int, runs: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)
        self.bn = nn.BatchNorm2d(channels)
        self.drop = nn.Dropout(0.5)
        self.runs = runs

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for _ in range(self.runs):
            y = self.conv(y)
        return x + self.drop(self.bn(y))


def net(runs: int = 1) -> nn.Module:
    """Two units, statistics and weights random, in train mode."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), Unit(8, runs), Unit(8), nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())
    )


def injected(block: str = "cbam", **args: object) -> nn.Module:
    model = ai.inject(net(), block=block, after="[12].bn", args=args, example_inputs=images(channels=3))
    ai.inject(model, block="se", after="3", example_inputs=images(channels=3))
    with torch.no_grad():
        for one in ai.injected(model).values():
            for p in one.parameters():
                p.normal_(0, 0.5)
    return model


def test_maps_are_what_the_blocks_apply():
    """Under the names of `injected`, in their order: with them the output is made again from the inputs."""
    model = injected().eval()
    given: dict[str, Tensor] = {}
    taken: dict[str, Tensor] = {}

    def hook(name):
        def keep(_, args, out):
            given[name], taken[name] = args[0], out

        return keep

    handles = [block.register_forward_hook(hook(name)) for name, block in ai.injected(model).items()]
    model(images())
    for handle in handles:
        handle.remove()
    maps = ai.attention_maps(model, images())
    assert list(maps) == list(ai.injected(model)) == ["1.cbam", "2.cbam", "3.1.se"]
    for name in ("1.cbam", "2.cbam"):
        channel, spatial = maps[name]["channel"], maps[name]["spatial"]
        assert (channel.shape, spatial.shape) == ((2, 8, 1, 1), (2, 1, 16, 16))
        torch.testing.assert_close(given[name] * channel * spatial, taken[name])
    torch.testing.assert_close(given["3.1.se"] * maps["3.1.se"]["gate"], taken["3.1.se"])
    assert not any(t.requires_grad for entry in maps.values() for t in entry.values())


def test_the_model_is_as_it_was():
    """Modes (a norm held in eval too), statistics, hooks and random numbers are untouched; blocks ran once."""
    model = injected().train()
    model[1].bn.eval()
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    with Calls(model) as calls:
        first = ai.attention_maps(model, images())
    assert torch.equal(torch.rand(1), expected)
    assert set(calls.counts.values()) == {1}
    assert [m.training for m in model.modules()] == modes
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)
    assert not any(m._forward_pre_hooks for m in model.modules())
    second = ai.attention_maps(model, images())  # dropout is off
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_an_error_in_the_run_leaves_nothing_behind():
    """Wrong inputs raise what the model raises; modes and hooks are put back."""
    model = injected().train()
    with pytest.raises(RuntimeError):
        ai.attention_maps(model, images(channels=5))
    assert all(m.training for m in model.modules())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_through_wrappers_and_compiled_blocks():
    """DataParallel, torch.compile and compile_blocks do not show in names or numbers, and stay in force."""
    model = injected().eval()
    expected = ai.attention_maps(model, images())
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    ai.compile_blocks(model, backend=backend)
    for wrapped in (model, nn.DataParallel(model), torch.compile(model, backend=backend)):
        torch.testing.assert_close(ai.attention_maps(wrapped, images()), expected)
    assert graphs == []
    with torch.no_grad():
        model(images())
    assert graphs != []


def test_a_block_that_runs_twice():
    """A carrier that runs twice gives a second set of maps under numbered names."""
    model = ai.inject(net(runs=2), block="se", after="1.conv", call="all", example_inputs=images())
    names = list(ai.injected(model))
    maps = ai.attention_maps(model, images())
    assert [sorted(maps[name]) for name in names] == [["gate"]] * 2  # two sites, a block each
    shared = ai.inject(
        nn.Sequential(net()[0], Twice(Unit(8))), block="se", after="1.unit.bn", example_inputs=images()
    )
    (entry,) = ai.attention_maps(shared, images()).values()
    assert sorted(entry) == ["gate", "gate_2"]


class Scaled(nn.Module):
    """A class of somebody's own that cannot say what it attends to."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Twice(nn.Module):
    """Runs its unit twice."""

    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, x: Tensor) -> Tensor:
        return self.unit(self.unit(x))


def test_empty_entries():
    """Disabled blocks and classes without `attention` have an empty entry; a clean model has none at all."""
    model = injected().eval()
    with ai.disabled(model):
        assert ai.attention_maps(model, images()) == {"1.cbam": {}, "2.cbam": {}, "3.1.se": {}}
    for init in ("paper", "blend"):
        foreign = ai.inject(net(), block=Scaled, after="1.bn", init=init, example_inputs=images())
        assert ai.attention_maps(foreign, images()) == {"1.scaled": {}}
    assert ai.attention_maps(net(), images()) == {}


def test_inputs_by_position_or_name():
    """A tuple holds positional arguments, a dict keywords."""
    model = injected().eval()
    expected = ai.attention_maps(model, images())
    torch.testing.assert_close(ai.attention_maps(model, (images(),)), expected)
    torch.testing.assert_close(ai.attention_maps(model, {"input": images()}), expected)


def test_fresh_gates_are_one():
    """On a fresh model every multiplying gate is exactly 1."""
    model = ai.inject(net(), block="se", after="[12].bn", example_inputs=images())
    assert all(torch.all(entry["gate"] == 1) for entry in ai.attention_maps(model, images()).values())
