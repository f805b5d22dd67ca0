"""A fresh block returns its input bit for bit, whatever the dtype, shape, mode and option."""

from __future__ import annotations

import itertools

import pytest
import torch
from block_cases import (
    CASES,
    CONSTANT,
    DIMS,
    NAMES,
    PAPER_IS_IDENTITY,
    REFUSES,
    SIZES,
    build,
    label,
    noise,
    scrambled,
)

from attninject.blocks import registry
from attninject.errors import TooFewChannelsError

SHAPES = [(1, 1, 1), (2, 1, 7), (2, 7, 5), (1, 32, 32)]
"""Batch, height and width: one position, one row, an odd map, and one of more positions than channels."""
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def passes_through(block: torch.nn.Module, x: torch.Tensor) -> bool:
    """Whether train and eval mode both return x itself, dtype included."""
    outputs = [block.train(mode)(x) for mode in (True, False)]
    return all(y.dtype == x.dtype and torch.equal(y, x) for y in outputs)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_identity_is_exact_in_every_dtype_shape_and_mode(case):
    """One and two images from 1×1 to 32×32 come back bit for bit in each dtype, in train and in eval mode."""
    name, args = case
    for dtype in DTYPES:
        block = build(name, **args).to(dtype)
        for shape in SHAPES:
            batch, *size = shape
            assert passes_through(block, noise(batch, 16, *size, dtype=dtype)), (dtype, shape)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=label)
def test_identity_is_exact_for_every_batch_too(case):
    """The same for each pair of batch and size."""
    name, args = case
    for dtype, batch in itertools.product(DTYPES, (1, 2)):
        block = build(name, **args).to(dtype)
        for _, *size in SHAPES:
            assert passes_through(block, noise(batch, 16, *size, dtype=dtype)), (dtype, batch, size)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_identity_is_exact_under_autocast(case):
    """Under autocast, a float32 and a low-precision input both come back bit for bit, the largest map in one."""
    name, args = case
    block = build(name, **args)
    for low in DTYPES[1:]:
        for dtype, shapes in ((torch.float32, SHAPES), (low, SHAPES[:-1])):
            with torch.autocast("cpu", low):
                for batch, *size in shapes:
                    x = noise(batch, 16, *size, dtype=dtype)
                    assert passes_through(block, x), (low, dtype, batch, size)


@pytest.mark.parametrize(("name", "dims"), DIMS)
def test_identity_is_exact_in_every_dimension(name, dims):
    """Each block in each number of spatial dimensions that its table row allows."""
    assert passes_through(build(name, dims=dims), noise(2, 16, *SIZES[dims]))
    assert passes_through(build(name, dims=dims), noise(1, 16, *[1] * dims))


@pytest.mark.parametrize("name", NAMES)
def test_few_and_odd_channels_are_defined(name):
    """One, three and seven channels, fewer than the default reduction, work or are refused with the fix."""
    for channels in (1, 3, 7):
        if channels in REFUSES.get(name, ()):
            with pytest.raises(TooFewChannelsError, match=rf"{channels} channels.*(choose|give)"):
                build(name, channels)
            continue
        block = build(name, channels)
        assert passes_through(block, noise(2, channels, 7, 5)), channels
        assert all(p.numel() > 0 for p in block.parameters()), channels


@pytest.mark.parametrize("case", CASES, ids=label)
def test_blend_is_exact_and_holds_one_zero(case):
    """`init="blend"` is the identity by one zero named alpha, not by zeros inside the block."""
    name, args = case
    block = build(name, init="blend", **args)
    assert passes_through(block, noise(2, 16, 7, 5))
    assert block.alpha.shape == (1,)
    assert not block.alpha.any()
    with torch.no_grad():
        block.alpha.fill_(1)
    paper = build(name, init="paper", **args).eval()
    paper.load_state_dict({k: v for k, v in block.state_dict().items() if k != "alpha"})
    x = noise(2, 16, 7, 5)
    torch.testing.assert_close(block.eval()(x), paper(x))


@pytest.mark.parametrize("case", CASES, ids=label)
def test_identity_is_no_dead_formula(case):
    """With other weights the same block changes its input, so the exactness above is not a bypass."""
    name, args = case
    assert not passes_through(scrambled(name, **args), noise(2, 16, 7, 5))


@pytest.mark.parametrize("name", [n for n in NAMES if n not in PAPER_IS_IDENTITY])
def test_published_gates_do_scale_the_input(name):
    """`init="paper"` keeps the published gate, which is no identity (some papers' own is one)."""
    assert not passes_through(build(name, init="paper"), noise(2, 16, 7, 5))


@pytest.mark.parametrize("name", NAMES)
def test_weights_follow_the_seed(name):
    """The same seed gives the same weights, another seed others, under every init."""
    for init in ("identity", "paper", "blend"):
        first, again = build(name, init=init).state_dict(), build(name, init=init).state_dict()
        torch.manual_seed(7)
        other = registry.create_block(name, 16, init=init).state_dict()
        assert all(torch.equal(first[k], again[k]) for k in first), init
        differs = any(not torch.equal(first[k], other[k]) for k in first)
        assert differs is (init not in CONSTANT.get(name, ())), init
