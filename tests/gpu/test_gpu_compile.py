"""On a card: compiled as one graph, with CUDA graphs, and the blocks alone."""

from __future__ import annotations

import nets
import pytest
import torch
from cases import BLOCKS, images

import attninject as ai

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]  # inductor's advice, such as to use tf32


@pytest.mark.parametrize("block", BLOCKS[:2])
def test_one_graph(block: str, device: str) -> None:
    """`fullgraph=True` in train mode, forward and backward; close to eager."""
    model = ai.inject(
        nets.net("torchvision/resnet18").to(device), block=block, place="residual_branch"
    ).eval()
    x = images("torchvision/resnet18", device)
    expected = model(x)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, rtol=2e-2, atol=2e-2)
    compiled(x).square().mean().backward()


def test_cuda_graphs(device: str) -> None:
    """`mode="reduce-overhead"`: replayed graphs give what eager gives, for new images as well."""
    if device == "cpu":
        pytest.skip("CUDA graphs need a card")
    model = ai.inject(nets.net("torchvision/resnet18").to(device), "se_resnet").eval()
    compiled = torch.compile(model, mode="reduce-overhead")
    with torch.no_grad():
        for seed in range(3):
            x = torch.randn(4, 3, 96, 96, generator=torch.Generator().manual_seed(seed)).to(device)
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(compiled(x).clone(), model(x), rtol=2e-2, atol=2e-2)


def test_compiled_blocks(device: str) -> None:
    """`ai.compile_blocks` changes no more than rounding."""
    model = ai.inject(nets.net("torchvision/resnet18").to(device), "cbam_resnet").eval()
    x = images("torchvision/resnet18", device)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(ai.compile_blocks(model)(x), expected, rtol=2e-2, atol=2e-2)
