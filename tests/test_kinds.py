"""Every kind of vision model: bit-equal after injection, each block called as often as its site is met."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from nets import pretrained
from small import calls_of, images
from torch import Tensor, nn
from torchvision.models import detection, optical_flow, segmentation, video

import attninject as ai
from attninject import errors
from attninject.observe.record import map_tensors

SMALL = {"weights": None, "weights_backbone": None}
TINY = SMALL | {"min_size": 64, "max_size": 64}


def clip(frames: int = 4, size: int = 32) -> Tensor:
    """A short video."""
    return torch.randn(1, 3, frames, size, size, generator=torch.Generator().manual_seed(0))


def two() -> tuple[Any, ...]:
    """A list of two images of different sizes, as detectors take them."""
    generator = torch.Generator().manual_seed(0)
    return ([torch.rand(3, 64, 48, generator=generator), torch.rand(3, 48, 64, generator=generator)],)


Case = tuple[Callable[[], nn.Module], Callable[[], Any], list[tuple[dict[str, Any], int, int]]]
# kind → model, its input, and rules with the number of their sites and of the runs of each
KINDS: dict[str, Case] = {
    "segmentation deeplab": (
        lambda: segmentation.deeplabv3_mobilenet_v3_large(**SMALL, aux_loss=True),
        lambda: images(size=64),
        [
            ({"place": "residual_branch", "root": "backbone"}, 10, 1),
            ({"place": "residual_branch"}, 10, 1),
            ({"after": "classifier.0"}, 1, 1),
        ],
    ),
    "segmentation lraspp": (
        lambda: segmentation.lraspp_mobilenet_v3_large(**SMALL),
        lambda: images(size=64),
        [({"place": "residual_branch", "root": "backbone"}, 10, 1), ({"after": "classifier.cbr"}, 1, 1)],
    ),
    "detection faster rcnn": (
        lambda: detection.fasterrcnn_mobilenet_v3_large_320_fpn(**TINY),
        two,
        [
            ({"place": "residual_branch", "root": "backbone.body"}, 10, 1),
            ({"after": "backbone.fpn", "output": "0"}, 1, 1),
            ({"after": "backbone.fpn.layer_blocks.*"}, 2, 1),
            ({"after": "rpn.head.conv.0.0"}, 1, 3),
        ],
    ),
    "detection fcos": (
        lambda: detection.fcos_resnet50_fpn(**TINY),
        two,
        [
            ({"place": "residual_branch", "root": "backbone.body"}, 16, 1),
            ({"place": "stage_end", "root": "backbone.body"}, 4, 1),
        ],
    ),
    "video r3d": (
        lambda: video.r3d_18(weights=None),
        clip,
        [({"place": "residual_branch"}, 8, 1), ({"place": "stage_end"}, 4, 1)],
    ),
    "video swin3d": (
        lambda: video.swin_transformer.SwinTransformer3d(
            [2, 4, 4], 16, [1, 1], [1, 2], [2, 4, 4], num_classes=3
        ),
        clip,
        [({"place": "residual_branch"}, 4, 1), ({"place": "stage_end"}, 2, 1)],
    ),
    "optical flow": (
        lambda: optical_flow.raft_small(weights=None),
        lambda: (images(size=128), images(size=128, seed=1)),
        [
            ({"place": "residual_branch", "root": "feature_encoder"}, 6, 1),
            ({"after": "update_block.flow_head.conv1"}, 1, 12),
            ({"after": "update_block.motion_encoder"}, 1, 12),
        ],
    ),
}
SLOW_KINDS: dict[str, Case] = {
    "segmentation fcn": (
        lambda: segmentation.fcn_resnet50(**SMALL),
        lambda: images(size=64),
        [({"place": "residual_branch", "root": "backbone"}, 16, 1), ({"after": "classifier.0"}, 1, 1)],
    ),
    "detection mask rcnn": (
        lambda: detection.maskrcnn_resnet50_fpn(**TINY),
        two,
        [
            ({"place": "residual_branch", "root": "backbone.body"}, 16, 1),
            ({"after": "roi_heads.mask_head"}, 1, 1),
        ],
    ),
    "detection keypoint rcnn": (
        lambda: detection.keypointrcnn_resnet50_fpn(**TINY),
        two,
        [({"place": "residual_branch", "root": "backbone.body"}, 16, 1)],
    ),
    "detection retinanet": (
        lambda: detection.retinanet_resnet50_fpn(**TINY),
        two,
        [
            ({"place": "residual_branch", "root": "backbone.body"}, 16, 1),
            ({"after": "head.classification_head.conv.0"}, 1, 5),
        ],
    ),
    "detection ssd": (
        lambda: detection.ssd300_vgg16(**SMALL),
        two,
        [({"after": "backbone.features.22"}, 1, 1)],
    ),
    "detection ssdlite": (
        lambda: detection.ssdlite320_mobilenet_v3_large(**SMALL),
        two,
        [({"place": "residual_branch", "root": "backbone"}, 10, 1)],
    ),
    "video mc3": (lambda: video.mc3_18(weights=None), clip, [({"place": "residual_branch"}, 8, 1)]),
    "video r2plus1d": (lambda: video.r2plus1d_18(weights=None), clip, [({"place": "residual_branch"}, 8, 1)]),
    "video s3d": (lambda: video.s3d(weights=None), lambda: clip(16, 224), [({"after": "features.5"}, 1, 1)]),
    "video mvit": (lambda: video.mvit_v2_s(weights=None), lambda: clip(16, 224), [({"after": "blocks.0.mlp"}, 1, 1)]),
}  # fmt: skip


def outputs(model: nn.Module, x: Any) -> list[Tensor]:
    """All tensors that a model gives."""
    found: list[Tensor] = []
    with torch.no_grad():
        map_tensors(model(*x) if isinstance(x, tuple) else model(x), found.append)
    return found


def is_identity(base: nn.Module, x: Any, rule: dict[str, Any], sites: int, runs: int) -> None:
    """Plan, inject, compare."""
    torch.manual_seed(0)
    expected = outputs(base, x)
    model = copy.deepcopy(base)
    plan = ai.plan(model, block="cbam", args={"reduction": 4}, example_inputs=x, **rule)
    assert len(plan.sites) == sites
    ai.inject(model, plan)
    torch.manual_seed(0)
    found = outputs(model, x)
    assert len(found) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), rule
    assert set(calls_of(model, *(x if isinstance(x, tuple) else (x,))).values()) == {runs}, rule


@pytest.mark.parametrize("kind", [*KINDS, *(pytest.param(k, marks=pytest.mark.slow) for k in SLOW_KINDS)])
def test_a_kind_of_model_keeps_its_function(kind: str) -> None:
    """On the whole model, under a root, and at heads that are called several times in a forward."""
    make, given, rules = (KINDS | SLOW_KINDS)[kind]
    torch.manual_seed(0)
    base = pretrained(make())
    for rule, sites, runs in rules:
        is_identity(base, given(), rule, sites, runs)


def test_detectors_need_no_example_for_their_trunk() -> None:
    """A run without data reaches the trunk and the pyramid, also where the net has no memory."""
    with torch.device("meta"):
        model = detection.retinanet_resnet50_fpn(**TINY)
    assert len(ai.plan(model, block="se", place="residual_branch", root="backbone.body").sites) == 16
    with pytest.raises(
        errors.ProbeError, match="as far as the forward goes without data; with data it fails"
    ):
        ai.plan(model, block="se", after="head.nothing_like_it", example_inputs=images(size=64))


def test_a_place_that_a_detectors_trunk_lacks_needs_no_data_to_be_missed() -> None:
    """The trunk's run ended, so nothing behind it can have the place: no second run, which on meta would fail."""
    with torch.device("meta"):
        model = detection.retinanet_resnet50_fpn(**TINY)
    with pytest.raises(errors.NoSuchPlaceError, match="decoder"):
        ai.plan(model, block="se", place="decoder_end", root="backbone.body")


