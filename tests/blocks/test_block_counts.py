"""Parameters and operations of every block against formulas written by hand, and the published figures."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from block_cases import DIMS, NAMES, SIZES, build, gathered, macs, noise
from torch.nn.attention import SDPBackend, sdpa_kernel

COUNTS: dict[str, Callable[[int, int], int]] = gathered("COUNTS", {
    "se": lambda c, d: 2 * c * (c // 16) + c // 16 + c,
    "channel_attention": lambda c, d: 2 * c * (c // 16) + c // 16 + c,
    "spatial_attention": lambda c, d: 2 * 7**d + 2,
    "cbam": lambda c, d: (2 * c * (c // 16) + c // 16 + c) + (2 * 7**d + 2),
    # channel branch, then the spatial one: 1×1, two dilated 3×3, 1×1 to one map
    "bam": lambda c, d: (
        (2 * c * (c // 16) + 3 * (c // 16) + c)
        + (c * (c // 16) + 3 * (c // 16)) + 2 * (3**d * (c // 16) ** 2 + 3 * (c // 16)) + (c // 16 + 1)
    ),
})  # fmt: skip
"""Block → its number of parameters with default options, from the channels (a multiple of 32) and `dims`."""

MACS: dict[str, Callable[..., int]] = gathered("MACS", {
    "se": lambda c, *size: 2 * c * (c // 16),
    "channel_attention": lambda c, *size: 2 * 2 * c * (c // 16),  # one MLP, run for mean and max
    "spatial_attention": lambda c, *size: 2 * 7 ** len(size) * torch.Size(size).numel(),
    "cbam": lambda c, *size: 4 * c * (c // 16) + 2 * 7 ** len(size) * torch.Size(size).numel(),
    "bam": lambda c, *size: (
        2 * c * (c // 16)
        + torch.Size(size).numel() * (c // 16) * (c + 2 * 3 ** len(size) * (c // 16) + 1)
    ),
})  # fmt: skip
"""Block → multiply-accumulates of convolutions and matrix products for one map of `size`, default options."""

CHANNELS = [64, 96]


def test_every_block_has_both_formulas():
    """A new block without a formula for its parameters and its operations is caught here."""
    assert set(COUNTS) == set(NAMES)
    assert set(MACS) == set(NAMES)


def parameters(name: str, channels: int, **args: Any) -> int:
    """Trainable numbers of one block, as published: no α of a blend."""
    return sum(p.numel() for p in build(name, channels, init="paper", **args).parameters())


@pytest.mark.parametrize(("name", "dims"), DIMS)
def test_parameters_by_hand(name, dims):
    """Every block in every number of dimensions has the parameters that its formula counts."""
    found = {channels: parameters(name, channels, dims=dims) for channels in CHANNELS}
    assert found == {channels: COUNTS[name](channels, dims) for channels in CHANNELS}


@pytest.mark.parametrize(("name", "dims"), DIMS)
def test_operations_by_hand(name, dims):
    """The count of a plan is the formula, taken on stand-ins as well as from the kernels that run on data."""
    found = {}
    for channels, mode in ((64, "meta"), (96, "meta"), (64, "real")):
        block, x = build(name, channels, init="paper", dims=dims), noise(2, channels, *SIZES[dims])
        found[channels, mode] = macs(block, x, mode)
    assert found == {(channels, mode): MACS[name](channels, *SIZES[dims]) for channels, mode in found}


@pytest.mark.parametrize("kernel", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], ids=str)
def test_attention_counts_its_two_products_whatever_kernel_runs(kernel):
    """q kᵀ and the rows times v, plain or fused: the same number."""
    block, x = build("mhsa", 64, init="paper"), noise(2, 64, 7, 5)
    with sdpa_kernel(kernel):
        assert macs(block, x, "real") == MACS["mhsa"](64, 7, 5)


# --- published figures ----------------------------------------------------------------------------

REFERENCE = Path(__file__).resolve().parents[1] / "reference" / "parameter_counts.yaml"
FIGURES = yaml.safe_load(REFERENCE.read_text(encoding="utf-8"))
ROWS = [(net, row) for net in ("resnet18", "resnet50") for row in FIGURES[net] if row != "base"]
# width behind the last norm of a residual block: number of such blocks; BAM: behind layer1 to layer3
WIDTHS = {"resnet18": {64: 2, 128: 2, 256: 2, 512: 2}, "resnet50": {256: 3, 512: 4, 1024: 6, 2048: 3}}
NONLOCAL = {"1": {1024: 1}, "5": {512: 2, 1024: 3}, "10": {512: 4, 1024: 6}}


@pytest.mark.parametrize(("net", "row"), ROWS)
def test_blocks_at_a_resnets_widths_give_the_reference_counts(net, row):
    """Backbone plus blocks, to the last digit, for every row of the reference file."""
    found = re.fullmatch(r"(se|cbam|bam|eca|nonlocal)(?:_(nobias|adaptive|\d+))?", row)
    assert found, f"reference row {row} has no test"
    name, suffix = found.groups()
    args = {k: v for k, v in FIGURES[net][row].items() if k in ("bias", "norm")}
    sites = NONLOCAL[suffix] if name == "nonlocal" else WIDTHS[net]
    if name == "bam":
        sites = dict.fromkeys(list(sites)[:3], 1)
    total = sum(times * parameters(name, width, **args) for width, times in sites.items())
    assert FIGURES[net]["base"] + total == FIGURES[net][row]["count"]


@pytest.mark.parametrize("row", FIGURES["block_alone"])
def test_a_block_alone_gives_the_reference_count(row):
    """One block at one width, as the reference file names it."""
    name, width = row.rsplit("_", 1)
    assert parameters(name, int(width)) == FIGURES["block_alone"][row]


def test_timms_seresnet18_by_its_divisor():
    """timm rounds SE's hidden width to a multiple of 8, which gives its seresnet18 11,779,624 parameters."""
    total = sum(times * parameters("se", c, divisor=8) for c, times in WIDTHS["resnet18"].items())
    assert FIGURES["resnet18"]["base"] + total == 11_779_624
