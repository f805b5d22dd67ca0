"""Named places against golden cases, and parameter counts against published ones."""

from __future__ import annotations

import functools
import math
from collections import Counter
from pathlib import Path

import golden
import pytest
import timm
import torch
import torchvision
import yaml
from nets import pretrained
from small import older
from torch import nn

import attninject as ai
from attninject.anatomy.place_map import PlaceMap
from attninject.anatomy.places import spots
from attninject.errors import NoSuchPlaceError, NoTensorError
from attninject.observe.probe import Inputs, probe, run
from attninject.observe.record import Record
from attninject.planning.locating import locate
from attninject.planning.scene import Scene

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "tests" / "reference"
PLACES = yaml.safe_load((REFERENCE / "places.yaml").read_text())
COUNTS = yaml.safe_load((REFERENCE / "parameter_counts.yaml").read_text())


@functools.cache
def model_of(name: str) -> nn.Module:
    """The net, built once; planning leaves it as it is."""
    if name.startswith("timm/"):
        return timm.create_model(name.removeprefix("timm/"))
    return torchvision.models.get_model(name, weights=None)


def units(name: str, place: str) -> list[str]:
    """Paths of a place's sites."""
    return [s.path for s in ai.plan(model_of(name), **_rule(place)).sites]


def _rule(place: str) -> dict:
    return {"block": "se", "place": place, "args": {"reduction": 4}}


@pytest.mark.parametrize("name", PLACES["stage_end"])
def test_stage_ends_are_the_known_ones(name: str) -> None:
    """The last repeated unit at each resolution, on nets that everybody knows."""
    assert units(name, "stage_end") == PLACES["stage_end"][name]


@pytest.mark.parametrize("name", PLACES["before_downsample"])
def test_before_downsample_leaves_the_last_stage_out(name: str) -> None:
    """Every stage end but the last."""
    assert units(name, "before_downsample") == PLACES["before_downsample"][name]


@pytest.mark.parametrize("name", PLACES["block_end"])
def test_block_ends_are_as_many_as_there_are_units(name: str) -> None:
    """One site per residual, dense or transformer block."""
    assert len(set(units(name, "block_end"))) == PLACES["block_end"][name]


@pytest.mark.parametrize("name", [n for n, v in PLACES["residual_branch"].items() if v != "none"])
def test_residual_branches_end_where_known(name: str) -> None:
    """The number of branches, and the first ones by name."""
    expected = PLACES["residual_branch"][name]
    found = units(name, "residual_branch")
    assert len(found) == expected["sites"]
    examples = [e.strip().split(" ")[0] for e in expected["e.g."].split(", ")]
    assert set(examples) - {"dropout"} <= set(found)


@pytest.mark.parametrize("name", [n for n, v in PLACES["residual_branch"].items() if v == "none"])
def test_nets_without_residual_adds_say_what_they_have(name: str) -> None:
    """The error names the places that the net does have."""
    with pytest.raises(NoSuchPlaceError, match=r"no place 'residual_branch'; it has .*stage_end") as e:
        ai.plan(model_of(name), **_rule("residual_branch"))
    assert "rule 1 (se)" in str(e.value)


def test_places_below_a_root_are_those_of_the_root() -> None:
    """A backbone inside a larger model has the same places as alone."""

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = torchvision.models.resnet18(weights=None)
            self.neck = nn.Linear(1000, 8)

        def forward(self, x):
            return self.neck(self.body(x))

    plan = ai.plan(Detector(), root="body", **_rule("stage_end"))
    assert [s.path for s in plan.sites] == [f"body.layer{n}.1" for n in (1, 2, 3, 4)]


class Twins(nn.Module):
    """One backbone for two images."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [torchvision.models.resnet.BasicBlock(8, 8) for _ in range(3)]
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), *blocks)

    def forward(self, a, b):
        return self.backbone(a) - self.backbone(b)


@pytest.mark.parametrize("place", ["shortcut", "residual_branch", "block_end"])
def test_a_shared_backbone_has_each_place_once(place: str) -> None:
    """The blocks of a backbone that runs for each image of a pair are one block each, counted once by `pick`."""
    model = Twins()
    rule = {"block": "se", "place": place, "args": {"reduction": 2}}
    assert [s.path.split(":")[0][:10] for s in ai.plan(model, **rule).sites] == [
        f"backbone.{i}" for i in (1, 2, 3)
    ]
    assert len(ai.plan(model, **rule, pick={"every": 2}).sites) == 2
    ai.inject(model, **rule, verify=True)


class Stacked(nn.Module):
    """Two images in one batch, as networks for optical flow encode them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3), nn.ReLU())
        self.units = nn.Sequential(*(torchvision.models.resnet.BasicBlock(8, 8) for _ in range(2)))

    def forward(self, a, b):
        return self.units(self.stem(torch.cat((a, b)))).chunk(2)


