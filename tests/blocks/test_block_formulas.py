"""Each block equals its paper's formula, written again here in float64, and timm's where timm agrees."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from block_cases import (
    CASES,
    DIMS,
    NAMES,
    SIZES,
    STRAIGHT_THROUGH,
    build,
    gathered,
    label,
    noise,
    scrambled,
)
from formula_parts import Weights, batch_norm, column, conv, descriptor, gate, linear, mlp
from small import which
from timm.layers import SEModule
from timm.layers.cbam import CbamModule
from torch import Tensor

from attninject.blocks import registry


def se(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """SENet, eq. 2-4."""
    z = mlp(descriptor(x, a.get("squeeze", "avg")), w)
    return x * column(gate(z, a.get("gate", "sigmoid"), identity), x)


def channel_logits(x: Tensor, w: Weights, a: dict[str, Any], key: str = "") -> Tensor:
    """CBAM, eq. 2, before the gate."""
    kinds = {"both": ("avg", "max")}.get(a.get("pool", "both"), (a.get("pool"),))
    return column(sum(mlp(descriptor(x, kind), w, key) for kind in kinds), x)


def spatial_logits(x: Tensor, w: Weights, a: dict[str, Any], train: bool, key: str = "") -> Tensor:
    """CBAM, eq. 3, before the gate."""
    avg, top = x.sum(1, keepdim=True) / x.shape[1], x.max(1, keepdim=True).values
    pair = [avg, top] if a.get("concat") == "mean_max" else [top, avg]
    pair = {"both": pair, "avg": [avg], "max": [top]}[a.get("pool", "both")]
    z = conv(torch.cat(pair, 1), w, key + "conv")
    return batch_norm(z, w, key + "norm", train) if a.get("norm", True) else z


def channel_attention(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """CBAM, eq. 2."""
    return x * gate(channel_logits(x, w, a), a.get("gate", "sigmoid"), identity)


def spatial_attention(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """CBAM, eq. 3."""
    return x * gate(spatial_logits(x, w, a, train), a.get("gate", "sigmoid"), identity)


def cbam(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """CBAM, eq. 1, its other orders (section 5.1), and the residual form."""
    kind, order = a.get("gate", "sigmoid"), a.get("order", "channel_first")

    def half(y: Tensor, which: str) -> Tensor:
        if which == "c":
            return y * gate(channel_logits(y, w, a, "channel."), kind, identity)
        return y * gate(spatial_logits(y, w, spatial, train, "spatial."), kind, identity)

    spatial = {**a, "pool": a.get("spatial_pool", "both")}
    if order == "parallel":
        z = channel_logits(x, w, a, "channel.") + spatial_logits(x, w, spatial, train, "spatial.")
        y = x * gate(z, kind, identity)
    else:
        first, second = "cs" if order == "channel_first" else "sc"
        y = half(half(x, first), second)
    return y + x if a.get("residual") and not identity else y


def bam(x: Tensor, w: Weights, a: dict[str, Any], identity: bool, train: bool) -> Tensor:
    """BAM, eq. 1-4, with the released product or the paper's sum."""
    layers = a.get("num_layers", 2)
    c, hidden = descriptor(x, "avg"), a.get("channel_layers", 1)
    for i in range(hidden):
        c = batch_norm(linear(c, w, f"channel.{i}.conv"), w, f"channel.{i}.norm", train).clamp(min=0)
    c = linear(c, w, f"channel.{hidden}")
    s = x
    for i in range(layers + 1):
        s = conv(s, w, f"spatial.{i}.conv", dilation=a.get("dilation", 4) if i else 1)
        s = batch_norm(s, w, f"spatial.{i}.norm", train).clamp(min=0)
    s, c = conv(s, w, f"spatial.{layers + 1}"), column(c, x)
    z = c + s if a.get("mode") == "sum" else c * s
    return x * gate(z, "sigmoid", identity, skip=True)


FORMULAS: dict[str, Callable[[Tensor, Weights, dict[str, Any], bool, bool], Tensor]] = gathered("FORMULAS", {
    "se": se,
    "channel_attention": channel_attention,
    "spatial_attention": spatial_attention,
    "cbam": cbam,
    "bam": bam,
})  # fmt: skip


def formula(block: torch.nn.Module, name: str, x: Tensor, args: dict[str, Any], identity: bool) -> Tensor:
    """The reference output for the block's present weights and mode."""
    weights = {k: v.clone() for k, v in block.state_dict().items()}
    return FORMULAS[name](x, weights, args, identity, block.training)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_block_equals_its_formula(case):
    """In float64, with every weight and statistic random, block and formula agree to 1e-10, in train and eval mode."""
    name, args = case
    x = noise(3, 16, 7, 6, dtype=torch.float64)
    for init, train in itertools.product(("identity", "paper"), (True, False)):
        block = scrambled(name, init=init, **args).double().train(mode=train)
        expected = formula(block, name, x, args, init == "identity")
        said = which(init, "train" if train else "eval")
        torch.testing.assert_close(block(x), expected, rtol=1e-10, atol=1e-10, msg=said)


