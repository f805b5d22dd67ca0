"""Coordinate, strip, triplet and EMA attention: counts by hand, timm's module, axes, groups and refusals."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from block_cases import build, macs, noise, scrambled

from attninject.blocks import registry
from attninject.blocks.directional import joined, parted, reduce_axes, strips


def count(name, channels, **args):
    """Trainable numbers of one block."""
    return sum(p.numel() for p in build(name, channels, init="paper", **args).parameters())


@pytest.mark.parametrize("c", [512, 96, 7])
def test_counts_by_hand(c):
    """Every block's count as a formula in the channels C."""
    h, w = max(8, c // 32), c // math.gcd(32, c)
    assert count("coord", c) == c * h + h + 2 * h + 2 * (h * c + c)
    assert count("coord", c, dims=3, bias=False) == c * h + 2 * h + 3 * h * c
    assert count("strip", c) == 2 * (3 * c * c + 2 * c) + c * c + c
    assert count("strip", c, norm=False, kernel_size=1) == 3 * (c * c + c)
    assert count("triplet", c) == 3 * (2 * 49 + 2)
    assert count("triplet", c, spatial=False, kernel_size=3) == 2 * (2 * 9 + 2)
    assert count("ema_attn", c) == (w * w + w) + (9 * w * w + w) + 2 * w


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("coord", {"bias": False}, 2 * 64 * 8 * 12),
        ("strip", {}, 64 * 64 * (3 * 12 + 35)),
        ("triplet", {"kernel_size": 3}, 2 * 9 * (64 * 5 + 64 * 7 + 35)),
        ("ema_attn", {"groups": 16}, 16 * (16 * 12 + 9 * 16 * 35)),
    ],
)
def test_multiplications_by_hand(name, args, expected):
    """The multiply-accumulates of the convolutions, no more."""
    assert macs(build(name, 64, init="paper", **args), noise(2, 64, 7, 5)) == expected


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_coord_is_timms_with_its_weights(train):
    """timm's CoordAttn at our width and with biases: other names, the same output."""
    coord_attn = pytest.importorskip("timm.layers.coord_attn", reason="this timm has no CoordAttn yet")
    torch.manual_seed(3)
    theirs = coord_attn.CoordAttn(64, rd_channels=8, bias=True).train(mode=train)
    ours = build("coord", 64, init="paper").train(mode=train)
    names = {"bn1": "norm", "conv_h": "excite.0", "conv_w": "excite.1"}
    renamed = {
        ".".join([names.get(k.split(".")[0], k.split(".")[0]), k.split(".")[1]]): v
        for k, v in theirs.state_dict().items()
    }
    ours.load_state_dict(renamed)
    x = noise(2, 64, 7, 5)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["coord", "triplet", "ema_attn"])
def test_products_and_sums_of_gates_are_no_dead_saddle(name):
    """With every gate at one, each last layer has a gradient at the very first step."""
    block = build(name, 64)
    (block(noise(4, 64, 7, 5)) * noise(4, 64, 7, 5, seed=3)).sum().backward()
    zeroed = {k for k, p in block.named_parameters() if not p.any()}
    last = {"coord": {"excite.0.weight", "excite.1.weight"}, "triplet": {"planes.2.norm.weight"},
            "ema_attn": {"norm.weight", "conv3x3.weight"}}[name]  # fmt: skip
    assert last <= zeroed
    assert all(block.get_parameter(k).grad.any() for k in last)


def test_coord_gates_vary_along_one_axis_each():
    """The height's gate is one number per row, the width's one per column; three axes in a volume."""
    maps = scrambled("coord").attention(noise(2, 16, 7, 5))
    assert {k: tuple(v.shape) for k, v in maps.items()} == {"height": (2, 16, 7, 1), "width": (2, 16, 1, 5)}
    assert set(scrambled("coord", dims=3).attention(noise(2, 16, 3, 5, 4))) == {"depth", "height", "width"}


def test_triplet_second_kernel_is_the_released_one_transposed():
    """The released code convolves the plane left by the width as (H, C), we as (C, H)."""
    plane = scrambled("triplet").planes[1].eval()
    x = noise(2, 16, 7, 5)
    turned = x.permute(0, 3, 2, 1)  # (B, W, H, C)
    pooled = torch.stack([turned.amax(1), turned.mean(1)], 1)
    z = plane.norm(F.conv2d(pooled, plane.conv.weight.transpose(2, 3), padding=3))
    torch.testing.assert_close(plane(x), z.permute(0, 3, 2, 1))


@pytest.mark.parametrize(("channels", "groups", "found"), [(16, 32, 16), (48, 32, 16), (7, 8, 1), (12, 8, 4)])
def test_groups_that_do_not_divide_become_the_largest_common_divisor(channels, groups, found):
    """Any number of channels works, and the gate says how many groups there are."""
    block = scrambled("ema_attn", channels, groups=groups)
    assert block.attention(noise(2, channels, 3, 3))["gate"].shape == (2, found, 3, 3)


def test_ema_attention_takes_one_position_and_one_group():
    """One value per channel and batch 1, which group normalisation refuses, is the norm's shift."""
    block = scrambled("ema_attn", 7)
    assert torch.isfinite(block(noise(1, 7, 1, 1))).all()


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_strips_join_and_part_again(dims):
    """Laying strips side by side and cutting them apart gives each back along its own axis."""
    x = noise(2, 4, *(3, 5, 6)[:dims])
    parts = strips(x)
    assert [max(p.shape[2:]) for p in parts] == [3, 5, 6][:dims]
    for part, again in zip(parts, parted(joined(parts), x), strict=True):
        assert torch.equal(part, again)


@pytest.mark.parametrize("kind", ["mean", "amax"])
@pytest.mark.parametrize("size", [(7, 5), (3, 5, 4)])
def test_reductions_do_not_depend_on_the_memory_format(size, kind):
    """The order in which memory is walked changes speed, not the result."""
    x = noise(2, 8, *size)
    last = x.contiguous(memory_format=torch.channels_last if len(size) == 2 else torch.channels_last_3d)
    assert not last.is_contiguous()
    axes = range(1, x.ndim)
    for chosen in (list(c) for n in (1, 2) for c in itertools.combinations(axes, n)):
        expected = getattr(x, kind)(chosen, keepdim=True)
        torch.testing.assert_close(reduce_axes(last, kind, chosen), expected)
        torch.testing.assert_close(reduce_axes(x, kind, chosen), expected)


@pytest.mark.parametrize(
    ("name", "args", "text"),
    [
        ("coord", {"min_width": 0}, "min_width: expected a whole number >= 1, found 0"),
        ("strip", {"kernel_size": 2}, "kernel_size: expected an odd whole number >= 1, found 2"),
        ("triplet", {"spatial": 1}, "spatial: expected true or false, found 1"),
        ("triplet", {"kernel_size": -3}, "found -3"),
        ("ema_attn", {"factor": 8}, "no argument 'factor'"),
        ("ema_attn", {"groups": 0}, "groups: expected a whole number >= 1"),
    ],
)
def test_a_wrong_option_is_named_with_its_range(name, args, text):
    """Refused by the registry's check before anything is built."""
    ((_, message),) = registry.check_args(name, args)
    assert text in message