def test_a_batch_of_two_images_has_the_layout_of_one() -> None:
    """The map behind the first layer too, though it has twice the batch that went in."""
    images = (torch.zeros(2, 3, 224, 224), torch.zeros(2, 3, 224, 224))
    plan = ai.plan(Stacked(), example_inputs=images, **_rule("stem_end"))
    assert [(s.path, str(s.layout)) for s in plan.sites] == [("stem", "NCHW")]


class Clips(nn.Module):
    """An image backbone over the frames of a clip: one after another, or all in the batch."""

    def __init__(self, folded: bool) -> None:
        super().__init__()
        basic = torchvision.models.resnet.BasicBlock
        down = nn.Sequential(nn.Conv2d(16, 32, 1, 2), nn.BatchNorm2d(32))
        stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU())
        self.cnn = nn.Sequential(stem, basic(16, 16), basic(16, 32, 2, down), basic(32, 32))
        self.folded = folded

    def forward(self, clip):
        if self.folded:
            return self.cnn(clip.flatten(0, 1)).mean((2, 3))
        return torch.stack([self.cnn(clip[:, t]).mean((2, 3)) for t in range(clip.shape[1])])


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("place", ["stem_end", "block_start", "block_end", "stage_end", "shortcut"])
def test_the_frames_of_a_clip_are_images(folded: bool, place: str) -> None:
    """A net for images that goes over a clip has an image's places and axes, though as many channels as pixels a side."""
    where = {
        "block": "cbam",
        "place": place,
        "args": {"reduction": 2},
        "example_inputs": torch.randn(2, 3, 3, 32, 32),
    }
    sites = ai.plan(Clips(folded).eval(), **where).sites
    assert len(sites) == {"stem_end": 1, "stage_end": 2}.get(place, 3)
    assert {str(s.layout) for s in sites} == {"NCHW"}
    assert {s.shape[0] for s in sites} == {6 if folded else 2}


class Nine(nn.Module):
    """A small residual net as in many tutorials: Sequentials, and the sums in the model's own forward."""

    def __init__(self) -> None:
        super().__init__()

        def layer(a: int, b: int, stride: int = 1) -> nn.Module:
            return nn.Sequential(nn.Conv2d(a, b, 3, stride, 1), nn.BatchNorm2d(b), nn.ReLU())

        self.conv1, self.res1 = layer(3, 8, 2), nn.Sequential(layer(8, 8), layer(8, 8))
        self.conv2, self.res2 = layer(8, 16, 2), nn.Sequential(layer(16, 16), layer(16, 16))

    def forward(self, x):
        x = self.conv1(x)
        x = self.res1(x) + x
        x = self.conv2(x)
        return (self.res2(x) + x).mean((2, 3))


def test_a_stage_ends_behind_the_sum_in_the_models_own_forward() -> None:
    """Not inside the branch, where the last module stands."""
    model = Nine()
    found = ai.plan(model, block="se", place="stage_end", args={"reduction": 2})
    assert [s.path for s in found.sites] == ["::add", "::add_1"]
    ai.inject(model, found, verify=True)


def test_a_discriminator_under_spectral_norm_has_stages() -> None:
    """What makes a parametrized layer's weight does not hide that it is a layer."""
    norm = nn.utils.parametrizations.spectral_norm
    layers = [
        m for a, b in ((3, 8), (8, 16)) for m in (norm(nn.Conv2d(a, b, 4, 2, 1)), nn.LeakyReLU(0.2, True))
    ]
    found = ai.plan(nn.Sequential(*layers), block="se", place="stage_end", args={"reduction": 2})
    assert [s.path for s in found.sites] == ["1", "3"]