@pytest.mark.parametrize(("name", "dims"), DIMS)
def test_block_equals_its_formula_in_every_dimension(name, dims):
    """The same holds in 1, 2 and 3 spatial dimensions, where the block allows them."""
    block = scrambled(name, dims=dims, init="paper").double()
    x = noise(2, 16, *SIZES[dims], dtype=torch.float64)
    torch.testing.assert_close(block(x), formula(block, name, x, {}, identity=False), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dims", [1, 3])
def test_nonlocal_sub_samples_in_every_dimension(dims):
    """Pooling halves a sequence, and of a volume only height and width."""
    args = {"sub_sample": True}
    block = scrambled("nonlocal", dims=dims, **args).double()
    x = noise(2, 16, *SIZES[dims], dtype=torch.float64)
    torch.testing.assert_close(block(x), formula(block, "nonlocal", x, args, True), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_block_in_float32_stays_near_the_float64_formula(case):
    """Float32 agrees with the float64 formula to a few units in the fifth digit."""
    name, args = case
    block, x = scrambled(name, **args), noise(3, 16, 7, 6)
    exact = FORMULAS[name](
        x.double(), {k: v.double() for k, v in block.state_dict().items()}, args, True, True
    )
    torch.testing.assert_close(block(x).double(), exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("case", [c for c in CASES if c[0] in STRAIGHT_THROUGH], ids=label)
def test_a_straight_gradient_is_the_formulas(case):
    """Where a choice has no gradient, that of the formula's soft form arrives at the input and every weight."""
    name, args = case
    block, x = scrambled(name, **args).double(), noise(2, 16, 4, 3, dtype=torch.float64).requires_grad_()
    weights = {k: p.detach().clone().requires_grad_() for k, p in block.named_parameters()}
    u = noise(2, 16, 4, 3, seed=5, dtype=torch.float64)
    expected = torch.autograd.grad(FORMULAS[name](x, weights, args, True, True), [x, *weights.values()], u)
    torch.testing.assert_close(torch.autograd.grad(block(x), [x, *block.parameters()], u), expected)


@pytest.mark.parametrize("case", [c for c in CASES if c[0] not in STRAIGHT_THROUGH], ids=label)
def test_gradients_are_those_of_the_formula(case):
    """gradcheck: analytic and numeric gradients agree for the input and every weight."""
    name, args = case
    block = scrambled(name, 8, **args).double()
    names = [n for n, _ in block.named_parameters()]
    x = noise(2, 8, 4, 3, dtype=torch.float64).requires_grad_()
    weights = tuple(p.detach().clone().requires_grad_() for p in block.parameters())

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(names, weights, strict=True)), x)

    assert torch.autograd.gradcheck(run, (x, *weights), fast_mode=True)


# --- attention(x) ---------------------------------------------------------------------------------


def apply_cbam(block: Any, x: Tensor, a: Mapping[str, Tensor]) -> Tensor:
    """CBAM from its gates."""
    if "gate" in a:
        return x * a["gate"]
    return x * a["channel"] * a["spatial"] + (x if block.skip else 0)


APPLY: dict[str, Callable[[Any, Tensor, Mapping[str, Tensor]], Tensor]] = gathered("APPLY", {
    "se": lambda block, x, a: x * a["gate"],
    "channel_attention": lambda block, x, a: x * a["gate"],
    "spatial_attention": lambda block, x, a: x * a["gate"],
    "cbam": apply_cbam,
    "bam": lambda block, x, a: x * a["gate"],
})  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=label)
def test_attention_is_what_forward_applies(case):
    """Recomputing forward from `attention(x)` reproduces the output, and nothing stays on the block."""
    name, args = case
    x = noise(2, 16, 7, 6, dtype=torch.float64)
    for init in ("identity", "paper"):
        block = scrambled(name, init=init, **args).double().eval()
        before = set(vars(block))
        maps = block.attention(x)
        assert set(vars(block)) == before, init
        again = APPLY[name](block, x, maps)
        torch.testing.assert_close(again, block(x), rtol=1e-10, atol=1e-10, msg=which(init))


