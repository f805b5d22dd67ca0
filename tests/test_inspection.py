"""`ai.status`: what the injected blocks are, whether they learn, have changed, or are passed through."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
import torchvision
from torch import nn

import attninject as ai


@pytest.fixture
def model() -> nn.Module:
    """A resnet18 with eight SE blocks."""
    torch.manual_seed(0)
    return ai.inject(torchvision.models.resnet18(num_classes=4), "se_resnet")


def test_status_before_training(model: nn.Module) -> None:
    """A row per block with its site; nothing has changed, all learns; the table is JSON too."""
    found = ai.status(model)
    assert [b.name for b in found.blocks] == list(ai.injected(model))
    assert {(b.kind, b.changed, b.learning == b.parameters) for b in found.blocks} == {("SE", False, True)}
    assert found.blocks[0].site == "after layer1.0.bn2"
    assert (found.trainable.learning, found.trainable.total) == (found.trainable.total,) * 2
    assert json.loads(json.dumps(found.to_dict()))["blocks"][0]["name"] == "layer1.0.se"
    assert str(found).startswith("ResNet: 8 injected blocks; 11.3 M of 11.3 M (100.0 %) parameters learn")
    assert "layer1.0.se" in found._repr_html_()


def test_status_follows_training_freezing_and_bypass(model: nn.Module) -> None:
    """A step changes what learns and nothing else; frozen, disabled and eval blocks say so; a copy cannot know."""
    ai.freeze(model, "layer4.*.se")
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    optimizer.step()
    with ai.disabled(model):
        found = {b.name: b for b in ai.status(model).blocks}
        assert all(b.disabled and b.training for b in found.values())
    assert (found["layer1.0.se"].changed, found["layer4.1.se"].changed) == (True, False)
    assert (found["layer1.0.se"].learning > 0, found["layer4.1.se"].learning) == (True, 0)
    rows = str(ai.status(model.eval()))
    assert "eval" in rows
    assert "passed through" not in rows
    assert {b.changed for b in ai.status(copy.deepcopy(model)).blocks} == {None}


def test_a_clean_model_has_no_rows() -> None:
    """No table where there is nothing to say."""
    assert str(ai.status(nn.Linear(3, 2))) == "Linear: no injected blocks; 8 of 8 (100.0 %) parameters learn"


def test_trainable_is_a_line_and_two_numbers(model: nn.Module) -> None:
    """It prints as it always has, and counts; copies and pickles too."""
    ai.freeze(model)
    line = ai.trainable(model)
    assert line == f"{line}" == "91.1 k of 11.3 M (0.8 %)"
    assert line.learning == sum(p.numel() for p in model.parameters() if p.requires_grad)
    for twin in (copy.deepcopy(line), pickle.loads(pickle.dumps(line))):
        assert (twin, twin.learning, twin.total) == (line, line.learning, line.total)