class Mixed(nn.Module):
    """A residual trunk, a sample drawn from its features, and residual layers on a vector behind the pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.blocks = nn.Sequential(*(torchvision.models.resnet.BasicBlock(8, 8) for _ in range(2)))
        self.mean, self.spread = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, x):
        x = self.blocks(self.stem(x))
        mean, spread = self.mean(x), (0.5 * self.spread(x)).exp()
        x = (mean + torch.randn_like(mean) * spread).mean((2, 3))
        return x + self.head(x)


@pytest.mark.parametrize("place", ["residual_branch", "shortcut"])
def test_samples_and_vectors_are_no_places(place: str) -> None:
    """Neither a variational sample nor a residual head on a vector stops the blocks of the trunk."""
    found = ai.plan(Mixed(), block="se", place=place, args={"reduction": 2})
    assert [s.path.split(".")[0] for s in found.sites] == ["blocks", "blocks"]
    assert (
        found.notes == ("rule 1 (se): left aside, since vectors have no positions: head",)
        or place == "shortcut"
    )


class Hidden(nn.Module):
    """Blocks in an `nn.ModuleList`, and a layer behind them that a plain list hides from torch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.blocks = nn.ModuleList(torchvision.models.resnet.BasicBlock(8, 8) for _ in range(2))
        self.hidden = [nn.Conv2d(8, 8, 1)]

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.hidden[0](x)


@pytest.mark.parametrize("place", ["head_input", "stage_end", "residual_branch", "stem_end"])
def test_a_module_that_torch_does_not_know_is_no_place(place: str) -> None:
    """A layer in a plain Python list has no name to hang a block on: the places lie beside it."""
    assert (
        ai.plan(Hidden(), block="se", place=place, args={"reduction": 2})
        .sites[-1]
        .path.startswith("stem" if place == "stem_end" else "blocks.1")
    )


def test_blocks_in_a_plain_list_are_named_where_a_place_is_missing() -> None:
    """Blocks that torch does not know of have no parameters either: the message says what to change."""
    model = Hidden()
    model.hidden, model.blocks = list(model.blocks), nn.ModuleList()
    with pytest.raises(
        NoSuchPlaceError, match=r"plain list or the like \(BasicBlock\): put them in an nn.ModuleList"
    ):
        ai.plan(model, block="se", place="block_end")


def test_vit_attention_output_is_chosen_from_its_tuple() -> None:
    """torchvision's attention returns (x, weights); the block takes the first."""
    site = ai.plan(model_of("vit_b_16"), **_rule("residual_branch")).sites[0]
    assert (site.path, str(site.layout)) == ("encoder.layers.encoder_layer_0.self_attention", "NLC 1+14×14")


# --- units that take a list --------------------------------------------------------------------


class Dense(nn.Module):
    """A dense layer that takes the list of all maps so far; it joins them, or reads the last one alone."""

    def __init__(self, taken: int, joins: bool) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(taken if joins else 4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1)
        )
        self.joins = joins

    def forward(self, maps):
        if self.joins:
            return self.conv(torch.cat(maps, 1))
        if not isinstance(maps, list):  # true of what stands for a list while a graph is traced
            maps = [maps]
        return self.conv(maps[0])


class DenseNet(nn.Module):
    """Three dense layers behind a stem."""

    def __init__(self, joins: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, 1)
        self.layers = nn.ModuleList(Dense(4 + 4 * i, joins) for i in range(3))

    def forward(self, x):
        maps = [self.stem(x)]
        for layer in self.layers:
            maps = [layer(maps), *maps]
        return torch.cat(maps, 1)


@pytest.mark.parametrize(("joins", "names"), [(True, ["{}::cat"] * 3), (False, ["{}.conv"] * 3)])
def test_a_unit_that_takes_a_list_begins_where_it_makes_one_tensor_of_it(
    joins: bool, names: list[str]
) -> None:
    """Behind the concatenation of all, or before the one module that reads the first; the function stays."""
    if older(torch.__version__, "2.9"):
        names = ["{}.conv"] * 3  # there the joined tensor is named by the module that reads it
    model = DenseNet(joins).eval()
    found = ai.plan(model, block="se", place="block_start", args={"reduction": 2})
    assert [s.path for s in found.sites] == [n.format(f"layers.{i}") for i, n in enumerate(names)]
    assert [s.channels for s in found.sites] == ([4, 8, 12] if joins else [4, 4, 4])
    ai.inject(model, found, verify=True)


