"""Quantization after injection: torchao's eight-bit weights, and PT2E with a calibrated eight-bit graph.

python examples/quantize.py                  (pip install torchao)

What to expect: both nets compute nearly what they did (the printed differences are relative to the largest output).
Inject first, train, then quantize: a quantized net is refused by `ai.inject`. Blocks can stay float, they cost little.

Known of torchao 0.18, with blocks or without: its `X86InductorQuantizer` fails with "more than one output node" on
modules that run twice in a unit: the ReLU of torchvision's resnets, that of CBAM's MLP (timm's resnets and SE pass).
Quantization-aware training gives NaN where a batch norm behind a convolution has weight zero, as timm's
zero-initialised residuals and a CBAM block have until they are trained: train first.
"""

import timm
import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

import attninject as ai


def injected(name: str, **rule: object) -> torch.nn.Module:
    """A net with SE blocks that do something, as after training."""
    torch.manual_seed(0)
    model = ai.inject(timm.create_model(name, num_classes=4).eval(), block="se", **rule)
    with torch.no_grad():
        for block in ai.injected(model).values():
            for parameter in block.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest, in parts of the largest output."""
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


x = torch.randn(4, 3, 160, 160)
with torch.no_grad():
    vit = injected("test_vit", after="blocks.*.mlp")
    wanted = vit(x)
    blocks = tuple(ai.injected(vit))

    def outside(module: torch.nn.Module, name: str) -> bool:
        """The net's own linear layers."""
        return isinstance(module, torch.nn.Linear) and not name.startswith(blocks)

    quantize_(vit, Int8WeightOnlyConfig(), outside)
    print(f"torchao, weights in int8, blocks in float: within 5 %: {difference(vit(x), wanted) < 0.05}")

    resnet = injected("resnet18", place="residual_branch")
    wanted = resnet(x)
    graph = torch.export.export(resnet, (x,)).module()
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(graph, quantizer)
    prepared(x)  # calibration: some images of yours
    quantized = convert_pt2e(prepared)
    layers = sum("dequantize" in str(node.target) for node in quantized.graph.nodes)
    print(f"PT2E, {layers} tensors in eight bits: within 5 %: {difference(quantized(x), wanted) < 0.05}")
