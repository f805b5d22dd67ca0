"""Selective, masking and warping blocks: what they promise beyond what every block does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from block_cases import build, macs, noise, scrambled
from timm.layers import SelectiveKernel

from attninject import errors
from attninject.blocks import registry
from attninject.blocks.mask import max_pool, resize
from attninject.blocks.selective import patches
from attninject.blocks.warp import sample


def count(name: str, channels: int, **args: object) -> int:
    """Trainable numbers of one block, but for the α of a blend."""
    return sum(p.numel() for k, p in build(name, channels, **args).named_parameters() if k != "alpha")


# --- parameters and operations --------------------------------------------------------------------


@pytest.mark.parametrize(("c", "r"), [(64, 16), (96, 4), (7, 16)])
def test_counts_by_hand(c, r):
    """Each block's count as a formula in channels C and hidden width h = max(1, ⌊C / r⌋)."""
    h, d = max(1, c // r), max(32, c // r)
    groups = {64: 32, 96: 32, 7: 1}[c]
    assert count("sk", c, reduction=r) == 2 * (9 * c * c // groups + 2 * c) + c * d + 2 * d + 2 * c * d
    assert count("multiscale_spatial", c) == 2 * (9 + 25 + 49 + 9) + 4 * 2
    assert count("multiscale_spatial", c, fuse="conv", norm=False) == 2 * (9 + 25 + 49 + 9) + 4 + 1
    f = max(1, c // 4)
    coarse, fine = (c * h + h) + (h * c + c) + (h + 1), (9 * c * f + f) + (f * c + c)
    assert count("dynamic_capacity", c, reduction=r) == coarse + fine
    m = 3 * h
    assert count("stn", c, reduction=r) == (9 * c * h + h) + (m * m + m) + (6 * m + 6)
    assert count("stn", c, reduction=r, mode="attention") == (9 * c * h + h) + (m * m + m) + (3 * m + 3)
    cell = 3 * (9 * 2 * h * h + h)
    assert count("recurrent_gate", c, reduction=r) == (c * h + h) + cell + (h * c + c)
    unit = (2 * c + c * h) + (2 * h + 9 * h * h) + (2 * h + h * c)
    mask = 2 * (2 * c + c * c) + c
    assert count("residual_attention", c, reduction=r) == (2 + 2 + 2 + 1) * unit + mask
    assert count("residual_attention", c, reduction=r, trunk=0, depth=1, units=3) == 6 * unit + mask


def test_steps_share_one_cell():
    """More steps cost operations, not parameters, and change the gate."""
    one, five = (scrambled("recurrent_gate", 16, steps=n) for n in (1, 5))
    assert [p.shape for p in one.parameters()] == [p.shape for p in five.parameters()]
    x = noise(1, 16, 7, 5)
    assert macs(five, x) == 5 * macs(one, x)
    assert not torch.allclose(one(x), five(x))


def test_the_fine_path_costs_only_its_positions():
    """Of dynamic capacity's operations, those of the fine path are k times those of one position."""
    x, c, f, h = noise(1, 16, 8, 8), 16, 4, 1
    coarse = 64 * (c * h + h * c + h)
    for k in (1, 10, 64):
        assert macs(build("dynamic_capacity", c, k=k), x) == coarse + k * (9 * c * f + f * c)


def test_operations_of_sk_and_multiscale_by_hand():
    """One multiply-accumulate per weight and position, the fully connected part once."""
    x, c = noise(1, 16, 8, 8), 16
    fc = c * 32 + 32 * 2 * c
    assert macs(build("sk", c, groups=1), x) == 2 * 9 * c * c * 64 + fc
    assert macs(build("multiscale_spatial", c), x) == 64 * 2 * (9 + 25 + 49 + 9)


# --- selective kernel -----------------------------------------------------------------------------


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("groups", [1, 8])
def test_sk_is_timms_with_its_weights(groups, train):
    """timm's SelectiveKernel that does not split its input: other names, the same output."""
    torch.manual_seed(3)
    theirs = SelectiveKernel(64, split_input=False, groups=groups, rd_channels=32).train(mode=train)
    ours = build("sk", 64, init="paper", groups=groups).train(mode=train)
    names = {"bn": "norm", "attn.fc_reduce": "fc_reduce", "attn.bn": "norm", "attn.fc_select": "fc_select"}
    weights = {}
    for key, value in theirs.state_dict().items():
        owner, _, last = key.rpartition(".")
        weights[f"{names.get(owner) or owner.replace('.bn', '.norm')}.{last}"] = value
    ours.load_state_dict(weights)
    x = noise(3, 64, 7, 5)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_sk_weighs_its_branches_to_one():
    """For every channel the branches' weights are a distribution."""
    weights = scrambled("sk", branches=[[1, 1], [3, 1], [5, 3]]).attention(noise(2, 16, 7, 5))["branches"]
    assert weights.shape == (2, 3, 16, 1, 1)
    torch.testing.assert_close(weights.sum(1), torch.ones(2, 16, 1, 1))


# --- dynamic capacity -----------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "n"), [(1, 1), (5, 5), (35, 35), (99, 35), (0.25, 8), (0.01, 1), (0.999, 34)])
def test_k_positions_take_the_fine_path(k, n):
    """A count, a fraction (at least one), or all where there are fewer."""
    fine = scrambled("dynamic_capacity", k=k).attention(noise(2, 16, 7, 5))["fine"]
    assert fine.shape == (2, 1, 7, 5)
    assert fine.sum((1, 2, 3)).tolist() == [n, n]


def test_only_the_chosen_positions_depend_on_the_fine_path():
    """Other weights in the fine path change the k chosen positions and no other."""
    block, x = scrambled("dynamic_capacity", k=4).eval(), noise(1, 16, 7, 5)
    before, fine = block(x), block.attention(x)["fine"].bool()
    with torch.no_grad():
        block.fine2.weight.mul_(-2)
    changed = (block(x) != before).any(1, keepdim=True)
    assert torch.equal(changed, fine)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_patches_are_those_that_a_convolution_reads(dims):
    """The values around each position, zeros outside, in a convolution's order."""
    x = noise(2, 3, *(4, 3, 5)[:dims])
    index = torch.arange(x[0, 0].numel()).flip(0).expand(2, -1)
    found = patches(x, index, 3)
    weight = noise(1, 3, *[3] * dims, seed=4)
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims](x, weight, padding=1)
    torch.testing.assert_close(found @ weight.flatten(), conv.flatten(1).flip(1), rtol=1e-5, atol=1e-5)


# --- masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1,), (8,), (7, 6), (1, 5), (3, 1, 4)], ids=str)
def test_pooling_and_resizing_are_torchs(size):
    """The deterministic pieces give what torch's pooling and interpolation give, at every size."""
    x = noise(2, 3, *size, dtype=torch.float64)
    pool = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[len(size)]
    assert torch.equal(max_pool(x), pool(x, 3, stride=2, padding=1))
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)]
    for target in ((9, 8, 7), (1, 2, 3), (5, 5, 5)):
        expected = F.interpolate(x, target[: len(size)], mode=mode)
        torch.testing.assert_close(resize(x, target[: len(size)]), expected, rtol=1e-12, atol=1e-12)