def test_units_whose_list_no_block_reaches_are_refused_at_plan_time() -> None:
    """A densenet joins its list before a batch norm in a forward that may checkpoint: there is no tensor to name."""
    model = torchvision.models.DenseNet(4, (2, 2), 8, num_classes=2).eval()
    with pytest.raises(
        NoTensorError, match=r"enter in a list, not one: features\.denseblock1\.denselayer1, "
    ):
        ai.plan(model, block="se", place="block_start")


# --- golden lists ------------------------------------------------------------------------------

GOLDEN = golden.places()
QUICK = """
    test_convnext swin_tiny_patch4_window7_224 test_vit mobilenetv3_small_050 test_efficientnet mobilenetv2_035
    regnetx_002 densenet121 vgg11 inception_v3 inception_resnet_v2 test_nfnet poolformerv2_s12 mvitv2_tiny
    hiera_tiny_224 volo_d1_224 xcit_nano_12_p16_224 test_coatnet levit_128s pit_ti_224 dpn48b hrnet_w18_small
    cait_xxs24_224 convmixer_768_32 dla46x_c cs3darknet_focus_s mobilevit_xxs nest_tiny repvit_m1 gcvit_xxtiny
"""


def tiered(names: list[str]) -> list:
    """The quick nets in every run, torchvision's too; the others with the zoo."""
    quick = {f"timm/{n}" for n in QUICK.split()}
    every_time = [n in quick or (n.startswith("torchvision/") and "resnet50_fpn" not in n) for n in names]
    return [
        n if e else pytest.param(n, marks=pytest.mark.zoo) for n, e in zip(names, every_time, strict=True)
    ]


def records_whole_slices() -> bool:
    """Whether torch runs `x[:, :4]` of four as an operation, after which a site is named: torch 2.6 does."""

    class Whole(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, :4]

    record = run(Whole(), Inputs((torch.ones(1, 4),)), "meta")
    return any(op.name == "aten.slice.Tensor" for op in record.calls[0].ops())


@pytest.mark.parametrize("name", tiered(sorted(GOLDEN)))
def test_places_are_those_read_from_the_source(name: str) -> None:
    """Stage ends, units, residual adds and where their branches end, as the nets' source has them."""
    if name == "timm/test_coatnet" and not timm.is_model("test_coatnet"):
        pytest.skip("this timm has no such model yet")
    if name == "timm/swin_tiny_patch4_window7_224" and records_whole_slices():
        pytest.skip("this torch names the same tensor after the slice that swin cuts to its own size")
    assert golden.compared(name).all() == []


def test_the_sample_has_a_reference_for_every_net() -> None:
    """Every net of the zoo's sample has its list, so that none goes unchecked."""
    sample = yaml.safe_load((ROOT / "attninject" / "zoo" / "samples.yaml").read_text())
    assert [n for n in sample["timm"].values() if f"timm/{n}" not in GOLDEN] == []


EXCEPTIONS = yaml.safe_load((REFERENCE / "feature_info.yaml").read_text())


@pytest.mark.zoo
@pytest.mark.parametrize("name", [n for n in sorted(GOLDEN) if n.startswith("timm/")])
def test_stage_ends_agree_with_timms_features(name: str) -> None:
    """Reduction and channels are among timm's, and timm has no later ones; but for the reviewed exceptions."""
    net = golden.compared(name).net
    listed = net.root.module.feature_info
    entries = listed if isinstance(listed, list) else listed.info
    theirs = [(entry["reduction"], entry["num_chs"]) for entry in entries]
    ours = golden.features(net)

    def same(a: tuple[float, int], b: tuple[float, int]) -> bool:
        return a[1] == b[1] and abs(math.log2(a[0] / b[0])) < 0.25  # odd sizes round

    unknown = [a for a in ours if not any(same(a, b) for b in theirs)]
    later = [b for b in theirs if b[0] > ours[0][0] * 1.2 and not any(same(a, b) for a in ours)]
    if name in EXCEPTIONS:
        assert unknown or later or ours[0][0] < theirs[0][0], "an exception that is none any more"
    else:
        assert (unknown, later) == ([], [])


