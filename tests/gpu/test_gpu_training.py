"""On a card: gradients of the lean forms are right, a run repeats itself to the bit, memory formats stay."""

from __future__ import annotations

import copy

import nets
import pytest
import torch
from cases import DTYPES, FORMATS, LEAN, images
from torch import Tensor

import attninject as ai
from attninject.bench import block_speed
from attninject.blocks.fast import dispatch

pytestmark = pytest.mark.gpu
BOUNDS = {torch.float32: 2e-3, torch.bfloat16: 6e-2, torch.float16: 1e-2}
"""Root mean square of the difference, in units of the right value's; float32 products may run in tf32."""


def gradients(module: torch.nn.Module, x: Tensor, gradient: Tensor) -> list[Tensor]:
    """Output, the input's gradient, those of the parameters that have one."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    module.zero_grad()
    y = module(x)
    y.backward(gradient)
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]


@pytest.mark.parametrize("memory_format", FORMATS, ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LEAN)
def test_lean_gradients_against_float64(name: str, dtype: torch.dtype, memory_format, device: str) -> None:
    """The lean form on the card beside the definition in float64 on the CPU, on a map of odd sides.

    In the bounds, or no further off than twice the definition is in the same precision.
    """
    generator = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(3, 64, 15, 17, generator=generator).to(dtype) for _ in range(2))
    module = block_speed.scrambled(ai.create_block(name, 64, init="paper")).to(dtype)
    expected = gradients(module.double(), x.double(), gradient.double())
    module = module.to(device=device, dtype=dtype, memory_format=memory_format)
    moved = [t.to(device=device, memory_format=memory_format) for t in (x, gradient)]
    found, plain = [], []
    for form, into in (("fast", found), ("plain", plain)):
        with dispatch.backend(form):
            into += gradients(copy.deepcopy(module), *moved)
    assert found[0].is_contiguous(memory_format=memory_format)
    for mine, theirs, right in zip(found[:2], plain[:2], expected[:2], strict=True):
        off, own = ((t.double().cpu() - right).norm() / right.norm() for t in (mine, theirs))
        assert off < max(BOUNDS[dtype], 2 * own), (off, own)


def test_two_runs_are_the_same_bits(device: str) -> None:
    """Ten steps with CBAM from one seed, twice, with deterministic kernels."""

    def run() -> dict[str, Tensor]:
        model = nets.net("torchvision/resnet18").to(device)
        torch.manual_seed(0)
        ai.inject(model, "cbam_resnet").train()
        optimizer = torch.optim.AdamW(ai.param_groups(model, attn_lr=1e-3))
        x = images("torchvision/resnet18", device)
        for _ in range(3 if device == "cpu" else 10):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        return {key: value.clone() for key, value in model.state_dict().items()}

    first, second = run(), run()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_moves_every_block(dtype: torch.dtype, device: str) -> None:
    """One step in each precision: every gradient is finite, every block has one."""
    model = ai.inject(nets.net("torchvision/resnet18").to(device), "cbam_resnet").train()
    x = images("torchvision/resnet18", device)
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        loss = model(x).float().square().mean()
    loss.backward()
    for name, block in ai.injected(model).items():
        found = [p.grad for p in block.parameters() if p.grad is not None]
        assert found, name
        assert all(torch.isfinite(g).all() for g in found), name
    assert any(
        float(g.abs().sum()) > 0
        for b in ai.injected(model).values()
        for p in b.parameters()
        if (g := p.grad) is not None
    )