def test_tokens_of_a_video_lie_in_frames_rows_and_columns() -> None:
    """MViT's pooled tokens keep three extents, its class token aside."""
    with torch.device("meta"):
        model = video.mvit_v1_b(weights=None)
    plan = ai.plan(model, block="cbam", place="stage_end")
    assert str(plan.sites[0].layout) == "NLC 1+8×56×56"


# --- what timm can be asked for ----------------------------------------------------------------

ASKED: dict[str, tuple[str, dict[str, Any], Tensor]] = {
    "features_only": ("test_resnet", {"features_only": True}, images(size=64)),
    "features_only of a vit": (
        "test_vit",
        {"features_only": True, "img_size": 64},
        images(size=64),
    ),
    "features_only by hooks": (
        "test_efficientnet",
        {"features_only": True, "feature_cls": "hook"},
        images(size=64),
    ),
    "no classes": ("test_resnet", {"num_classes": 0}, images(size=64)),
    "no pool": ("test_resnet", {"num_classes": 0, "global_pool": ""}, images(size=64)),
    "max pool": ("test_resnet", {"global_pool": "max"}, images(size=64)),
    "token pool": ("test_vit", {"global_pool": "avg", "img_size": 64}, images(size=64)),
    "gray": ("test_resnet", {"in_chans": 1}, images(size=64, channels=1)),
    "four channels": ("test_vit", {"in_chans": 4, "img_size": 64}, images(size=64, channels=4)),
    "oblong": ("test_vit", {"img_size": (32, 96)}, torch.randn(2, 3, 32, 96)),
    "any size": ("test_vit", {"dynamic_img_size": True}, torch.randn(2, 3, 48, 80)),
}