@pytest.mark.zoo
@pytest.mark.parametrize("name", [n for n in torchvision.models.list_models() if "quantized" not in n])
def test_every_net_of_torchvision_has_stage_ends(name: str) -> None:
    """Whatever the net is for, blocks can be put at the ends of its stages."""
    record, _ = probe(golden.built(f"torchvision/{name}"), partial=True)
    record.input_values = record.calls[0].ins
    assert 2 <= len(PlaceMap(record).stages) <= 8


@pytest.mark.zoo
def test_residual_branches_are_reached_by_local_graphs() -> None:
    """At least 98 in 100 of the reviewed sites, those in owners that cannot be traced counted as missed."""
    names = [n for n, e in GOLDEN.items() if n.startswith("timm/") and e["residual_branch"] != "none"]
    found = {n: mechanisms(n) for n in names}
    total = sum(GOLDEN[n]["residual_branch"]["sites"] for n in names)
    by_graph = sum(f["graph"] for f in found.values())
    rest = {n: dict(f) for n, f in found.items() if f["graph"] < GOLDEN[n]["residual_branch"]["sites"]}
    print(
        f"{by_graph} of {total} residual branches by local graph ({by_graph / total:.2%}); the rest: {rest}"
    )
    assert all(sum(f.values()) == GOLDEN[n]["residual_branch"]["sites"] for n, f in found.items())
    assert by_graph >= 0.98 * total


def mechanisms(name: str) -> Counter[str]:
    """How the sites of `residual_branch` are reached: `graph`, or why not."""
    net = golden.compared(name)
    record, model = net.record, net.net.root.module

    def rerun(how: str) -> Record | None:
        return run(model, net.inputs, record.mode, training=True) if how == "training" else None

    scene = Scene(model, record, "", rerun)
    found: Counter[str] = Counter()
    for spot in spots(net.net, "residual_branch"):
        try:
            location = locate(scene, spot, net.path(spot))
            found["graph" if location.mechanism == "graph" else f"module: {location.reason}"] += 1
        except ai.AttnInjectError as error:
            found[f"refused: {error}"] += 1
    assert not found["module: "], "a site at the module says why"
    return found


# --- counts ------------------------------------------------------------------------------------

RECIPES = {
    "se": ("se_resnet", {}),
    "se_nobias": ("se_resnet", {"bias": False}),
    "cbam": ("cbam_resnet", {}),
    "cbam_nobias": ("cbam_resnet", {"bias": False, "norm": False}),
    "bam": ("bam_resnet", {}),
    "nonlocal_1": ("nonlocal_resnet_1", {}),
    "nonlocal_5": ("nonlocal_resnet_5", {}),
    "nonlocal_10": ("nonlocal_resnet_10", {}),
}


@pytest.mark.parametrize(
    ("net", "variant"), [(n, v) for n in ("resnet18", "resnet50") for v in COUNTS[n] if v in RECIPES]
)
def test_parameter_counts_are_the_reference_ones(net: str, variant: str) -> None:
    """To the last digit, in the plan and in the model."""
    recipe, args = RECIPES[variant]
    model = torchvision.models.get_model(net, weights=None)
    assert sum(p.numel() for p in model.parameters()) == COUNTS[net]["base"]
    plan = ai.plan(model, recipe, args=args)
    ai.inject(model, plan)
    expected = COUNTS[net][variant]["count"]
    assert sum(p.numel() for p in model.parameters()) == expected
    assert plan.base_parameters + plan.parameters == expected


@pytest.mark.parametrize("channels", [512, 1024])
def test_a_nonlocal_block_alone_has_the_reference_count(channels: int) -> None:
    """The block by itself, bottleneck of half the channels."""
    block = ai.create_block("nonlocal", channels)
    assert sum(p.numel() for p in block.parameters()) == COUNTS["block_alone"][f"nonlocal_{channels}"]


def test_resnet50_with_se_is_timms_seresnet50() -> None:
    """Same keys in timm's own slot, and with seresnet50's weights the same output."""
    target = pretrained(timm.create_model("seresnet50"))
    model = timm.create_model("resnet50").eval()
    ai.inject(model, block="se", after="layer[1-4].*.bn3", name="se", args={"divisor": 8}, init="paper")
    assert set(model.state_dict()) == set(target.state_dict())
    model.load_state_dict(target.state_dict())
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(x), target(x), rtol=1e-5, atol=1e-5)
