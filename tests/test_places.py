"""Named places against golden cases, and parameter counts against published ones."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import timm
import torch
import torchvision
import yaml
from nets import pretrained
from torch import nn

import attninject as ai
from attninject.errors import NoSuchPlaceError

REFERENCE = Path(__file__).parent / "reference"
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


def test_vit_attention_output_is_chosen_from_its_tuple() -> None:
    """torchvision's attention returns (x, weights); the block takes the first."""
    site = ai.plan(model_of("vit_b_16"), **_rule("residual_branch")).sites[0]
    assert (site.path, str(site.layout)) == ("encoder.layers.encoder_layer_0.self_attention", "NLC 1+14×14")


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
