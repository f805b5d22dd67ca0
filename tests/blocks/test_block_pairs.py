"""Blocks of two inputs given two: formulas in float64, gradients, published counts, torch's own attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from block_cases import VARIANTS, build, noise, scrambled
from family_dual import sca
from family_paired import attended, gates, projected
from family_sequence import back, blended
from formula_parts import gate
from torch import Tensor, nn

import attninject as ai
from attninject.blocks import registry
from attninject.errors import BlockError, RecipeError, TooFewChannelsError

NAMES = ["attention_gate", "cross_attention", "sca"]
CASES = [(name, args) for name in NAMES for args in ({}, *VARIANTS[name])]
SIZES = {1: ((9,), (4,)), 2: ((7, 6), (3, 4)), 3: ((3, 5, 4), (2, 3, 2))}


def interpolated(t: Tensor, size: tuple[int, ...]) -> Tensor:
    """t: (B, D, *T) → (B, D, *size), linear, axis by axis: position i reads at (i + ½) n / m − ½."""
    for axis, m in enumerate(size, 2):
        n = t.shape[axis]
        at = ((torch.arange(m, dtype=t.dtype) + 0.5) * n / m - 0.5).clamp(min=0)
        low = at.floor().long().clamp(max=n - 1)
        high, share = (low + 1).clamp(max=n - 1), (at - low).view(-1, *[1] * (t.ndim - axis - 1))
        t = t.index_select(axis, low) * (1 - share) + t.index_select(axis, high) * share
    return t


def formula(block: nn.Module, name: str, x: Tensor, other: Tensor, args: dict[str, Any]) -> Tensor:
    """The paper's, with the block's present weights, mode and init."""
    w = {k: v.clone() for k, v in block.state_dict().items()}
    if name == "cross_attention":
        return blended(x, back(attended(x, other, w, args), x), args, w)
    if name == "sca":
        return sca(x, w, args, block.init == "identity", block.training, other.flatten(2).mean(2))
    signal = interpolated(projected(other, w, "signal", block.training), x.shape[2:])
    z = gates(x, signal, w, block.training)
    return x * gate(z, args.get("gate", "sigmoid"), block.init == "identity")


@pytest.mark.parametrize(("name", "args"), CASES)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_block_of_two_inputs_equals_its_formula(name, args, dims):
    """In float64 with random weights, the second value smaller and of other channels, in both modes and inits."""
    size, other_size = SIZES[dims]
    x = noise(2, 16, *size, dtype=torch.float64)
    other = noise(2, 12, *other_size, seed=3, dtype=torch.float64)
    for init in ("identity", "paper"):
        for train in (True, False):
            block = scrambled(name, dims=dims, init=init, other_channels=12, **args).double().train(train)
            expected = formula(block, name, x, other, args)
            torch.testing.assert_close(block(x, other), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "args"), CASES)
def test_gradients_of_both_inputs_are_those_of_the_formula(name, args):
    """gradcheck: analytic and numeric gradients agree for both values and every weight."""
    block = scrambled(name, 8, other_channels=6, **args).double()
    names, weights = zip(
        *((n, p.detach().clone().requires_grad_()) for n, p in block.named_parameters()), strict=True
    )
    x = noise(2, 8, 4, 3, dtype=torch.float64).requires_grad_()
    other = noise(2, 6, 2, 5, seed=3, dtype=torch.float64).requires_grad_()

    def run(x: Tensor, other: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(names, weights, strict=True)), (x, other))

    assert torch.autograd.gradcheck(run, (x, other, *weights), fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("init", ["identity", "blend"])
def test_whatever_the_second_value_is_the_block_starts_as_the_identity(name, init):
    """Bit for bit, in train and in eval mode, also for a second value that is larger or of one position."""
    block = build(name, init=init, other_channels=24)
    x = noise(2, 16, 6, 5)
    for size in ((3, 3), (12, 9), (1, 1)):
        assert registry.is_identity(block, 16, shape=x.shape, other=(2, 24, *size))


@pytest.mark.parametrize("name", NAMES)
def test_both_values_learn_from_the_first_steps(name):
    """The last layer has a gradient at init; after one step of it so has every weight, and so has the second value."""
    block, x, other = build(name, other_channels=24), noise(2, 16, 6, 5), noise(2, 24, 3, 3, seed=4)
    optimizer = torch.optim.SGD(block.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        other = other.detach().requires_grad_()
        block(x, other).square().sum().backward()
        optimizer.step()
    learning = {n for n, p in block.named_parameters() if p.grad is not None and p.grad.any()}
    dead = {"key.bias", "channel_score.bias", "spatial_score.bias"}  # one number for all logits of a softmax
    assert learning | dead == {n for n, _ in block.named_parameters()} | dead
    assert other.grad.abs().sum() > 0


def test_cross_attention_is_torchs_multihead_attention():
    """nn.MultiheadAttention with keys and values of another width, given the same weights, gives the same."""
    ours = build("cross_attention", 16, dims=1, init="paper", other_channels=24, num_heads=4, residual=False)
    theirs = nn.MultiheadAttention(16, 4, kdim=24, vdim=24, batch_first=True)
    with torch.no_grad():
        for layer in (ours.query, ours.key, ours.value, ours.proj):
            layer.bias.normal_()
        theirs.q_proj_weight.copy_(ours.query.weight)
        theirs.k_proj_weight.copy_(ours.key.weight)
        theirs.v_proj_weight.copy_(ours.value.weight)
        theirs.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]))
    theirs.out_proj.load_state_dict(ours.proj.state_dict())
    x, other = noise(2, 9, 16), noise(2, 5, 24, seed=3)
    expected, rows = theirs(x, other, other, average_attn_weights=False)
    found = ours(x.transpose(1, 2), other.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours.attention(x.transpose(1, 2), other.transpose(1, 2))["rows"], rows)


def test_counts_of_the_attention_gates_paper():
    """F (C + C_s + 2) + 1 parameters: W_x, W_g with its bias, ψ with its bias (arXiv:1804.03999, eq. 1)."""
    for channels, signal in ((64, 128), (128, 256), (24, 7)):
        block = build("attention_gate", channels, other_channels=signal)
        width = channels // 2
        assert sum(p.numel() for p in block.parameters()) == width * (channels + signal + 2) + 1
    block = build("cross_attention", 64, other_channels=96)
    assert sum(p.numel() for p in block.parameters()) == 2 * (64 * 64 + 64) + 2 * (96 * 64 + 64)


@pytest.mark.parametrize("name", ["cross_attention", "sca"])
def test_a_vector_is_a_map_of_one_position(name):
    """A state (B, C, 1), one token, gives what a pooled map (B, C, 1, 1) does; so a state of an LSTM can ask."""
    block, x, state = scrambled(name, other_channels=12), noise(2, 16, 6, 5), noise(2, 12, 1, seed=3)
    torch.testing.assert_close(block(x, state), block(x, state.unsqueeze(3)))
    assert not torch.equal(block(x, state), block(x, 2 * state))


def test_the_gate_reads_the_signal_by_linear_interpolation():
    """W_g of the resized signal is the resized W_g of the signal, as both are linear: torch's own interpolation."""
    block = scrambled("attention_gate", other_channels=12, init="paper").double()
    x, signal = noise(2, 16, 8, 6, dtype=torch.float64), noise(2, 12, 4, 3, seed=3, dtype=torch.float64)
    up = F.interpolate(signal, size=(8, 6), mode="bilinear", align_corners=False)
    torch.testing.assert_close(block(x, signal), block(x, up))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.parametrize("name", NAMES)
