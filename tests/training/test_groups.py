"""Parameter groups: who learns at which rate, and what weight decay leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nets import net
from torch import nn

import attninject as ai
from attninject.training import extend_optimizer


def by_name(model: nn.Module, **kw: Any) -> dict[str, dict[str, Any]]:
    """Parameter name → its group."""
    names = {id(p): n for n, p in model.named_parameters()}
    found: dict[str, dict[str, Any]] = {}
    for group in ai.param_groups(model, **kw):
        for p in group["params"]:
            assert names[id(p)] not in found
            found[names[id(p)]] = group
    return found


def test_blocks_head_and_backbone_learn_at_their_own_rates() -> None:
    """Every learning parameter is in exactly one group, with the rate of its part."""
    model = ai.inject(net("torchvision/resnet18"), "cbam_resnet")
    groups = by_name(model, lr=1e-4, attn_lr=1e-3, head_lr=1e-2)
    assert set(groups) == {n for n, _ in model.named_parameters()}
    for name, group in groups.items():
        assert group["lr"] == (1e-3 if ".cbam." in name else 1e-2 if name.startswith("fc.") else 1e-4)
    assert {g["lr"] for g in by_name(model).values()} == {1e-4}
    ai.freeze(model)
    assert {n.split(".")[0] for n in by_name(model) if ".cbam." not in n} == {"fc"}


def test_no_weight_decay_on_gates_norms_and_biases() -> None:
    """Only the weights of layers decay; a block's own factors do not, whatever their shape."""

    class Scales(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(channels, 7, 7))
            self.mix = nn.Conv2d(channels, channels, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * (1 + self.table.mean((1, 2)).view(1, -1, 1, 1)) + 0 * self.mix(x)

    model = ai.inject(net("torchvision/resnet18"), "cbam_resnet")
    ai.inject(model, block=Scales, after="layer1.0.bn2", name="scales", init="blend")
    decayed = {n for n, g in by_name(model, weight_decay=0.1).items() if g["weight_decay"]}
    layers = {
        f"{n}.weight"
        for n, m in model.named_modules()
        if isinstance(m, nn.Conv2d | nn.Linear) and m.weight.numel() > 1
    }
    assert decayed == layers
    assert not any("table" in n or "alpha" in n for n in decayed)
    assert {g["weight_decay"] for g in by_name(model, weight_decay=0.0).values()} == {0.0}


def test_timm_names_its_own_exceptions() -> None:
    """A ViT's position embedding, which timm lists in no_weight_decay, has none; nor has a layer scale."""
    groups = by_name(net("timm/vit_tiny_patch16_224"), weight_decay=0.1)
    assert groups["pos_embed"]["weight_decay"] == 0
    assert groups["blocks.0.attn.qkv.weight"]["weight_decay"] == 0.1
    convnext = by_name(net("timm/convnext_atto"), weight_decay=0.1)
    assert convnext["stages.0.blocks.0.mlp.fc1.weight"]["weight_decay"] == 0.1
    assert convnext["stages.0.blocks.0.gamma"]["weight_decay"] == 0


def test_layer_decay_is_timms() -> None:
    """The backbone's rates are those of timm for the model without blocks; new parts learn at full rate."""
    from timm.optim import param_groups_layer_decay

    clean = net("timm/resnet18")
    names = {id(p): n for n, p in clean.named_parameters()}
    expected = {
        names[id(p)]: g["lr_scale"]
        for g in param_groups_layer_decay(clean, layer_decay=0.5)
        for p in g["params"]
    }
    model = ai.inject(net("timm/resnet18"), block="cbam", place="residual_branch")
    found = {n: g["lr"] for n, g in by_name(model, lr=1.0, attn_lr=3.0, layer_decay=0.5).items()}
    assert {n: r for n, r in found.items() if ".cbam." not in n} == expected
    assert {r for n, r in found.items() if ".cbam." in n} == {3.0}
    assert expected["conv1.weight"] == 0.5**9


def test_layer_decay_of_torchvision_nets() -> None:
    """Models that tell timm nothing of their layers decay by depth all the same."""
    groups = by_name(net("torchvision/resnet18"), lr=1.0, layer_decay=0.5)
    rates = [
        groups[n]["lr"]
        for n in ("conv1.weight", "layer2.0.conv1.weight", "layer4.1.conv2.weight", "fc.weight")
    ]
    assert rates == sorted(rates)
    assert rates[0] < rates[1] < rates[2] < rates[3] == 1.0
    with pytest.raises(ValueError, match=r"layer_decay: expected a factor above 0, at most 1, found 1\.5"):
        ai.param_groups(net("torchvision/resnet18"), layer_decay=1.5)


def test_wrappers_do_not_matter() -> None:
    """torch.compile around the model gives the same groups of the same tensors."""
    model = ai.freeze(ai.inject(net("torchvision/resnet18"), "se_resnet"))
    plain, wrapped = ai.param_groups(model), ai.param_groups(torch.compile(model))
    assert [[id(p) for p in g["params"]] for g in plain] == [[id(p) for p in g["params"]] for g in wrapped]


def test_any_optimizer_takes_the_groups() -> None:
    """torch's AdamW and timm's factory (LAMB) step with them; the rates stay as given."""
    from timm.optim import create_optimizer_v2

    model = ai.freeze(ai.inject(net("torchvision/resnet18"), "se_resnet"))
    for make in (torch.optim.AdamW, lambda groups: create_optimizer_v2(groups, "lamb", lr=1e-4)):
        optimizer = make(ai.param_groups(model, attn_lr=1e-3))
        assert {g["lr"] for g in optimizer.param_groups} == {1e-3, 1e-4}
        before = model.fc.weight.clone()
        model(torch.randn(2, 3, 32, 32)).sum().backward()
        optimizer.step()
        assert not torch.equal(before, model.fc.weight)


def test_blocks_injected_later_join_an_optimizer() -> None:
    """extend_optimizer adds what is new, once, at its own rate; what was there keeps its state."""
    model = ai.freeze(net("torchvision/resnet18"))
    optimizer = torch.optim.SGD(ai.param_groups(model), lr=1e-4, momentum=0.9)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    ai.inject(model, "se_resnet")
    assert extend_optimizer(optimizer, model, attn_lr=1e-3) == ["blocks", "blocks, no decay"]
    assert extend_optimizer(optimizer, model, attn_lr=1e-3) == []
    held = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert optimizer.state[model.fc.weight]["momentum_buffer"] is not None
    before = model.layer1[0].se.fc2.weight.clone()
    optimizer.zero_grad()
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, model.layer1[0].se.fc2.weight)