@pytest.mark.parametrize(("name", "dims"), DIMS)
def test_attention_is_what_forward_applies_in_every_dimension(name, dims):
    """The same on sequences, maps and volumes, in train mode too."""
    x = noise(2, 16, *SIZES[dims], dtype=torch.float64)
    for train in (True, False):
        block = scrambled(name, dims=dims, init="paper").double().train(train)
        again = APPLY[name](block, x, block.attention(x))
        said = which("train" if train else "eval")
        torch.testing.assert_close(again, block(x), rtol=1e-10, atol=1e-10, msg=said)


def test_nonlocal_rows_sum_to_one():
    """Each position's weights over the others are a distribution, also over sub-sampled positions."""
    x = noise(2, 16, 7, 6)
    for sub_sample, count in ((False, 42), (True, 9)):
        rows = scrambled("nonlocal", sub_sample=sub_sample).attention(x)["rows"]
        assert rows.shape == (2, 42, count)
        torch.testing.assert_close(rows.sum(2), torch.ones(2, 42))


# --- parameter counts -----------------------------------------------------------------------------


def count(name: str, channels: int, **args: Any) -> int:
    """Trainable numbers of one block."""
    return sum(p.numel() for p in build(name, channels, **args).parameters())


@pytest.mark.parametrize(("c", "r"), [(64, 16), (96, 4), (7, 16), (30, 4)])
def test_counts_by_hand(c, r):
    """Counts of other options than the defaults, where C / r is no whole number too: h = max(1, ⌊C / r⌋)."""
    h = max(1, c // r)
    assert count("se", c, reduction=r) == count("channel_attention", c, reduction=r) == 2 * c * h + h + c
    assert count("spatial_attention", c) == 2 * 49 + 2
    assert count("spatial_attention", c, kernel_size=3, bias=True, norm=False) == 2 * 9 + 1
    assert count("cbam", c, reduction=r) == 2 * c * h + h + c + 2 * 49 + 2
    norm = 2 * h
    channel, dilated = (c * h + h + norm) + (h * c + c), 9 * h * h + h + norm
    assert count("bam", c, reduction=r) == channel + (c * h + h + norm) + 2 * dilated + h + 1
    assert count("nonlocal", c, reduction=r) == 3 * (c * h + h) + h * c + c + 2 * c


def test_every_block_has_a_formula():
    """A block in the table without a formula, or without a way to apply its attention, is caught here."""
    assert set(NAMES) == set(FORMULAS) == set(APPLY)


# --- timm -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [64, 96, 24])
@pytest.mark.parametrize(("squeeze", "gate"), [("avg", "sigmoid"), ("both", "hard_sigmoid")])
def test_se_is_timms_with_its_weights(channels, squeeze, gate):
    """timm's SEModule: the same keys and shapes, and with its weights the same output."""
    theirs = SEModule(channels, add_maxpool=squeeze == "both", gate_layer=gate)
    ours = build("se", channels, init="paper", divisor=8, squeeze=squeeze, gate=gate)
    ours.load_state_dict(theirs.state_dict())
    x = noise(2, channels, 7, 5)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_cbam_is_timms_with_its_weights(train):
    """timm's CbamModule: no biases, [mean, max], other names for the spatial half's conv and norm."""
    torch.manual_seed(3)
    theirs = CbamModule(64).train(mode=train)
    ours = build("cbam", 64, init="paper", bias=False, concat="mean_max").train(mode=train)
    renamed = {
        k.replace("spatial.conv.conv", "spatial.conv").replace("spatial.conv.bn", "spatial.norm"): v
        for k, v in theirs.state_dict().items()
    }
    ours.load_state_dict(renamed)
    x = noise(2, 64, 7, 5)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


# --- published initialisation ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["se", "channel_attention", "spatial_attention", "cbam", "bam", "nonlocal"])
def test_published_biases_start_at_zero(name):
    """The released codes of these papers zero every bias."""
    block = registry.create_block(name, 64, init="paper")
    biases = [p for k, p in block.named_parameters() if k.endswith("bias")]
    assert biases
    assert not any(b.any() for b in biases)


def test_cbam_starts_with_every_spatial_gate_at_one_half():
    """The released CBAM starts its spatial norm at scale 0."""
    maps = build("cbam", 64, init="paper").attention(noise(2, 64, 7, 5))
    assert torch.equal(maps["spatial"], torch.full((2, 1, 7, 5), 0.5))
    assert maps["channel"].std() > 0


def test_nonlocal_starts_as_published():
    """Weights of deviation 0.01 and a zero norm scale: the paper's own block is the identity at first."""
    block = build("nonlocal", 256, init="paper")
    assert abs(block.theta.weight.std().item() - 0.01) < 1e-3
    assert not block.norm.weight.any()
    assert torch.equal(block(x := noise(1, 256, 3, 3)), x)