def test_blocks_of_two_inputs_compile_and_export(name):
    """TorchScript, jit.trace and export take both inputs, and torch.compile makes one graph of it."""
    block, x, other = (
        scrambled(name, other_channels=12).eval(),
        noise(2, 16, 6, 5),
        noise(2, 12, 3, 4, seed=3),
    )
    expected = block(x, other)
    scripted, traced = torch.jit.script(block), torch.jit.trace(block, (x, other))
    exported = torch.export.export(block, (x, other)).module()
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    for run in (scripted, traced, exported, compiled):
        torch.testing.assert_close(run(x, other), expected)


def test_what_a_second_value_cannot_be_is_refused():
    """Channels that are none, and channels for a block that takes one value."""
    with pytest.raises(TooFewChannelsError, match="other_channels: expected a whole number >= 1, found 0"):
        ai.create_block("attention_gate", 8, other_channels=0)
    with pytest.raises(
        BlockError, match="block 'se' takes one value, so there are no other_channels to be told"
    ):
        ai.create_block("se", 8, other_channels=8)
    with pytest.raises(
        RecipeError, match="'other_channels' is no argument of a block: it is measured at the second"
    ):
        ai.load_recipe({"block": "attention_gate", "after": "a", "args": {"other_channels": 8}})


class Weighed(nn.Module):
    """A foreign block of two inputs, which changes the function."""

    def __init__(self, channels: int, other_channels: int, power: int = 1) -> None:
        super().__init__()
        self.mix = nn.Conv2d(other_channels, channels, 1)
        self.power = power

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return x + self.mix(other).mean((2, 3), keepdim=True) ** self.power

    def attention(self, x: Tensor, other: Tensor) -> dict[str, Tensor]:
        return {"added": self.mix(other)}


def test_a_foreign_block_of_two_inputs_is_known_by_its_constructor():
    """What takes `other_channels` is given a second value; behind a blend it starts as the identity."""
    assert registry.takes_second(Weighed)
    assert not registry.takes_second(nn.Identity)
    assert not registry.takes_second(Weighed(8, 3))
    block = registry.create_block(Weighed, 8, init="blend", other_channels=3, power=2)
    assert registry.is_identity(block, 8, other=(2, 3, 5, 5))
    assert not registry.is_identity(
        registry.create_block(Weighed, 8, other_channels=3), 8, other=(2, 3, 5, 5)
    )
    assert block.attention(noise(1, 8, 4, 4), noise(1, 3, 2, 2))["added"].shape == (1, 8, 2, 2)
