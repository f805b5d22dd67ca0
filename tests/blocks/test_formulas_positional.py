"""Pointwise SAM, SimAM, SGE, LKA, GAM and scSE: counts by hand, published starts, edges and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from block_cases import build, macs, noise, scrambled

from attninject.blocks import registry


def count(name, channels, **args):
    """Trainable numbers of one block."""
    return sum(p.numel() for p in build(name, channels, init="paper", **args).parameters())


@pytest.mark.parametrize("c", [64, 96, 7])
def test_counts_by_hand(c):
    """Every block's count as a formula in the channels C."""
    h, half = max(1, c // 4), max(1, c // 2)
    assert count("sam_pointwise", c) == c * c + c
    assert count("sam_pointwise", c, kernel_size=3, bias=False, norm=True) == 9 * c * c + 2 * c
    assert count("simam", c) == 0
    assert count("sge", c) == 2 * math.gcd(64, c)
    assert count("lka", c) == (25 * c + c) + (49 * c + c) + (c * c + c)
    assert count("gam", c) == (c * h + h) + (h * c + c) + 2 * 49 * c * h + 2 * h + 2 * c
    assert count("scse", c) == (c * half + half) + (half * c + c) + c + 1


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("sam_pointwise", {}, 64 * 64 * 35),
        ("lka", {}, 64 * (25 + 49 + 64) * 35),
        ("gam", {"kernel_size": 3}, 2 * 64 * 16 * (1 + 9) * 35),
        ("scse", {}, 2 * 64 * 32 + 64 * 35),
        ("simam", {}, 0),
        ("sge", {}, 0),
    ],
)
def test_multiplications_by_hand(name, args, expected):
    """The multiply-accumulates of the convolutions, no more."""
    assert macs(build(name, 64, init="paper", **args), noise(2, 64, 7, 5)) == expected


@pytest.mark.parametrize("name", ["gam", "scse"])
@pytest.mark.parametrize("mode", ["add", "max"])
def test_both_halves_learn_from_the_first_step(name, mode):
    """A product, sum or maximum of two gates at their identity passes a gradient to both last layers."""
    block = build(name, 64, **({"mode": mode} if name == "scse" else {}))
    (block(noise(4, 64, 7, 5)) * noise(4, 64, 7, 5, seed=3)).sum().backward()
    last = {"gam": ("fc2.weight", "norm2.weight"), "scse": ("channel.fc2.weight", "spatial.weight")}[name]
    for key in last:
        assert not block.get_parameter(key).any()
        assert block.get_parameter(key).grad.any()


def test_scse_sum_has_the_published_gates_also_as_identity():
    """1/2 and 1/2: the published sum is already the identity, so published weights mean the same in both."""
    published, ours = scrambled("scse", init="paper"), build("scse")
    ours.load_state_dict(published.state_dict())
    x = noise(2, 16, 7, 5)
    assert torch.equal(ours(x), published(x))
    fresh = build("scse").attention(x)
    assert torch.equal(fresh["channel"], torch.full((2, 16, 1, 1), 0.5))
    assert torch.equal(fresh["spatial"], torch.full((2, 1, 7, 5), 0.5))


def test_scse_maximum_is_of_the_maps_not_of_the_gates():
    """Where x is negative the larger map has the smaller gate."""
    block, x = scrambled("scse", init="paper", mode="max").eval(), noise(2, 16, 7, 5)
    gates = block.attention(x)
    larger, smaller = (f(gates["channel"], gates["spatial"]) for f in (torch.maximum, torch.minimum))
    torch.testing.assert_close(block(x), x * torch.where(x > 0, larger, smaller))


def test_lka_is_the_same_function_under_every_init():
    """Its identity is a choice of weights: published weights give the published output in either form."""
    published, ours = scrambled("lka", init="paper"), build("lka")
    assert torch.equal(ours.attention(x := noise(2, 16, 7, 5))["gate"], torch.ones(2, 16, 7, 5))
    ours.load_state_dict(published.state_dict())
    assert torch.equal(ours(x), published(x))