@pytest.mark.parametrize("case", ASKED)
def test_what_timm_can_be_asked_for_keeps_its_function(case: str) -> None:
    """Feature lists, other heads and pools, other channels and sizes."""
    name, options, x = ASKED[case]
    torch.manual_seed(0)
    base = pretrained(timm.create_model(name, **options))
    place = "block_end" if "vit" in name or "efficient" in name else "residual_branch"
    expected = outputs(base, x)
    model = ai.inject(copy.deepcopy(base), block="cbam", place=place, args={"reduction": 4})
    assert all(torch.equal(a, b) for a, b in zip(outputs(model, x), expected, strict=True))
    assert set(calls_of(model, x).values()) == {1}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext"])
def test_checkpointing_on_before_or_after_keeps_blocks_and_gradients(name: str, when: str) -> None:
    """Outputs and gradients are those of the base, each block's own gradient included; nothing is skipped."""
    options = {"img_size": 64} if name == "test_vit" else {}
    torch.manual_seed(0)
    base = pretrained(timm.create_model(name, **options)).train()
    model, plain = copy.deepcopy(base), copy.deepcopy(base)
    ai.inject(plain, block="se", place="block_end", args={"reduction": 4})
    if when == "before":
        model.set_grad_checkpointing(True)
    ai.inject(model, block="se", place="block_end", args={"reduction": 4})
    if when == "after":
        model.set_grad_checkpointing(True)
    x = images(size=64)
    for m in (plain, model):
        torch.manual_seed(1)
        m(x).square().sum().backward()
    for (key, a), b in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), key
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=key)
    assert any(p.grad is not None for block in ai.injected(model).values() for p in block.parameters())


# --- owners without a graph --------------------------------------------------------------------


class Branching(nn.Module):
    """Its forward asks the values: no graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = self.a(x)
        y = self.b(x)
        return x + y if x.shape[0] > 0 and bool((y.sum() < 1e9).item()) else x


class Holds(nn.Module):
    """A root around it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Branching()

    def forward(self, x):
        return self.inner(x)


def test_an_owner_without_a_graph_is_served_at_the_module() -> None:
    """The block hangs on the layer, with the reason in the plan; an addition inside is refused with what to do."""
    torch.manual_seed(0)
    base, x = Holds().eval(), images()
    model = copy.deepcopy(base)
    plan = ai.plan(model, block="se", after="inner.b", args={"reduction": 4}, example_inputs=x)
    assert (plan.sites[0].mechanism, plan.sites[0].name) == ("module", "inner.b.se")
    assert "Branching" in plan.sites[0].reason
    ai.inject(model, plan)
    assert torch.equal(model(x), base(x))
    words = r"operations of inner \(Branching\) cannot be named: .*; name a module that it calls .*: inner.a, inner.b"
    with pytest.raises(errors.CannotRewriteError, match=words):
        ai.plan(base, block="se", after="inner::add", args={"reduction": 4}, example_inputs=x)
