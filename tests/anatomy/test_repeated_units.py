"""The repeated units and the stages, one small net for each rule."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

from attninject.anatomy.place_map import PlaceMap
from attninject.anatomy.places import spots
from attninject.observe.probe import probe
from attninject.observe.record import Call


class Skip(nn.Module):
    """x + f(x), or f(x) where the shape changes."""

    def __init__(self, inside: nn.Module, skip: bool = True) -> None:
        super().__init__()
        self.f, self.skip = inside, skip

    def forward(self, x):
        return x + self.f(x) if self.skip else self.f(x)


class Wide(Skip):
    """A unit of another class."""


class Layers(nn.Sequential):
    """Two convolutions with an activation between."""

    def __init__(self, channels: int, out: int = 0, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(channels, channels, 3, stride, 1), nn.ReLU(), nn.Conv2d(channels, out or channels, 1)
        )


class Mixer(nn.Sequential):
    """A branch made otherwise."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 1), nn.Sigmoid())


def unit(channels: int = 4) -> Skip:
    return Skip(Layers(channels))


def down(channels: int = 4, out: int = 8) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 2, 2)


def named(**children: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(children))


def places(net: nn.Module, place: str) -> list[str]:
    """Names of the modules after which the place falls; `#i` for an element of several."""
    record, _ = probe(net, torch.zeros(2, 4, 32, 32))
    names = {id(m): name for name, m in net.named_modules()}
    found = []
    for spot in spots(PlaceMap(record), place):
        assert isinstance(spot.event, Call)
        found.append(names[id(spot.event.module)] + ("" if spot.output is None else f"#{spot.output}"))
    return found


class Block(nn.Module):
    """A block of two residual parts, each in a module of its own."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.mixer, self.mlp = Skip(Mixer(channels)), Skip(Layers(channels))

    def forward(self, x):
        return self.mlp(self.mixer(x))


def test_a_block_of_residual_parts_is_the_unit() -> None:
    """Where attention and feed-forward are wrapped each in its own skip, the block around both is one unit."""
    net = named(stem=nn.Conv2d(4, 4, 1), blocks=nn.Sequential(Block(), Block(), Block()))
    assert places(net, "block_end") == ["blocks.0", "blocks.1", "blocks.2"]
    assert len(places(net, "residual_branch")) == 6


def test_a_group_of_equal_blocks_is_no_unit() -> None:
    """A stage, or a group of blocks, holds units and is none, even where it recurs and keeps the shape."""
    groups = nn.Sequential(*(nn.Sequential(unit(), unit()) for _ in range(2)))
    assert places(named(groups=groups), "block_end") == [
        "groups.0.0",
        "groups.0.1",
        "groups.1.0",
        "groups.1.1",
    ]


def test_a_skip_and_the_layer_behind_it_are_one_unit() -> None:
    """A residual part with a pointwise convolution behind it, again and again: the pair is the unit."""
    blocks = (nn.Sequential(unit(), nn.Conv2d(4, 4, 1), nn.GELU()) for _ in range(3))
    assert places(named(blocks=nn.Sequential(*blocks)), "block_end") == ["blocks.0", "blocks.1", "blocks.2"]


def stages(*rows: nn.Module) -> nn.Sequential:
    """Rows of units, each after a strided convolution."""
    parts = [nn.Sequential(down(4 * 2**i, 8 * 2**i), row) for i, row in enumerate(rows)]
    return named(stages=nn.Sequential(*parts))


def test_units_without_a_skip_count_beside_those_with_one() -> None:
    """The first block of a stage changes the shape and has no skip, but is a block as the others are."""
    first = Skip(Layers(4, 8, 2), skip=False)
    assert places(named(blocks=nn.Sequential(first, unit(8), unit(8))), "block_end") == [
        "blocks.0", "blocks.1", "blocks.2"
    ]  # fmt: skip


def test_other_layers_in_the_row_count_when_they_are_more_than_a_projection() -> None:
    """A first block of another class is a unit; strided and pointwise convolutions are not."""

    def row(*first: nn.Module) -> list[str]:
        return places(named(blocks=nn.Sequential(nn.Sequential(*first), unit(), unit())), "block_end")

    units = ["blocks.1", "blocks.2"]
    assert row(Layers(4)) == ["blocks.0", *units]
    assert row(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()) == ["blocks.0", *units]
    assert row(nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU()) == units
    assert row(nn.Conv2d(4, 4, 1), nn.ReLU()) == units


class Down(nn.Module):
    """A transition with a residual part of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.reduction = Wide(Layers(channels)), down(channels, channels)

    def forward(self, x):
        return self.reduction(self.conv(x))


