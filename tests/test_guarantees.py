"""What injection promises, on real architectures: nothing changes but what training will change."""

from __future__ import annotations

import copy
import io
import itertools

import pytest
import torch
from nets import image, net
from torch import nn

import attninject as ai

MATRIX = (
    "torchvision/resnet18", "torchvision/resnext50_32x4d", "torchvision/mobilenet_v3_small",
    "torchvision/densenet121", "torchvision/convnext_tiny", "torchvision/efficientnet_b0",
    "torchvision/swin_t", "torchvision/vit_b_16", "torchvision/regnet_y_400mf", "timm/resnet50",
    "timm/resnet26d", "timm/seresnet50", "timm/regnety_002", "timm/convnext_atto",
    "timm/mobilenetv4_conv_small", "timm/efficientvit_b0", "timm/vit_tiny_patch16_224",
)  # fmt: skip
NO_RESIDUAL = {"torchvision/densenet121"}
PLACES = ("stage_end", "residual_branch")
CASES = [
    pytest.param(name, place, marks=[] if number % 2 == at or name in NO_RESIDUAL else [pytest.mark.slow])
    for number, name in enumerate(MATRIX)
    for at, place in enumerate(PLACES)
    if not (place == "residual_branch" and name in NO_RESIDUAL)
]
"""Every net at one of the two places in turn; at the other one in the slow tier."""
BLOCKS = ("se", "channel_attention", "spatial_attention", "cbam", "bam", "nonlocal")


def forward(model: nn.Module, x: torch.Tensor, training: bool) -> torch.Tensor:
    """One seeded forward without gradients."""
    model.train(training)
    torch.manual_seed(3)
    with torch.no_grad():
        return model(x)


class Calls:
    """Counts the calls of each injected block."""

    def __init__(self, model: nn.Module) -> None:
        self.counts = dict.fromkeys(ai.injected(model), 0)
        self.handles = [
            block.register_forward_hook(lambda *_, name=name: self._count(name))
            for name, block in ai.injected(model).items()
        ]

    def _count(self, name: str) -> None:
        self.counts[name] += 1

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def structure(model: nn.Module) -> list:
    """Everything about modules that injection must not change."""
    return [(name, id(m), type(m), m.training) for name, m in model.named_modules()]


def check_cheap(name: str, **rule: object) -> None:
    base, model, x = net(name), net(name), image(name)
    before = {
        "eval": forward(base, x, False),
        "train": forward(base, x, True),
        "buffers": {k: b.clone() for k, b in base.named_buffers()},
    }
    forwarded_eval = structure(model)
    tensors = {k: id(t) for k, t in itertools.chain(model.named_parameters(), model.named_buffers())}
    classes = {k: type(m) for k, m in model.named_modules()}
    keys = list(model.state_dict())
    rng = torch.get_rng_state()
    plan = ai.plan(model, **rule)
    assert structure(model) == forwarded_eval, "planning left a mark"
    assert ai.inject(model, plan) is model
    assert torch.equal(rng, torch.get_rng_state())

    blocks = ai.injected(model)
    assert blocks
    assert set(blocks) == {s.name for s in plan.sites}
    now = {k: id(t) for k, t in itertools.chain(model.named_parameters(), model.named_buffers())}
    assert {k: now[k] for k in tensors} == tensors
    assert [k for k in model.state_dict() if k in set(keys)] == keys
    for k, m in model.named_modules():
        if k in classes:
            assert isinstance(m, classes[k])
            assert type(m).__name__ == classes[k].__name__

    calls = Calls(model)
    assert torch.equal(forward(model, x, False), before["eval"])
    assert set(calls.counts.values()) == {1}, calls.counts
    assert torch.equal(forward(model, x, True), before["train"])
    calls.remove()
    after = dict(model.named_buffers())
    for k, b in before["buffers"].items():
        assert torch.equal(after[k], b), f"buffer {k} was updated otherwise"

    copied = copy.deepcopy(model)
    with torch.no_grad():
        for block in ai.injected(copied).values():
            for p in block.parameters():
                p.add_(0.5)
    reference = forward(model, x, False)
    assert not torch.equal(forward(copied, x, False), reference), "the copy runs the original's blocks"
    assert torch.equal(forward(model, x, False), reference)

    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert list(ai.injected(loaded)) == list(blocks)
    assert torch.equal(forward(loaded, x, False), reference)

    for m in (model, loaded):
        ai.eject(m)
        assert ai.injected(m) == {}
        assert list(m.state_dict()) == keys
        assert {k: type(s) for k, s in m.named_modules()} == classes
        assert torch.equal(forward(m, x, False), reference)


@pytest.mark.parametrize(("name", "place"), CASES)
def test_cbam_keeps_every_cheap_guarantee(name: str, place: str) -> None:
    """Bit-equal in eval and train, same keys, classes and tensors, copies, pickles, ejects, one call each."""
    check_cheap(name, block="cbam", place=place)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        pytest.param(name, block, marks=[] if number % 2 == at else [pytest.mark.slow])
        for number, block in enumerate(BLOCKS)
        for at, name in enumerate(("torchvision/resnet18", "timm/convnext_atto"))
    ],
)
def test_every_block_keeps_every_cheap_guarantee(name: str, block: str) -> None:
    """The guarantees do not depend on the block."""
    check_cheap(name, block=block, place="stage_end")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/convnext_atto", "timm/vit_tiny_patch16_224"])
@pytest.mark.parametrize("block", [b for b in ai.list_blocks() if b not in BLOCKS])
def test_every_other_block_keeps_every_cheap_guarantee(name: str, block: str) -> None:
    """So do the blocks of the other families and timm's own, on maps and on tokens."""
    check_cheap(name, block=block, place="stage_end")