@pytest.mark.parametrize(
    ("k", "d", "sides"), [(21, 3, (5, 7)), (7, 2, (3, 5)), (35, 5, (9, 7)), (3, 1, (1, 3))]
)
def test_lka_kernel_falls_apart_as_published(k, d, sides):
    """2d − 1, then ⌈K / d⌉ made odd, at dilation d; an impulse reaches as far as both together."""
    block = scrambled("lka", 2, init="paper", kernel_size=k, dilation=d).eval()
    assert (block.conv0.kernel_size[0], block.conv_spatial.kernel_size[0]) == sides
    x = torch.zeros(1, 2, 81, 81)
    still = block.attention(x)["gate"]
    x[..., 40, 40] = 1
    moved = (block.attention(x)["gate"] - still)[0, 0].abs() > 0
    reach = sides[0] // 2 + sides[1] // 2 * d
    assert moved.any(0).nonzero().flatten().tolist()[0] == 40 - reach
    assert moved.any(0).nonzero().flatten().tolist()[-1] == 40 + reach


def test_lka_starts_with_normal_weights_of_the_published_size():
    """Variance 2 / fan-out, counted per group, and zero biases."""
    block = build("lka", 256, init="paper")
    for layer, fan_out in ((block.conv0, 25), (block.conv_spatial, 49), (block.conv1, 256)):
        assert layer.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
        assert not layer.bias.any()


def test_sge_starts_with_every_gate_at_sigmoid_of_one():
    """γ = 0 and β = 1."""
    gate = build("sge", 128, init="paper").attention(noise(2, 128, 7, 5))["gate"]
    assert gate.shape == (2, 64, 7, 5)
    torch.testing.assert_close(gate, torch.full_like(gate, 1 / (1 + math.exp(-1))))


@pytest.mark.parametrize(
    ("channels", "groups", "found"), [(16, 64, 16), (96, 64, 32), (7, 64, 1), (12, 8, 4)]
)
def test_groups_that_do_not_divide_become_the_largest_common_divisor(channels, groups, found):
    """Any number of channels works, and the gate says how many groups there are."""
    block = scrambled("sge", channels, groups=groups)
    assert block.attention(noise(2, channels, 3, 3))["gate"].shape == (2, found, 3, 3)


@pytest.mark.parametrize("size", [(1, 1), (7, 5)])
@pytest.mark.parametrize("name", ["simam", "sge"])
def test_maps_without_variation_are_finite(name, size):
    """One position, or the same value everywhere: no 0 / 0, forward or backward."""
    block, x = build(name, init="paper"), torch.full((2, 16, *size), 3.0, requires_grad=True)
    y = block(x)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert torch.isfinite(x.grad).all()


def test_simam_lifts_what_differs():
    """A position far from its channel's mean has a larger gate than one at the mean."""
    x = torch.zeros(1, 1, 5, 5)
    x[..., 2, 2] = 10
    gate = build("simam", 1, init="paper").attention(x)["gate"]
    assert gate[0, 0, 2, 2] > gate[0, 0, 0, 0] > 0.5


@pytest.mark.parametrize(
    ("name", "args", "text"),
    [
        ("sam_pointwise", {"kernel_size": 2}, "kernel_size: expected an odd whole number >= 1, found 2"),
        ("simam", {"e_lambda": 0}, "e_lambda: expected a number > 0, found 0"),
        ("simam", {"e_lambda": -1.0}, "found -1.0"),
        ("sge", {"groups": 0}, "groups: expected a whole number >= 1"),
        ("lka", {"dilation": 0}, "dilation: expected a whole number >= 1"),
        ("lka", {"kernel_size": 2.5}, "kernel_size: expected a whole number >= 1, found 2.5"),
        ("gam", {"rate": 4}, "no argument 'rate'"),
        ("scse", {"mode": "concat"}, "mode: expected one of add, max, multiply"),
    ],
)
def test_a_wrong_option_is_named_with_its_range(name, args, text):
    """Refused by the registry's check before anything is built."""
    ((_, message),) = registry.check_args(name, args)
    assert text in message
