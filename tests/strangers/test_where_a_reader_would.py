"""Places where a reader of the net would put them: rows with a bridge, steps up, gates between maps, tails that pool."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from small import calls_of, se
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock

import attninject as ai
from attninject.errors import NoSuchPlaceError

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def sites(net: nn.Module, place: str, x: Tensor = X) -> list[str]:
    """Paths of a place's sites, once the block went in without changing the function."""
    found = ai.plan(net.eval(), **se(place=place), example_inputs=x)
    ai.eject(ai.inject(net, found, verify=True))
    return [s.path for s in found.sites]


def conv(given: int, out: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, norm, activation."""
    return nn.Sequential(nn.Conv2d(given, out, kernel, stride, kernel // 2), nn.BatchNorm2d(out), nn.ReLU())


class Encoder(nn.Module):
    """Residual units at three resolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8, 3, 2)
        self.down = nn.ModuleList(conv(8, 8, 3, 2) for _ in range(3))
        self.units = nn.ModuleList(BasicBlock(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps, x = [], self.stem(x)
        for down, unit in zip(self.down, self.units, strict=True):
            maps.append(x := unit(down(x)))
        return maps


ENDS = [f"encoder.units.{n}" for n in range(3)]
BRANCHES = [f"{end}.bn2" for end in ENDS]

# --- an attention layer in the row of the units ---------------------------------------------------


class Half(nn.Module):
    """A unit of a detector's row: half of the channels go through a part that comes once in the net, or twice."""

    def __init__(self, part: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.part, self.join = part(), conv(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return self.join(torch.cat([a, self.part(b)], 1))


class Mixer(BasicBlock):
    """What is at the bottom alone."""


class Other(Half):
    """A row's last layer, of a class of its own."""


class Row(nn.Module):
    """Layers in one row, of which each is given what its number says; the way up begins behind the last unit."""

    def __init__(self) -> None:
        super().__init__()
        unit = [Half(lambda: BasicBlock(4, 4)) for _ in range(4)]
        self.model = nn.Sequential(
            conv(3, 8, 3, 2), conv(8, 8, 3, 2), unit[0], conv(8, 8, 3, 2), unit[1], conv(8, 8, 3, 2), unit[2],
            Other(lambda: Mixer(4, 4)), nn.Upsample(scale_factor=2), conv(16, 8, 1), unit[3],
        )  # fmt: skip
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        for n, layer in enumerate(self.model):
            kept.append(x := layer(torch.cat([x, kept[4]], 1) if n == 9 else x))
        return self.head(x)


def test_what_stands_in_the_row_of_the_units_is_no_bridge() -> None:
    """Though its part is of a class of its own: the row's numbers go on through it."""
    assert sites(Row(), "stage_end") == ["model.2", "model.4", "model.7"]


# --- the steps of a decoder -------------------------------------------------------------------------


class Step(nn.Module):
    """Narrow, double the size, widen; then the encoder's map is added."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(conv(8, 4, 1), nn.ConvTranspose2d(4, 4, 2, 2), nn.ReLU(), conv(4, 8, 1))

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        x = self.block(x)
        return x if skip is None else x + skip


class Cut(nn.Module):
    """The transposed convolution leaves a border out, which resizing puts on."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.join = nn.ConvTranspose2d(8, 8, 3, 2, 1), conv(16, 8)

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        y = self.up(x)
        if skip is None:
            return F.relu(F.interpolate(y, scale_factor=2))
        return self.join(torch.cat([F.interpolate(y, skip.shape[2:]), skip], 1))


class UNet(nn.Module):
    """An encoder and three steps up."""

    def __init__(self, step: type) -> None:
        super().__init__()
        self.encoder, self.head = Encoder(), nn.Conv2d(8, 2, 1)
        self.steps = nn.ModuleList(step() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        first, second, x = self.encoder(x)
        return self.head(self.steps[1](self.steps[0](x, second), first))


@pytest.mark.parametrize("step", [Step, Cut])
def test_a_decoder_ends_with_its_steps(step: type) -> None:
    """Not within the next one, which begins at the same resolution, nor before a border is put on."""
    assert sites(UNet(step), "decoder_end") == ["steps.0", "steps.1"]
    assert sites(UNet(step), "stage_end") == ENDS


class Sides(UNet):
    """A pyramid whose maps go up side by side: the second is none of what the first goes through."""

    def __init__(self) -> None:
        super().__init__(Step)
        double = nn.Upsample(scale_factor=2)
        self.lateral = nn.Conv2d(8, 8, 1)
        self.sides = nn.ModuleList(
            [nn.Sequential(conv(8, 8), double, conv(8, 8), double), nn.Sequential(conv(8, 8), double)]
        )

    def forward(self, x: Tensor) -> Tensor:
        _, second, x = self.encoder(x)
        finer = F.interpolate(x, scale_factor=2) + self.lateral(second)
        return self.head((self.sides[0](x) + self.sides[1](finer)).relu())


def test_what_goes_up_beside_another_way_begins_no_step_of_it() -> None:
    """The last layer at the resolution is that of the second way."""
    assert sites(Sides(), "decoder_end")[0] == "sides.1.0"


# --- what enters the first unit ---------------------------------------------------------------------


class Plain(nn.Module):
    """An encoder of single layers; only its decoder has units."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(conv(3 if n == 0 else 8, 8) for n in range(3))
        self.bottom = nn.Sequential(conv(8, 8), conv(8, 8))
        self.up = nn.ModuleList(Double() for _ in range(3))
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for layer in self.down:
            kept.append(layer(x))
            x = F.max_pool2d(kept[-1], 2)
        x = self.bottom(x)
        for layer in self.up:
            x = layer(F.interpolate(x, scale_factor=2), kept.pop())
        return self.head(x)


class Double(nn.Module):
    """Two convolutions over two maps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(16, 8), conv(8, 8)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.second(self.first(torch.cat([x, skip], 1)))


def test_an_encoder_without_units_has_no_stem() -> None:
    """What enters the first unit of the decoder is the bottom of the net."""
    with pytest.raises(NoSuchPlaceError, match=r"no place 'stem_end'; it has .*decoder_end"):
        ai.plan(Plain().eval(), **se(place="stem_end"), example_inputs=X)


class Sums(nn.Module):
    """The stem ends in a batch norm that several units read, in a forward that no graph is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, 2, padding=1), nn.BatchNorm2d(8)
        self.units = nn.ModuleList(BasicBlock(8, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = x - x.mean()
        x = self.norm(self.conv(x).relu())
        y = self.units[0](x)
        return self.units[1](x + y)


def test_a_stem_that_no_block_can_end_ends_before_the_unit() -> None:
    """A norm in the net's own forward carries none."""
    assert sites(Sums(), "stem_end") == ["units.0"]
    found = ai.plan(Sums().eval(), **se(place="stem_end"), example_inputs=X)
    assert [s.position for s in found.sites] == ["before"]


# --- sums that are no residual adds -----------------------------------------------------------------


class Pyramid(nn.Module):
    """An upsampled map, and the map of a finer stage, which it gates."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate = (
            conv(8, 8),
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Sigmoid()),
        )

    def forward(self, fine: Tensor, low: Tensor) -> Tensor:
        return F.interpolate(low, fine.shape[2:]) + self.conv(fine) * self.gate(low)


class Reverse(nn.Module):
    """What a coarse map does not show yet is looked for in a finer stage's, and added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = conv(8, 8), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, fine: Tensor, low: Tensor) -> Tensor:
        low = F.interpolate(low, fine.shape[2:])
        return low + self.last(self.first((1 - torch.sigmoid(low)).expand(-1, 8, -1, -1) * fine))


@pytest.mark.parametrize("step", [Pyramid, Reverse])
def test_a_map_that_is_only_gated_by_the_shortcut_is_no_branch(step: type) -> None:
    """The sum fuses two stages; branches that are gated by themselves stay."""

    class Net(UNet):
        def forward(self, x: Tensor) -> Tensor:
            first, second, x = self.encoder(x)
            return self.head(self.steps[1](first, self.steps[0](second, x)))

    assert sites(Net(step), "residual_branch") == BRANCHES


class Distance(nn.Module):
    """What the stages of two images differ by, each pooled to a number, added up."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.lines = Encoder(), nn.ModuleList(nn.Conv2d(8, 1, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        pairs = zip(self.lines, self.encoder(x), self.encoder(x.flip(3)), strict=True)
        return sum(line((a - b) ** 2).mean((2, 3), keepdim=True) for line, a, b in pairs)


def test_a_sum_of_pooled_maps_is_no_residual_add() -> None:
    """The first stage's number is no shortcut past the second."""
    assert sites(Distance(), "residual_branch") == BRANCHES


class Streams(nn.Module):
    """Two streams, of which the first has a shortcut, projected where it is strided."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.own, self.across, self.second = (nn.Conv2d(8, 8, 3, stride, 1) for _ in range(3))
        self.shortcut = nn.Conv2d(8, 8, 1, stride) if stride > 1 else nn.Sequential()
        self.ends = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()) for _ in range(2))

    def forward(self, maps: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        a, b = maps
        return self.ends[0](self.own(a) + self.across(b) + self.shortcut(a)), self.ends[1](self.second(b))


class TwoStreams(nn.Module):
    """Four such units, of which the third goes down."""

    def __init__(self) -> None:
        super().__init__()
        self.pre = nn.ModuleList(conv(3, 8) for _ in range(2))
        self.units = nn.Sequential(Streams(), Streams(), Streams(2), Streams())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.units((self.pre[0](x), self.pre[1](x))), 1)


def test_a_projected_shortcut_beside_a_branch_of_two_streams() -> None:
    """The second stream was there before the unit, and the branch is its own all the same."""
    assert sites(TwoStreams(), "residual_branch") == [f"units.{n}::add" for n in range(4)]


# --- the end of a classifier --------------------------------------------------------------------------


class Shared(nn.Module):
    """A layer with the activation that all layers of its class share."""

    act = nn.SiLU()

    def __init__(self, given: int, out: int) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(given, out, 3, padding=1), self.act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))

    def forward_fused(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))


class Classifier(nn.Module):
    """Units, and a last layer before the pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.units = Shared(3, 8), nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8))
        self.last, self.head = Shared(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.units(self.stem(x))).mean((2, 3)))


def test_a_head_is_given_what_the_module_around_a_shared_activation_gives() -> None:
    """The activation itself carries no block."""
    assert sites(Classifier(), "head_input") == ["last"]


class Encoding(nn.Module):
    """A wave for each position of a map."""

    def forward(self, x: Tensor) -> Tensor:
        wave = torch.arange(x.shape[2], dtype=x.dtype).sin()
        return wave[None, None, :, None].expand(len(x), 8, -1, x.shape[3]).clone()


class Detection(nn.Module):
    """Units, a projection, and positions that are added to its map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.units = conv(3, 8, 3, 2), nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8))
        self.project, self.positions, self.head = nn.Conv2d(8, 8, 1), Encoding(), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(self.units(self.stem(x)))
        return self.head((x + self.positions(x)).mean((2, 3)))


def test_encoded_positions_are_no_input_of_a_head() -> None:
    """They are made of no map, and what is made of the last stage goes on beside them."""
    assert sites(Detection(), "head_input") == ["project"]


# --- one module for several parts of an image -------------------------------------------------------


class Level(nn.Module):
    """A unit, and a second input that is added behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.units, self.beside = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8)), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.beside(x)
        return self.units(x) + y, y


class Patches(nn.Module):
    """Each half of an image goes through one encoder, in a loop that no graph is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.level, self.head = conv(3, 8, 3, 2), Level(), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        halves = [self.level(half) for half in self.stem(x).chunk(2, 3)]
        return self.head(torch.cat([a - b for a, b in halves], 3))


def test_calls_side_by_side_are_one_site() -> None:
    """The block is inside what is called for each half: the calls cannot be told apart outside."""
    assert sites(Patches(), "stage_end") == sites(Patches(), "block_end") == ["level::add"]
    net = ai.inject(Patches().eval(), **se(place="stage_end"), example_inputs=X)
    assert calls_of(net, X) == {"level.se": 2}