def test_residual_attention_without_a_trunk_is_a_gate():
    """With `trunk=0` the mask multiplies x itself, by 1 + σ as published and by 2σ in the identity form."""
    for init, least, most in (("paper", 1, 2), ("identity", 0, 2)):
        block, x = scrambled("residual_attention", trunk=0, init=init).eval(), noise(2, 16, 9, 5)
        gate = block.attention(x)["gate"]
        assert least <= gate.min() < gate.max() <= most
        torch.testing.assert_close(block(x), x * gate)


# --- spatial transformer --------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["zeros", "border"])
@pytest.mark.parametrize("size", [(7, 5), (1, 7), (1, 1), (3, 4, 5)], ids=str)
def test_sampling_is_torchs_with_its_gradients(size, padding):
    """affine_grid and grid_sample of θ = (I, 0) + offset: the same values, the same gradients."""
    dims = len(size)
    grads, outputs = [], []
    for ours in (True, False):
        torch.manual_seed(0)
        block = build("stn", 4, dims=dims, padding=padding).double()
        x = noise(2, 4, *size, dtype=torch.float64).requires_grad_()
        theta = (0.3 * noise(2, dims, dims + 1, dtype=torch.float64)).requires_grad_()
        if ours:
            block.theta = lambda x, theta=theta: theta
            y = block(x)
        else:
            unit = torch.eye(dims, dims + 1, dtype=torch.float64) + theta
            order = [*reversed(range(dims)), dims]  # torch numbers the axes from the last
            grid = F.affine_grid(unit.flip(1)[:, :, order], [*x.shape], align_corners=False)
            y = F.grid_sample(x, grid, padding_mode=padding, align_corners=False)
        y.square().sum().backward()
        outputs.append(y.detach())
        grads.append((x.grad, theta.grad))
    torch.testing.assert_close(outputs[0], outputs[1])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_whole_pixel_moves_exactly():
    """An offset of one row down and two columns left moves the map, bit for bit, with zeros behind it."""
    x = noise(1, 3, 6, 5, dtype=torch.float16)
    offset = torch.tensor([1.0, -2.0]).view(1, 2, 1, 1).expand(1, 2, 6, 5)
    y = sample(x, offset, border=False)
    assert torch.equal(y[..., :5, 2:], x[..., 1:, :3])
    assert not y[..., 5, :].any()
    assert not y[..., :2].any()
    held = sample(x, offset, border=True)
    assert torch.equal(held[..., 5, 2:], x[..., 5, :3])


