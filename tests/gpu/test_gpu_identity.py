"""On a card: injected networks compute what they computed before, to the bit, in every format; and move about."""

from __future__ import annotations

import copy
from pathlib import Path

import nets
import pytest
import torch
from cases import BLOCKS, DTYPES, FORMATS, NETS, images, place
from torch import nn

import attninject as ai
from attninject import models
from attninject.observe.verify import equal

pytestmark = pytest.mark.gpu


def outputs(
    model: nn.Module, x: torch.Tensor, memory_format: torch.memory_format, train: bool, keys: list[str]
) -> list[torch.Tensor]:
    """What the model gives, and what its norms have learnt from it in train mode; always the same random numbers."""
    model.train(train).to(memory_format=memory_format)
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    torch.manual_seed(0)
    with torch.no_grad():
        y = model(x.to(memory_format=memory_format))
        y = y[0] if isinstance(y, tuple) else y  # googlenet in train mode
        found = [y.clone(), *(v.clone() for k, v in model.named_buffers() if k in keys)]
        for key, value in model.named_buffers():
            value.copy_(buffers[key])
    return found


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", NETS)
def test_identity(name: str, block: str, device: str) -> None:
    """Eval and train; float32, bfloat16, float16, both memory formats, and autocast; the model lives on the card."""
    cases = [(memory_format, train) for memory_format in FORMATS for train in (False, True)]
    for dtype in DTYPES:
        model, x = nets.net(name).to(device=device, dtype=dtype), images(name, device).to(dtype)
        keys = [k for k, _ in model.named_buffers()]
        before = [outputs(model, x, *case, keys) for case in cases]
        ai.inject(model.eval(), block=block, place=place(name))
        assert {p.device.type for p in model.parameters()} == {torch.device(device).type}
        for case, expected in zip(cases, before, strict=True):
            assert equal(expected, outputs(model, x, *case, keys)), (dtype, *case)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("name", NETS[:3])
def test_identity_under_autocast(name: str, dtype: torch.dtype, device: str) -> None:
    """Mixed precision: the same numbers with and without blocks."""
    model, x = nets.net(name).to(device), images(name, device)
    with torch.autocast(device, dtype), torch.no_grad():
        before = model(x)
        ai.inject(model, block="cbam", place="residual_branch")
        assert torch.equal(model(x), before)


def test_a_model_that_is_made_without_memory(device: str) -> None:
    """Injected on meta, then `to_empty` on the device and loaded: what the model gives that was never on meta."""
    real = ai.inject(nets.net("torchvision/resnet18"), "se_resnet")
    with torch.device("meta"):
        model = models.build("torchvision/resnet18")
    model = ai.inject(model, "se_resnet").to_empty(device=device)
    model.load_state_dict(real.state_dict())
    x = images("torchvision/resnet18", device)
    assert torch.equal(model.eval()(x), real.to(device).eval()(x))


def test_a_model_on_two_devices(device: str) -> None:
    """Stem and first stages here, the rest on the CPU: each block goes where its site is."""
    model, x = nets.net("torchvision/resnet18"), images("torchvision/resnet18", device)
    for part in (model.conv1, model.bn1, model.layer1, model.layer2):
        part.to(device)
    model.layer3.register_forward_pre_hook(lambda module, args: (args[0].cpu(),))
    before = model(x)
    ai.inject(model, "cbam_resnet", example_inputs=x)
    assert torch.equal(model(x), before)
    assert model.layer1[0].cbam.channel.fc1.weight.device.type == torch.device(device).type
    assert model.layer4[0].cbam.channel.fc1.weight.device.type == "cpu"


def test_copies_and_files(device: str, tmp_path: Path) -> None:
    """A deepcopy is independent and on the card; a delta that was saved there loads on the CPU."""
    model = ai.inject(nets.net("torchvision/resnet18").to(device), "cbam_resnet")
    with torch.no_grad():
        for block in ai.injected(model).values():
            for parameter in block.parameters():
                parameter.normal_(std=0.05)
    x = images("torchvision/resnet18", device)
    twin = copy.deepcopy(model)
    expected = model(x)
    assert torch.equal(twin(x), expected)
    ai.save(model, tmp_path / "a.safetensors")
    here = ai.load(nets.net("torchvision/resnet18"), tmp_path / "a.safetensors").eval()
    torch.testing.assert_close(here(x.cpu()), expected.cpu(), rtol=1e-2, atol=1e-2)
    there = ai.load(nets.net("torchvision/resnet18").to(device), tmp_path / "a.safetensors").eval()
    assert torch.equal(there(x), expected)