def test_residual_parts_of_a_transition_are_branches_but_no_units() -> None:
    """A block in front of a strided convolution belongs to the transition, not to a stage."""
    net = named(a=nn.Sequential(unit(), unit()), down=Down(4), b=nn.Sequential(unit(), unit()))
    assert places(net, "block_end") == ["a.0", "a.1", "b.0", "b.1"]
    assert places(net, "stage_end") == ["a.1", "b.1"]
    assert "down.conv.f" in places(net, "residual_branch")


def test_stages_end_with_the_last_unit_at_each_resolution() -> None:
    """One end per resolution; the norm or transition behind it comes after."""
    net = stages(nn.Sequential(unit(8), unit(8), nn.BatchNorm2d(8)), nn.Sequential(unit(16)))
    assert places(net, "stage_end") == ["stages.0.1.1", "stages.1.1.0"]
    assert places(net, "before_downsample") == ["stages.0.1.1"]


@pytest.mark.parametrize(("count", "ends"), [(3, [0, 1, 2]), (6, [1, 3, 5]), (8, [2, 4, 7])])
def test_a_net_of_one_resolution_has_thirds(count: int, ends: list[int]) -> None:
    """As for transformers: after each third of the blocks, rounded to the nearest."""
    net = named(blocks=nn.Sequential(*(unit() for _ in range(count))))
    assert places(net, "stage_end") == [f"blocks.{n}" for n in ends]


class CrossStage(nn.Module):
    """Blocks that see half of the channels; both halves are joined behind them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(unit(channels // 2), unit(channels // 2))
        self.join = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        past, through = x.chunk(2, 1)
        return self.join(torch.cat((past, self.blocks(through)), 1))


def test_a_stage_that_joins_what_went_past_its_units_ends_itself() -> None:
    """The last unit holds half of the channels only, so the stage around it is the end, as a dense block is."""
    net = stages(CrossStage(8), CrossStage(16))
    assert places(net, "stage_end") == ["stages.0.1", "stages.1.1"]
    assert places(net, "block_end")[:2] == ["stages.0.1.blocks.0", "stages.0.1.blocks.1"]


class Parallel(nn.Module):
    """Two resolutions side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.high, self.low = unit(4), unit(8)

    def forward(self, pair):
        high, low = pair
        return [self.high(high), self.low(low)]


class TwoStreams(nn.Module):
    """A net of two parallel resolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.rows, self.head = down(), nn.Sequential(Parallel(), Parallel()), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        high, low = self.rows([x, self.down(x)])
        return high.mean((2, 3)) + self.head(low).mean((2, 3))


def test_parallel_resolutions_end_each_for_itself() -> None:
    """Blocks of two resolutions that run by turns give two stage ends, not one at every turn."""
    assert places(TwoStreams(), "stage_end") == ["rows.1.high", "rows.1.low"]


class Inception(nn.Module):
    """Branches side by side, concatenated."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(channels, out // 2, 1), nn.Conv2d(channels, out // 2, 3, padding=1)

    def forward(self, x):
        return torch.cat((self.a(x), self.b(x)), 1)


def test_nets_without_residual_adds_have_the_modules_that_recur() -> None:
    """Inception blocks: those of the class that recurs, and others in their row behind the first."""
    net = named(
        features=nn.Sequential(
            nn.Conv2d(4, 8, 3, 2, 1), Inception(8, 8), Inception(8, 8), nn.MaxPool2d(2), Inception(8, 16)
        )
    )
    assert places(net, "block_end") == ["features.1", "features.2", "features.4"]
    assert places(net, "stage_end") == ["features.2", "features.4"]


def test_plain_nets_have_no_units_and_end_with_activations() -> None:
    """VGG's like: the last activation before each drop; a classifier's layers are no units."""
    net = named(
        features=nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        ),
        classifier=nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)),
    )  # fmt: skip
    assert places(net, "stage_end") == ["features.3", "features.6"]
    with pytest.raises(
        Exception, match="no place 'block_end'; it has before_downsample, head_input, stage_end"
    ):
        places(net, "block_end")