@pytest.mark.parametrize("far", [1e4, -1e30, float("inf"), float("nan")])
def test_any_offset_stays_inside_memory(far):
    """Offsets beyond every whole number read zeros (no number: no number), and never other memory."""
    y = sample(noise(1, 2, 4, 3), torch.full((1, 2, 4, 3), far), border=False)
    assert y.isnan().all() if far != far else not y.any()


def test_identity_is_exact_at_awkward_sizes():
    """At sizes where p / n · n is not p in floating point, the fresh block still returns every bit."""
    for size in ((41, 11), (1, 49), (224, 3)):
        x = noise(1, 2, *size)
        assert torch.equal(build("stn", 2)(x), x)


# --- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "args", "text"),
    [
        ("sk", {"branches": [[3, 1]]}, "at least 2 pairs [odd kernel size, dilation >= 1]"),
        ("sk", {"branches": [[3, 1], [4, 1]]}, "found [[3, 1], [4, 1]]"),
        ("sk", {"branches": [[3, 1], [3, 0]]}, "dilation >= 1"),
        ("sk", {"branches": 3}, "as [[3, 1], [3, 2]], found 3"),
        ("sk", {"branches": [[3, 1], [3.0, 1]]}, "found [[3, 1], [3.0, 1]]"),
        ("sk", {"min_width": 0}, "a whole number >= 1"),
        ("multiscale_spatial", {"fuse": "max"}, "one of sum, conv, mean"),
        ("dynamic_capacity", {"k": 0}, "a whole number of positions >= 1 or a fraction"),
        ("dynamic_capacity", {"k": 1.5}, "found 1.5"),
        ("dynamic_capacity", {"k": True}, "found True"),
        ("stn", {"mode": "rigid"}, "one of affine, attention"),
        ("stn", {"padding": "reflect"}, "one of zeros, border"),
        ("residual_attention", {"depth": 0}, "a whole number from 1 to 6"),
        ("recurrent_gate", {"steps": 0}, "a whole number from 1 to 32"),
    ],
)
def test_a_wrong_option_is_named_with_its_range(name, args, text):
    """The message says what was expected and found."""
    with pytest.raises(errors.BlockError) as caught:
        registry.create_block(name, 16, **args)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    "name", ["sk", "multiscale_spatial", "dynamic_capacity", "stn", "residual_attention", "recurrent_gate"]
)
def test_published_biases_start_at_zero(name):
    """Fresh blocks in their published form hold no bias but zero."""
    block = registry.create_block(name, 64, init="paper")
    assert not any(p.any() for k, p in block.named_parameters() if k.endswith("bias"))
