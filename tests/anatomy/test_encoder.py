"""Ways down and up: U-Nets, detectors, two towers; a small net for each kind."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

import attninject as ai
from attninject.errors import NoSuchPlaceError


def sites(net: nn.Module, place: str, **more) -> list[str]:
    """Paths of a place's sites, once the block went in without changing the function."""
    found = ai.plan(net, block="se", place=place, args={"reduction": 2}, **more)
    ai.eject(ai.inject(net, found, verify=True))
    return [s.path for s in found.sites]


class Double(nn.Module):
    """Two convolutions, as in the usual U-Net."""

    def __init__(self, given: int, out: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(given, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)

    def forward(self, x):
        return self.second(self.first(x).relu()).relu()


class Residual(Double):
    """The same with a skip."""

    def __init__(self, given: int, out: int) -> None:
        super().__init__(given, out)
        self.project = nn.Conv2d(given, out, 1)

    def forward(self, x):
        return super().forward(x) + self.project(x)


def layers(given: int, out: int) -> nn.Sequential:
    """The same without a class of its own."""
    return nn.Sequential(
        nn.Conv2d(given, out, 3, padding=1), nn.ReLU(), nn.Conv2d(out, out, 3, padding=1), nn.ReLU()
    )


class UNet(nn.Module):
    """Three levels down, two up, and a head of one convolution."""

    def __init__(self, unit) -> None:
        super().__init__()
        self.inc, self.pool = unit(3, 4), nn.MaxPool2d(2)
        self.down1, self.down2 = unit(4, 8), unit(8, 16)
        self.wider1, self.wider2 = nn.ConvTranspose2d(16, 8, 2, 2), nn.ConvTranspose2d(8, 4, 2, 2)
        self.up1, self.up2 = unit(16, 8), unit(8, 4)
        self.head = nn.Sequential(nn.Conv2d(4, 1, 1), nn.Sigmoid())

    def forward(self, x):
        high = self.inc(x)
        middle = self.down1(self.pool(high))
        low = self.down2(self.pool(middle))
        middle = self.up1(torch.cat((self.wider1(low), middle), 1))
        return self.head(self.up2(torch.cat((self.wider2(middle), high), 1)))


@pytest.mark.parametrize(("unit", "end"), [(Double, ""), (Residual, ""), (layers, ".3")])
def test_a_unet_has_its_encoders_ends_and_its_decoders(unit, end: str) -> None:
    """The stages are those on the way down; the way up has a place of its own, and its last is what the head reads."""
    net = UNet(unit)
    assert sites(net, "stage_end") == [n + end for n in ("inc", "down1", "down2")]
    assert sites(net, "decoder_end") == ["up1", "up2"]
    assert sites(net, "head_input") == ["up2"]


def test_a_net_that_only_goes_down_has_no_decoder() -> None:
    """A classifier's error names the places that there are."""
    with pytest.raises(NoSuchPlaceError, match=r"no place 'decoder_end'; it has .*stage_end"):
        ai.plan(timm.create_model("resnet10t"), block="se", place="decoder_end")


class Generator(nn.Module):
    """A way that leads only up."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Residual(3, 4), Residual(4, 4)
        self.wider, self.last = nn.Upsample(scale_factor=2), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return self.last(self.b(self.wider(self.a(x))))


def test_a_way_that_leads_only_up_has_stages() -> None:
    """What enlarges an image has no encoder: every resolution ends a stage, as before it was asked for."""
    assert sites(Generator(), "stage_end") == ["a", "b"]


class Towers(nn.Module):
    """Two images of different kinds, each with a way down of its own, joined at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.colour, self.depth = self.way(), self.way()
        self.head = nn.Conv2d(16, 2, 1)

    @staticmethod
    def way() -> nn.Sequential:
        """Two resolutions."""
        return nn.Sequential(Residual(3, 4), nn.MaxPool2d(2), Residual(4, 8))

    def forward(self, x):
        return self.head(torch.cat((self.colour(x), self.depth(x.flip(1))), 1))


def test_two_towers_have_their_stages_each() -> None:
    """Not the later tower's alone."""
    net = Towers()
    assert sites(net, "stage_end") == ["colour.0", "colour.2", "depth.0", "depth.2"]
    assert sites(net, "before_downsample") == ["colour.0", "depth.0"]


# --- detectors: one flat Sequential whose layers read earlier outputs -------------------------


class Join(nn.Module):
    """A concatenation as a layer."""

    def forward(self, maps):
        return torch.cat(maps, 1)


class Detect(nn.Module):
    """A head over three maps: one tensor (batch, outputs, anchors), and the maps behind it."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.cells = nn.ModuleList(
            nn.Sequential(nn.Conv2d(w, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 6, 1)) for w in widths
        )

    def forward(self, maps):
        found = [cell(m) for cell, m in zip(self.cells, maps, strict=True)]
        return torch.cat([f.flatten(2) for f in found], 2).sigmoid(), found


class Detector(nn.Module):
    """Backbone, a neck up and down again, and a head, as Ultralytics and darknet ports have them."""

    def __init__(self) -> None:
        super().__init__()
        down = [nn.Conv2d(a, b, 3, 2, 1) for a, b in ((3, 4), (4, 8), (8, 8), (8, 8))]
        wide = nn.Upsample(scale_factor=2)
        rows = (
            (-1, down[0]), (-1, Residual(4, 4)), (-1, down[1]), (-1, Residual(8, 8)), (-1, down[2]), (-1, Residual(8, 8)),
            (-1, wide), ((-1, 3), Join()), (-1, Residual(16, 8)), (-1, wide), ((-1, 1), Join()), (-1, Residual(12, 4)),
            (-1, nn.Conv2d(4, 8, 3, 2, 1)), ((-1, 8), Join()), (-1, Residual(16, 8)),
            (-1, down[3]), ((-1, 5), Join()), (-1, Residual(16, 8)), ((11, 14, 17), Detect((4, 8, 8))),
        )  # fmt: skip
        self.model, self.read = nn.Sequential(*(m for _, m in rows)), [f for f, _ in rows]

    def forward(self, x):
        outs = [x]
        for at, layer in zip(self.read, self.model, strict=True):
            given = outs[-1] if at == -1 else [outs[-1] if i == -1 else outs[i + 1] for i in at]
            outs.append(layer(given))
        return outs[-1]


def test_a_detectors_stages_are_its_backbones() -> None:
    """The neck is none, and the head is no unit; all three maps that it reads are its input."""
    net = Detector().eval()
    assert sites(net, "stage_end") == ["model.1", "model.3", "model.5"]
    assert sites(net, "block_end") == [f"model.{n}" for n in (1, 3, 5, 8, 11, 14, 17)]
    assert sites(net, "decoder_end") == ["model.11", "model.14"]
    assert sites(net, "head_input") == ["model.11", "model.14", "model.17"]


class Outputs(nn.Module):
    """Residual units on a map, and units of the same class on something that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.units = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), BasicBlock(4, 4), BasicBlock(4, 4))
        self.boxes = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    def forward(self, x):
        x = self.units(x).flatten(2).mT[:, None, None, :, None]  # six axes
        return x + self.boxes(x)


@pytest.mark.parametrize("place", ["residual_branch", "shortcut"])
def test_a_candidate_that_is_no_map_is_left_out(place: str) -> None:
    """With a note, in place of an error for the whole rule."""
    net = Outputs().eval()
    found = ai.plan(net, block="se", place=place, args={"reduction": 2})
    assert [s.path.split(".")[0] for s in found.sites] == ["units", "units"]
    assert "left aside, since their axes are not those of a map" in found.notes[0]
