"""Strides that were traded for dilation, or left out, still end stages: the same list as of the undilated twin."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock

import attninject as ai
from attninject.anatomy.place_map import PlaceMap
from attninject.observe.probe import probe


def ends(net: nn.Module) -> list[str]:
    """Names of the modules that end a stage."""
    record, _ = probe(net, partial=True)
    names = {id(m): name for name, m in net.named_modules()}
    return [names[id(s.module)] for s in PlaceMap(record).stages]


def built(name: str, **more: object) -> nn.Module:
    """A net of timm without its numbers, where this timm can build it so."""
    try:
        with torch.device("meta"):
            return timm.create_model(name, **more)
    except NotImplementedError:  # timm 1.0.15 asks a tensor for its value
        return timm.create_model(name, **more)


# each for one way to tell: dilations, a first unit that keeps the old one, units at a time, attention, none at all
FEW = (
    "resnet26",
    "mobilenetv2_035",
    "test_convnext",
    "test_resnet",
    "test_byobnet",
    "test_efficientnet",
    "halonet26t",
)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("stride", [8, 16])
def test_a_dilated_nets_stages_are_those_of_its_twin(name: str, stride: int) -> None:
    """A stride that was traded for dilation still ends a stage."""
    assert ends(built(name, output_stride=stride)) == ends(built(name))


def test_a_stage_that_begins_at_the_width_of_the_one_before_begins_there() -> None:
    """Xception-71 widens a unit before its stride: behind dropped strides only dilations tell the two stages apart."""

    def net(stride: int, dilation: int) -> nn.Module:
        row = [unit(4, 8, 1), BasicBlock(8, 8, stride, None if stride == 1 else nn.Conv2d(8, 8, 1, stride))]
        row += [BasicBlock(8, 8) for _ in range(2)]
        for later in row[2:]:
            later.conv1.dilation = later.conv1.padding = (dilation, dilation)
        return nn.Sequential(nn.Conv2d(3, 4, 3, 4, 1), unit(4, 4, 2), *row)

    assert ends(net(1, 2)) == ends(net(2, 1)) == ["2", "5"]


def test_a_last_stage_without_its_stride_is_a_stage() -> None:
    """As re-identification nets have it: `layer4` as large as `layer3`, and no dilation in it."""
    net = torchvision.models.resnet18(weights=None)
    plain = ends(net)
    net.layer4[0].conv1.stride = net.layer4[0].downsample[0].stride = (1, 1)
    assert ends(net) == plain == [f"layer{n}.1" for n in (1, 2, 3, 4)]


def test_a_wider_stage_at_the_usual_stride_ends_none() -> None:
    """A net that goes down to a 32nd has left out no stride, whatever its last widths are."""
    stages = [
        nn.Sequential(unit(a, b, 2), BasicBlock(b, b)) for a, b in ((4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
    ]
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), *stages, nn.Sequential(unit(16, 32, 1), BasicBlock(32, 32))
    )
    assert ends(net) == [*(f"{n}.1" for n in (1, 2, 3, 4)), "6.1"]


def unit(given: int, out: int, stride: int) -> BasicBlock:
    """A residual unit with a projected shortcut."""
    return BasicBlock(given, out, stride, nn.Conv2d(given, out, 1, stride))


def test_a_pattern_of_dilations_within_a_stage_ends_none() -> None:
    """Larger and smaller dilations by turns, or larger ones at the same width, are one stage's."""

    class Dilated(nn.Module):
        def __init__(self, channels: int, dilation: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation)

        def forward(self, x):
            return x + self.conv(x).relu()

    for pattern in ((1, 2, 1, 4), (1, 2, 4, 8)):
        row = [Dilated(4, d) for d in pattern]
        net = nn.Sequential(nn.Conv2d(3, 4, 2, 2), *row, nn.Conv2d(4, 4, 2, 2), Dilated(4, 1))
        assert [s.path for s in ai.plan(net, block="se", place="stage_end", args={"reduction": 2}).sites] == [
            "4",
            "6",
        ]


# --- every net of timm that takes `output_stride` ---------------------------------------------

# Files of timm whose nets take 8 and 16. There is none among them whose list cannot be that of the undilated twin.
TAKE = (
    "byoanet", "byobnet", "convnext", "cspnet", "cspnext", "efficientnet", "inception_next", "mobilevit", "nfnet",
    "regnet", "res2net", "resnest", "resnet", "resnetv2", "rexnet", "sknet", "xception_aligned",
)  # fmt: skip
# These have the argument and refuse all but 32 by an assertion: their builders know no dilation.
REFUSE = (
    "dla", "dpn", "ghostnet", "hrnet", "inception_resnet_v2", "inception_v4", "nasnet", "pnasnet", "repghost",
    "starnet", "swiftformer", "vgg", "vovnet",
)  # fmt: skip


def takes(name: str) -> str:
    """Whether a net can be built with a stride of 16: "yes", "refuses", or "no" where it has no such argument."""
    try:
        built(name, output_stride=16)
    except AssertionError:
        return "refuses"
    except TypeError:
        return "no"
    return "yes"


@pytest.mark.zoo
def test_all_files_with_the_argument_are_listed() -> None:
    """So that a file that a later timm adds is compared, too."""
    found = {
        file: takes(timm.list_models(module=file)[0])
        for file in timm.list_modules()
        if timm.list_models(module=file)
    }
    assert sorted(f for f, answer in found.items() if answer == "yes") == sorted(TAKE)
    assert sorted(f for f, answer in found.items() if answer == "refuses") == sorted(REFUSE)


@pytest.mark.zoo
@pytest.mark.parametrize("name", [name for file in TAKE for name in timm.list_models(module=file)])
def test_every_net_has_the_stages_of_its_twin(name: str) -> None:
    """At 8, 16 and 32, as without the argument."""
    plain = ends(built(name))
    assert {stride: ends(built(name, output_stride=stride)) for stride in (8, 16, 32)} == dict.fromkeys(
        (8, 16, 32), plain
    )
