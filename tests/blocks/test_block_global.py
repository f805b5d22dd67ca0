"""Global attention beside torch's and timm's modules, counted by hand, and what its options promise."""

from __future__ import annotations

import pytest
import torch
from block_cases import build, macs, noise, scrambled
from timm.layers.non_local_attn import NonLocalAttn
from timm.models.twins import GlobalSubSampleAttn, LocallyGroupedAttn
from timm.models.vision_transformer import Attention
from torch import nn

from attninject.blocks import registry
from attninject.blocks.attend import attend, attention_rows, bounded, relu_of_sums, saturated
from attninject.blocks.sca import distribution
from attninject.blocks.windows import assemble, partition
from attninject.errors import BlockError, TooFewChannelsError

# --- torch's and timm's modules -------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 4])
def test_mhsa_is_torchs_multihead_attention(heads):
    """With nn.MultiheadAttention's weights the block gives its output and its averaged weights."""
    torch.manual_seed(3)
    theirs = nn.MultiheadAttention(16, heads, batch_first=True)
    nn.init.normal_(theirs.in_proj_bias)
    ours = build("mhsa", 16, dims=1, init="paper", num_heads=heads, residual=False)
    ours.load_state_dict(
        {
            "qkv.weight": theirs.in_proj_weight,
            "qkv.bias": theirs.in_proj_bias,
            "proj.weight": theirs.out_proj.weight,
            "proj.bias": theirs.out_proj.bias,
        }
    )
    x = noise(2, 16, 9)
    expected, weights = theirs(*[x.transpose(1, 2)] * 3)
    torch.testing.assert_close(ours(x), expected.transpose(1, 2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.attention(x)["rows"].mean(1), weights, rtol=1e-5, atol=1e-6)


def test_mhsa_is_timms_attention_key_by_key():
    """timm's Attention loads as it is."""
    torch.manual_seed(3)
    theirs = Attention(16, num_heads=4, qkv_bias=True)
    ours = build("mhsa", 16, dims=1, init="paper", num_heads=4, residual=False)
    ours.load_state_dict(theirs.state_dict())
    x = noise(2, 16, 9)
    torch.testing.assert_close(ours(x), theirs(x.transpose(1, 2)).transpose(1, 2), rtol=1e-5, atol=1e-6)


def on_map(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """A timm module over tokens and their grid, on x: (B, C, H, W)."""
    y = module(x.flatten(2).transpose(1, 2), tuple(x.shape[2:]))
    return y.transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_nonlocal_is_timms_with_its_weights(train):
    """timm's NonLocalAttn without its scale: the same output under other keys."""
    torch.manual_seed(0)
    theirs = NonLocalAttn(64, use_scale=False).train(train)
    with torch.no_grad():
        theirs.norm.weight.normal_()  # timm starts it at zero, which would hide everything
    ours = build("nonlocal", 64, init="paper", reduction=8, divisor=8).train(train)
    layers = {"t": "theta", "p": "phi", "g": "g", "z": "out", "norm": "norm"}
    parts = ((*key.split("."), tensor) for key, tensor in theirs.state_dict().items())
    ours.load_state_dict({f"{layers[layer]}.{kind}": tensor for layer, kind, tensor in parts})
    x = noise(2, 64, 7, 5)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_twins_lsa_is_timms_where_windows_fit():
    """timm's LocallyGroupedAttn loads as it is and agrees; where windows do not fit, only ours masks."""
    torch.manual_seed(3)
    theirs = LocallyGroupedAttn(16, num_heads=4, ws=3)
    ours = build("twins_lsa", init="paper", window_size=3, num_heads=4, norm=False, residual=False)
    ours.load_state_dict(theirs.state_dict())
    fits, ragged = noise(2, 16, 6, 9), noise(2, 16, 7, 9)
    torch.testing.assert_close(ours(fits), on_map(theirs, fits), rtol=1e-5, atol=1e-6)
    same = torch.isclose(ours(ragged), on_map(theirs, ragged), rtol=1e-5, atol=1e-6)
    assert same[:, :, :6].all()
    assert not same[:, :, 6].all()


@pytest.mark.parametrize("ratio", [1, 2])
def test_twins_gsa_is_timms_where_cells_fit(ratio):
    """timm's GlobalSubSampleAttn loads as it is and agrees, with and without sub-sampling."""
    torch.manual_seed(3)
    theirs = GlobalSubSampleAttn(16, num_heads=4, sr_ratio=ratio)
    ours = build("twins_gsa", init="paper", sr_ratio=ratio, num_heads=4, norm=False, residual=False)
    ours.load_state_dict(theirs.state_dict())
    x = noise(2, 16, 6, 4)
    torch.testing.assert_close(ours(x), on_map(theirs, x), rtol=1e-5, atol=1e-6)


# --- counted by hand ------------------------------------------------------------------------------


def count(name: str, channels: int, **args) -> int:
    """Trainable numbers of one block."""
    return sum(p.numel() for p in build(name, channels, **args).parameters())


@pytest.mark.parametrize(("c", "r"), [(64, 4), (24, 8), (40, 3)])
def test_counts_by_hand(c, r):
    """Every block's count as a formula in channels C and width d = max(1, ⌊C / r⌋)."""
    d = max(1, c // r)
    assert count("nonlocal", c, reduction=r, mode="dot_product") == 3 * (c * d + d) + d * c + c + 2 * c
    assert count("nonlocal", c, reduction=r, mode="gaussian") == (c * d + d) + d * c + c + 2 * c
    assert (
        count("nonlocal", c, reduction=r, mode="concatenation", norm=False, bias=False) == 4 * c * d + 2 * d
    )
    assert count("self_attention", c, reduction=r) == 2 * (c * d + d) + c * c + c
    assert count("mhsa", c) == 4 * (c * c + c)
    assert count("mhsa", c, bias=False) == 4 * c * c
    assert count("generalized", c) == 4 * c * c + c + 4 * 16 * c + 2 * c
    assert count("generalized", c, terms="0010") == 3 * c * c + c + c
    assert count("generalized", c, terms="0100", frequencies=5, dims=3) == 3 * c * c + c + 6 * 5 * c
    lsa, gsa = 4 * (c * c + c) + 2 * c, 4 * (c * c + c) + 16 * c * c + c + 4 * c
    assert (count("twins_lsa", c), count("twins_gsa", c), count("twins", c)) == (lsa, gsa, lsa + gsa)
    assert count("twins_gsa", c, sr_ratio=1, norm=False, bias=False) == 4 * c * c + c
    assert count("a2", c, reduction=r) == 3 * (c * d + d) + d * c + c
    assert count("external", c, memory=r) == 2 * c * c + c + 2 * r * c + 2 * c
    assert count("danet_cam", c) == 1
    assert count("danet_pam", c, reduction=r) == 2 * (c * d + d) + c * c + c + 1
    assert count("danet", c, reduction=r) == 2 * (c * d + d) + c * c + c + 2
    assert count("sca", c, reduction=r) == (2 * d + c * d + d + 1) + (c * d + d + c * d + d + 1)


def test_multiplications_by_hand():
    """One per multiply-add, C = 16, N = 24: linear layers, then attention at its padded head size."""
    c, n = 16, 24
    linear = n * c  # one output channel of a layer over C

    def found(name: str, **args) -> int:
        return macs(build(name, **args), noise(2, c, 6, 4))

    assert found("self_attention") == 3 * linear * c + 2 * n * n * c
    assert found("mhsa", num_heads=4) == 4 * linear * c + 2 * n * n * c
    assert found("nonlocal", norm=False) == 4 * linear * 8 + 2 * n * n * 8
    assert found("nonlocal", mode="dot_product") == 4 * linear * 8 + 2 * n * 8 * 8
    assert found("danet_pam") == linear * (2 + 2 + c) + 2 * n * n * c
    assert found("danet_cam") == 2 * c * c * n
    assert found("a2") == 4 * linear * 4 + 2 * n * 4 * 4
    assert found("external", memory=5) == 2 * linear * c + 2 * linear * 5
    assert found("generalized", terms="0010", num_heads=4) == (
        2 * linear * c + 2 * n * c + c * c  # one row for all positions, also through W
    )


# --- linear non-local forms -----------------------------------------------------------------------


def test_sorted_prefix_sums_equal_the_sum_over_all_pairs():
    """Σ relu(a + b) g in float64 to 1e-12, with its gradients, also where a and b share a large offset."""
    a, b, g = (
        noise(2, *shape, seed=i, dtype=torch.float64) for i, shape in enumerate([(50,), (40,), (40, 3)])
    )
    for offset in (0.0, 1e4):
        inputs = [t.clone().requires_grad_() for t in (a + offset, b - offset, g)]
        fast = relu_of_sums(*inputs)
        slow = torch.relu(inputs[0].unsqueeze(2) + inputs[1].unsqueeze(1)) @ inputs[2]
        torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-9)
        weight = noise(*fast.shape, dtype=torch.float64)
        for one, other in zip(
            torch.autograd.grad(fast, inputs, weight), torch.autograd.grad(slow, inputs, weight), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_sorted_prefix_sums_at_their_ends():
    """No pair positive gives zero, every pair positive the plain sum, ties and one element work."""
    g = noise(1, 4, 2, dtype=torch.float64)
    b = torch.tensor([[0.0, 1.0, 1.0, 2.0]], dtype=torch.float64)
    for a in (-2.0, -1.0, 0.0, 5.0):
        t = torch.tensor([[a]], dtype=torch.float64)
        torch.testing.assert_close(relu_of_sums(t, b, g), torch.relu(t + b).unsqueeze(1) @ g)
    one = relu_of_sums(b[:, :1], b[:, 3:], g[:, :1])
    torch.testing.assert_close(one, 2 * g[:, :1])


def test_unbounded_forms_stay_finite_in_half_precision():
    """Trained dot-product and concatenation blocks saturate in float16 where their sums leave its range."""
    for mode in ("dot_product", "concatenation"):
        block, x = scrambled("nonlocal", mode=mode, norm=False), 1e3 * noise(2, 16, 7, 5).sign()
        assert block(x).abs().max() > 1e5
        y = block.half()(x.half())
        assert not torch.isnan(y).any()
        y.backward(torch.zeros_like(y))
        assert all(torch.isfinite(p.grad).all() for p in block.parameters())
    assert saturated(torch.tensor([1e6, -1e6, 3.0]), torch.float16).tolist() == [65504, -65504, 3]


# --- the fused attention's helpers ----------------------------------------------------------------


@pytest.mark.parametrize(("d", "e"), [(4, 4), (4, 10), (10, 4)])
def test_unequal_head_sizes_are_padded(d, e):
    """Queries narrower or wider than the values give what the written-out matrix gives."""
    q, k, v = (noise(2, 3, *s, seed=i, dtype=torch.float64) for i, s in enumerate([(7, d), (5, d), (5, e)]))
    torch.testing.assert_close(attend(q, k, v, 0.7), torch.softmax(0.7 * q @ k.transpose(2, 3), 3) @ v)
    torch.testing.assert_close(attend(q, k, v, 0.7), attention_rows(q, k, 0.7) @ v)


@pytest.mark.parametrize(("d", "scale"), [(8, 1.0), (64, 0.125), (2048, 1.0)])
def test_half_precision_queries_are_cut_only_where_logits_leave_float32s_grip(d, scale):
    """Logits of 2²⁴ and below pass unchanged, larger ones become 2²⁴; float32 is never touched."""
    ones = torch.ones(1, d)
    cut = bounded((1e4 * ones).half(), scale).float()
    assert (scale * cut @ cut.T).item() == pytest.approx(2**24, rel=2e-3)
    assert torch.equal(bounded((20 * ones).half(), scale), (20 * ones).half())
    assert torch.equal(bounded(1e6 * ones, scale), 1e6 * ones)


@pytest.mark.parametrize("name", ["mhsa", "self_attention", "nonlocal", "danet_pam", "twins"])
def test_extreme_logits_in_half_precision_train_without_nan(name):
    """With random weights and logits around 10⁸ in float16, output and gradient are numbers."""
    block = scrambled(name).half()
    x = (2e3 * noise(2, 16, 8, 8).sign()).half().requires_grad_()
    y = block(x)
    y.backward(torch.zeros_like(y))
    assert torch.isfinite(y).all()
    assert torch.isfinite(x.grad).all()


# --- heads, windows, terms ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mhsa", "generalized", "twins_lsa", "twins_gsa", "twins"])
def test_heads_that_do_not_divide_are_refused_with_the_fix(name):
    """The message names the channels, the heads, and the numbers of heads that would do."""
    with pytest.raises(
        TooFewChannelsError,
        match=r"12 channels cannot be split into 8 heads of equal size; "
        r"choose num_heads among 1, 2, 3, 4, 6, 12$",
    ):
        build(name, 12)
    for channels in (1, 3, 7):
        block = build(name, channels, num_heads=channels)
        x = noise(2, channels, 7, 5)
        assert torch.equal(block(x), x)


@pytest.mark.parametrize("wrong", [1111, 8, "0000", "111", "11111", "1012", "", None, "١١١١"])
def test_terms_are_four_binary_digits(wrong):
    """Anything else is refused, and a bare number is explained."""
    with pytest.raises(BlockError, match=r"four 0s and 1s.*YAML reads a bare 0010 as the number 8"):
        build("generalized", 16, terms=wrong)


@pytest.mark.parametrize(
    ("name", "args", "text"),
    [
        ("nonlocal", {"mode": "gauss"}, "one of embedded_gaussian, gaussian, dot_product, concatenation"),
        ("mhsa", {"num_heads": 0}, "num_heads: expected a whole number >= 1, found 0"),
        ("twins_lsa", {"window_size": 0}, "window_size: expected a whole number >= 1, found 0"),
        ("twins_gsa", {"sr_ratio": 1.5}, "sr_ratio: expected a whole number >= 1, found 1.5"),
        ("external", {"memory": 0}, "memory: expected a whole number >= 1, found 0"),
        ("generalized", {"frequencies": 0}, "frequencies: expected a whole number >= 1, found 0"),
        ("danet_cam", {"invert": "yes"}, "invert: expected true or false, found 'yes'"),
        ("sca", {"gate": "softmaxx"}, "gate: expected one of softmax, sigmoid"),
        ("sca", {"order": "parallel"}, "order: expected one of channel_first, spatial_first"),
    ],
)
def test_options_are_checked_with_their_ranges(name, args, text):
    """A wrong option is named with what was expected."""
    ((_, message),) = registry.check_args(name, args)
    assert text in message


@pytest.mark.parametrize("size", [(5,), (6,), (4, 7), (1, 1), (2, 3, 5)])
def test_windows_come_back_to_their_places(size):
    """Cutting into windows of 3 and assembling again is the identity, whatever the size."""
    x = noise(2, 4, *size)
    parts = partition(x.movedim(1, -1), 3)
    assert parts.shape[1:] == (3 ** len(size), 4)
    assert torch.equal(assemble(parts, x, 3), x)


def test_a_window_sees_itself_only():
    """Changing one position changes the outputs of its own window and no other."""
    block, x = scrambled("twins_lsa", window_size=3).eval(), noise(1, 16, 7, 7)
    other = x.clone()
    other[..., 6, 0] += 1
    changed = (block(x) != block(other)).any(1)[0]
    assert changed[6:, :3].all()
    assert not changed[:6].any()
    assert not changed[:, 3:].any()
    rows = block.attention(x)["rows"]
    assert rows.shape == (1, 9, 8, 9, 9)
    torch.testing.assert_close(rows.sum(4), torch.ones(1, 9, 8, 9))
    assert not rows[:, 8, :, :, 1:].any()  # the last window holds one position


@pytest.mark.parametrize("name", ["self_attention", "mhsa", "a2", "external", "danet", "sca"])
def test_blocks_that_need_no_grid_do_not_see_the_order_of_positions(name):
    """Permuted tokens give the permuted output: why these run on any sequence."""
    assert not registry.get(name).spatial
    block, x = scrambled(name, dims=1).eval(), noise(2, 16, 12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(block(x[..., order]), block(x)[..., order], rtol=1e-4, atol=1e-5)


def test_generalized_attention_sees_the_order_only_through_its_positional_terms():
    """Content terms ignore where positions are, the positional ones do not."""
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    x = noise(2, 16, 12)
    for terms, same in (("1010", True), ("0010", True), ("0001", False), ("1100", False)):
        block = scrambled("generalized", dims=1, terms=terms)
        assert torch.allclose(block(x[..., order]), block(x)[..., order], rtol=1e-4, atol=1e-5) is same


def test_generalized_position_rows_depend_on_the_offset_alone():
    """With the term `0001` alone, query i gives key j what i + 1 gives j + 1, up to the row's own sum."""
    rows = (
        scrambled("generalized", dims=1, terms="0001")
        .double()
        .attention(noise(1, 16, 10, dtype=torch.float64))["rows"][0]
    )
    logits = rows.log()
    for i in range(9):
        shift = logits[:, i + 1, 1:] - logits[:, i, :-1]
        torch.testing.assert_close(shift, shift[:, :1].expand_as(shift))


# --- identity -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["self_attention", "mhsa", "generalized", "twins_lsa", "twins", "a2", "external"]
)
def test_without_a_residual_identity_means_blend(name):
    """`residual: false` under identity starts at x by one zero α; under paper the branch comes alone."""
    block, x = build(name, residual=False), noise(2, 16, 7, 5)
    assert block.init == "blend"
    assert torch.equal(block(x), x)
    alone, added = (scrambled(name, init="paper", residual=r).eval() for r in (False, True))
    if name != "twins":  # whose second half has another input then
        torch.testing.assert_close(alone(x) + x, added(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2, 11, 41, 1000, 4099])
def test_scas_softmax_is_exactly_one_at_zero(count):
    """Where K · softmax(0) is not, for K = 41 in float32."""
    assert torch.equal(distribution(torch.zeros(2, 1, count), True), torch.ones(2, 1, count))
    z = noise(2, 1, count, dtype=torch.float64)
    torch.testing.assert_close(distribution(z, True), count * distribution(z, False))


def test_scas_softmax_is_float32_under_autocast():
    """The factors come from float32 logits whatever precision the layers ran in."""
    block = scrambled("sca")
    with torch.autocast("cpu", torch.bfloat16):
        x = noise(2, 16, 7, 5).bfloat16()
        assert {half(x).dtype for half in (block.channel, block.spatial)} == {torch.float32}
        torch.testing.assert_close(block.spatial(x).sum((1, 2, 3)), torch.tensor([35.0, 35.0]))


def test_danet_cam_prefers_what_is_least_alike():
    """The released code's max − E turns the order of the paper's weights around."""
    x = noise(2, 16, 7, 5)
    released = build("danet_cam").attention(x)["rows"]
    paper = build("danet_cam", invert=False).attention(x)["rows"]
    assert (paper.argmax(2) == torch.arange(16)).all()
    assert not (released.argmax(2) == torch.arange(16)).any()
