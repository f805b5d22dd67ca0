"""Quantization-aware training and symbolic tracing of networks with blocks in them."""

from __future__ import annotations

import pytest
import torch
from small import images
from torch import nn
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

import attninject as ai


class Unit(nn.Module):
    """conv, norm, ReLU, and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()

    def forward(self, x):
        return self.act(x + self.norm(self.conv(x)))


def net() -> nn.Sequential:
    """Two units and a head."""
    tail = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Unit(), Unit(), *tail)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:.*reduce_range:UserWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("block", ["se", "cbam", "coord", "mhsa"])
def test_quantization_aware_training_by_graph(block: str) -> None:
    """Prepared, trained a step, converted, called: the blocks stay float and close to what was trained."""
    model = net().train()
    ai.inject(
        model,
        block=block,
        args={"reduction": 4} if block != "mhsa" else {},
        after="*.norm",
        example_inputs=images(),
    )
    engine = "qnnpack" if "qnnpack" in torch.backends.quantized.supported_engines else "fbgemm"
    prepared = prepare_qat_fx(model, get_default_qat_qconfig_mapping(engine), (images(),))
    optimizer = torch.optim.SGD(prepared.parameters(), 1e-3)
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        for _ in range(2):
            prepared(images()).square().sum().backward()
            optimizer.step()
        expected = prepared.eval()(images())
        converted = convert_fx(prepared)
        found = converted(images())
    finally:
        torch.backends.quantized.engine = before
    assert {n for n, m in converted.named_modules() if isinstance(m, ai.blocks.base.Block)} >= {
        f"1.{block}",
        f"2.{block}",
    }
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)


class Own(nn.Module):
    """Somebody's module with a block in it that nobody injected."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.stem, self.attention = nn.Conv2d(3, 16, 3), block

    def forward(self, x):
        return self.attention(self.stem(x)) + 1


OWN = [name for name in ai.list_blocks() if "/" not in name]  # timm's are traced as timm wrote them


@pytest.mark.parametrize("name", OWN)
def test_a_block_in_ones_own_module_is_one_call_of_a_symbolic_trace(name: str) -> None:
    """The traced module is the same function, at other sizes too, and holds the block itself."""
    model = Own(ai.create_block(name, 16)).eval()
    traced = torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["stem", "attention"]
    for size in (18, 34):
        assert torch.equal(traced(images(size=size)), model(images(size=size)))
