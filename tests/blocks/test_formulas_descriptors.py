"""ECA, GCT, SRM, GC and GE: counts by hand, timm's modules, published starts, refusals and edges."""

from __future__ import annotations

import math

import pytest
import torch
from block_cases import build, macs, noise, scrambled
from family_descriptors import ge
from timm.layers import EcaModule, GatherExcite, GlobalContext

from attninject.blocks import registry
from attninject.blocks.descriptors import adaptive_kernel, window_means
from attninject.errors import BlockError


def count(name, channels, **args):
    """Trainable numbers of one block."""
    return sum(p.numel() for p in build(name, channels, init="paper", **args).parameters())


@pytest.mark.parametrize(("c", "r"), [(64, 16), (96, 4), (7, 16), (30, 4)])
def test_counts_by_hand(c, r):
    """Every block's count as a formula in channels C and hidden width h = max(1, ⌊C / r⌋)."""
    h = max(1, c // r)
    mlp = (c * h + h) + 2 * h + (h * c + c)
    assert count("eca", c) == adaptive_kernel(c)
    assert count("eca", c, kernel_size=9) == 9
    assert count("gct", c) == 3 * c
    assert count("srm", c) == 2 * c + 2 * c
    assert count("gc", c, reduction=r) == c + 1 + mlp
    assert count("gc", c, reduction=r, fusion="both", pool="avg") == 2 * mlp
    assert count("ge", c, mode="theta_minus") == 0
    assert count("ge", c, extent=8) == 3 * (9 * c + 2 * c)
    assert count("ge", c, extent=0, feat_size=7) == 49 * c + 2 * c
    assert count("ge", c, mode="theta_plus", extent=2, reduction=r) == 11 * c + 2 * c * h + h + c


def test_adaptive_eca_on_resnet50_gives_the_published_count():
    """86 weights behind the last norm of each of the 16 residual blocks."""
    widths = [256] * 3 + [512] * 4 + [1024] * 6 + [2048] * 3
    assert 25557032 + sum(count("eca", c) for c in widths) == 25557118


def test_eca_kernels_grow_with_the_channels():
    """Odd sizes nearest to (log₂ C + 1) / 2; with other γ and b as eq. 12 says."""
    assert [adaptive_kernel(2**n) for n in range(12)] == [1, 1, 1, 3, 3, 3, 3, 5, 5, 5, 5, 7]
    assert adaptive_kernel(256, gamma=1, beta=1) == 9


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("eca", {"kernel_size": 5}, 64 * 5),
        ("gc", {"reduction": 4}, 2 * 64 * 35 + 2 * 64 * 16),
        ("gc", {"reduction": 4, "pool": "avg"}, 2 * 64 * 16),
        ("ge", {"mode": "theta", "extent": 2}, 64 * 9 * 4 * 3),
        ("ge", {"mode": "theta_minus"}, 0),
        ("gct", {}, 0),
    ],
)
def test_multiplications_by_hand(name, args, expected):
    """The multiply-accumulates of convolutions and matrix products, no more."""
    assert macs(build(name, 64, init="paper", **args), noise(2, 64, 7, 5)) == expected


# --- timm -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [16, 64, 256, 1024])
def test_eca_is_timms_with_its_weights(channels):
    """timm's EcaModule: the same key, kernel and output."""
    theirs, ours = EcaModule(channels), build("eca", channels, init="paper")
    ours.load_state_dict(theirs.state_dict())
    x = noise(2, channels, 7, 5)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)


def test_eca_of_few_channels_follows_the_paper_where_timm_does_not():
    """For four channels eq. 12 gives a kernel of one; timm's is three."""
    assert build("eca", 4).conv.weight.numel() == 1
    assert EcaModule(4).conv.weight.numel() == 3


@pytest.mark.parametrize("pool", ["att", "avg"])
@pytest.mark.parametrize("fusion", ["add", "multiply", "both"])
def test_gc_is_timms_with_its_weights(fusion, pool):
    """timm's GlobalContext: the same keys, and with its ε the same output."""
    torch.manual_seed(3)
    theirs = GlobalContext(
        64, use_attn=pool == "att", fuse_add=fusion != "multiply", fuse_scale=fusion != "add"
    )
    ours = build("gc", 64, init="paper", reduction=8, fusion=fusion, pool=pool)
    for norm in (m for m in ours.modules() if isinstance(m, torch.nn.LayerNorm)):
        norm.eps = 1e-6
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(0, 0.3)
    ours.load_state_dict(theirs.state_dict())
    x = noise(2, 64, 7, 5)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(7, 5), (16, 24), (1, 9)])
