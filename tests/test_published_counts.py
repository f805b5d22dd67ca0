"""The shipped recipes give the parameter counts that the papers print, on networks beside the resnet50."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision

import attninject as ai

# network, recipe, sites, count, millions as printed (SENet: table 3; CBAM and BAM: their ImageNet tables)
PUBLISHED = [
    ("timm/mobilenetv1_100", "se_mobilenet", 13, 4_718_044, "4.7"),
    ("timm/mobilenetv1_100", "cbam_mobilenet", 26, 5_074_714, "5.07"),
    ("timm/mobilenetv1_100", "bam_mobilenet", 4, 4_323_480, "4.32"),
    ("resnext50_32x4d", "se_resnet", 16, 27_559_896, "27.56"),
    ("resnext50_32x4d", "cbam_resnet", 16, 27_561_496, "27.56"),
    ("resnext50_32x4d", "bam_resnet", 3, 25_386_971, "25.39"),
    ("timm/resnext101_32x4d", "se_resnet", 33, 48_955_416, "48.96"),
    ("timm/resnext101_32x4d", "cbam_resnet", 33, 48_958_716, "48.96"),
    ("resnet34", "se_resnet", 16, 21_958_868, "21.96"),
    ("resnet34", "cbam_resnet", 16, 21_960_468, "21.96"),
    ("resnet101", "cbam_resnet", 33, 49_330_172, "49.33"),
    ("resnet101", "bam_resnet", 3, 44_907_227, "44.91"),
    ("resnet18", "bam_resnet", 3, 11_712_503, "11.71"),
]
# Forms whose count no paper prints: what our convention gives.
OTHERS = [
    ("resnet50", "se_pre", 16, 27_562_140),
    ("resnet50", "se_post", 16, 28_088_024),
    ("resnet50", "se_identity", 16, 28_088_024),
    ("resnet50", "se", 16, 28_088_024),
    ("vgg16_bn", "se_vgg", 13, 138_596_784),
    ("densenet121", "bam", 3, 8_336_923),
]


def plan(name: str, recipe: str) -> ai.planning.Plan:
    """A plan on a network without memory."""
    with torch.device("meta"):
        if name.startswith("timm/"):
            return ai.plan(timm.create_model(name[5:]), recipe)
        return ai.plan(torchvision.models.get_model(name, weights=None), recipe)


@pytest.mark.parametrize(("name", "recipe", "sites", "count", "printed"), PUBLISHED)
def test_a_published_count_is_reproduced(
    name: str, recipe: str, sites: int, count: int, printed: str
) -> None:
    """Network and blocks together, rounded as the paper rounds them."""
    found = plan(name, recipe)
    assert (len(found.sites), found.base_parameters + found.parameters) == (sites, count)
    digits = len(printed.split(".")[1])
    assert f"{count / 1e6:.{digits}f}" == printed


@pytest.mark.parametrize(("name", "recipe", "sites", "count"), OTHERS)
def test_a_form_without_a_published_count_stays_as_it_is(
    name: str, recipe: str, sites: int, count: int
) -> None:
    """The other places of SENet's table 14, VGG and DenseNet: a changed default would show here."""
    found = plan(name, recipe)
    assert (len(found.sites), found.base_parameters + found.parameters) == (sites, count)


@pytest.mark.parametrize(
    ("recipe", "where"),
    [
        ("se", "after layer1.0.bn3"),
        ("se_pre", "before layer1.0"),
        ("se_post", "after layer1.0"),
        ("se_identity", "before layer1.0::add"),
    ],
)
def test_the_four_places_of_the_senet_paper_are_where_it_draws_them(recipe: str, where: str) -> None:
    """On the branch, before the unit, behind the addition, on the shortcut."""
    site = plan("resnet50", recipe).sites[0]
    assert f"{site.position} {site.path}" == where
    assert site.input in ((1,) if recipe == "se_identity" else (None, 0))
