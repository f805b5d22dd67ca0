"""TorchScript: every block's formula compiles, with the same numbers."""

from __future__ import annotations

import pytest
import torch
from block_cases import CASES, DIMS, SIZES, UNSCRIPTED, label, noise, scrambled

from attninject.blocks import foreign
from attninject.errors import BlockError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning"),
]


def agrees(block, *inputs):
    """Whether a block and what TorchScript makes of it compute the same, in eval and in train mode."""
    scripted = torch.jit.script(block)
    for mode in (False, True):
        block.train(mode), scripted.train(mode)
        for x in inputs:
            torch.testing.assert_close(scripted(x), block(x))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=label(c), marks=[pytest.mark.slow] if c[1] else [])
        for c in CASES
        if c[0] not in UNSCRIPTED
    ],
)
def test_scripted_block(case):
    """One compiled block serves maps of several sizes and both modes; options beside the defaults: slow tier."""
    name, args = case
    agrees(scrambled(name, **args), noise(2, 16, 7, 5), noise(3, 16, 8, 14))


@pytest.mark.slow
@pytest.mark.parametrize("spec", foreign.BLOCKS, ids=lambda spec: spec.name)
def test_timm_block_is_scripted(spec):
    """As timm builds it, and blended."""
    pytest.importorskip("timm")
    for init in ("paper", "blend"):
        agrees(scrambled(spec.name, init=init), noise(2, 16, 8, 8))


@pytest.mark.slow
@pytest.mark.parametrize("init", ["paper", "blend"])
@pytest.mark.parametrize(("name", "dims"), [case for case in DIMS if case[0] not in UNSCRIPTED])
def test_scripted_in_other_dimensions(name, dims, init):
    """In one, two and three dimensions, as published and blended."""
    agrees(scrambled(name, dims=dims, init=init), noise(2, 16, *SIZES[dims]))


@pytest.mark.parametrize("name", sorted(UNSCRIPTED))
def test_what_cannot_be_scripted_says_what_can(name):
    """A convolution in another form is refused before TorchScript begins, with the ways that are open."""
    with pytest.raises(BlockError, match=r"trace the model \(torch.jit.trace\) or export it"):
        torch.jit.script(scrambled(name))