@pytest.mark.parametrize("extent", [0, 2, 4, 8])
def test_parameter_free_ge_is_timms(extent, size):
    """timm's GatherExcite without layers, for every extent."""
    theirs = GatherExcite(16, extent=extent, use_mlp=False)
    ours = build("ge", mode="theta_minus", extent=extent, init="paper")
    x = noise(2, 16, *size)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)


# --- as published ---------------------------------------------------------------------------------


def test_fresh_published_gates_are_flat():
    """SRM and multiplying GC start with every gate at one half; GCT with every gate at one."""
    x = noise(2, 64, 7, 5)
    for name, args, value in (("srm", {}, 0.5), ("gc", {"fusion": "multiply"}, 0.5), ("gct", {}, 1.0)):
        gate = build(name, 64, init="paper", **args).attention(x)["gate"]
        assert torch.equal(gate, torch.full_like(gate, value))


def test_gct_does_not_care_how_loud_all_channels_are_together():
    """Eq. 3 divides by the channels' mean size, so a hundred times the input has the same gates."""
    block, x = scrambled("gct").double(), noise(2, 16, 7, 5, dtype=torch.float64)
    near = block.attention(x)["gate"]
    assert near.std() > 0.01
    torch.testing.assert_close(block.attention(100 * x)["gate"], near, rtol=1e-4, atol=1e-4)


def test_gc_weights_are_a_distribution_over_positions():
    """One weight per position, summing to one."""
    weights = scrambled("gc").attention(noise(2, 16, 7, 5))["weights"]
    assert weights.shape == (2, 1, 7, 5)
    torch.testing.assert_close(weights.sum((2, 3)), torch.ones(2, 1))


def test_ge_with_a_global_kernel_works_at_its_size_only():
    """One depthwise kernel as large as the map: exact at first, the formula, and refused at another size."""
    args = {"extent": 0, "feat_size": 6}
    x = noise(3, 16, 6, 6, dtype=torch.float64)
    assert torch.equal(build("ge", **args).double()(x), x)
    block = scrambled("ge", **args).double()
    weights = {k: v.clone() for k, v in block.state_dict().items()}
    torch.testing.assert_close(block(x), ge(x, weights, args, True, True), rtol=1e-10, atol=1e-10)
    with pytest.raises(BlockError, match=r"feat_size 6, found \[6, 5\]"):
        block(x[..., :5])


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("extent", [2, 4])
def test_window_means_of_a_constant_are_that_constant(dims, extent):
    """Only positions inside the map count, so no edge is darkened, and ⌈n / e⌉ windows cover n positions."""
    size = (9, 7, 1)[:dims]
    means = window_means(torch.full((1, 2, *size), 3.0), extent)
    assert means.shape == (1, 2, *(math.ceil(n / extent) for n in size))
    torch.testing.assert_close(means, torch.full_like(means, 3.0))


@pytest.mark.parametrize("name", ["srm", "gct"])
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_maps_give_finite_gradients(name, value):
    """A root at zero has no slope: a map without any variation, or of zeros, still trains."""
    block, x = scrambled(name), torch.full((2, 16, 7, 5), value, requires_grad=True)
    block(x).sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in (x, *block.parameters()))


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "args", "text"),
    [
        ("eca", {"kernel_size": 4}, "kernel_size: expected null or an odd whole number >= 1, found 4"),
        ("eca", {"kernel_size": True}, "found True"),
        ("eca", {"gamma": 0}, "gamma: expected a number > 0, found 0"),
        ("gct", {"mode": "l3"}, "mode: expected one of l2, l1"),
        ("gct", {"eps": 0}, "eps: expected a number > 0"),
        ("gc", {"fusion": "mul"}, "fusion: expected one of add, multiply, both"),
        ("ge", {"extent": 3}, "extent: expected one of 0, 2, 4, 8, found 3"),
        ("ge", {"feat_size": 0}, "feat_size: expected null or a whole number >= 1"),
    ],
)
def test_a_wrong_option_is_named_with_its_range(name, args, text):
    """Refused by the registry's check before anything is built."""
    ((_, message),) = registry.check_args(name, args)
    assert text in message


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ({"extent": 0}, "give feat_size .* or an extent of 2, 4 or 8, or mode 'theta_minus'"),
        ({"extent": 0, "mode": "theta_plus"}, "mode 'theta_plus' with extent 0"),
        ({"feat_size": 7}, "feat_size: only for extent 0"),
        ({"extent": 0, "mode": "theta_minus", "feat_size": 7}, "leave it out"),
    ],
)
def test_ge_options_that_contradict_each_other_are_refused(args, text):
    """A global gather with weights needs the map's size, and nothing else does."""
    with pytest.raises(BlockError, match=text):
        build("ge", **args)
