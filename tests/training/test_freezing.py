"""Freezing: what learns, what stays still, what a delta of it holds, and that unfreezing undoes it."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import small
import torch
import torchvision
from nets import net
from safetensors import safe_open
from torch import nn

import attninject as ai
from attninject import errors
from attninject.training import GradualUnfreezing
from attninject.training.heads import head_of


class Net(small.Net):
    """Two residual units between a stem and a head; `anchor` is a parameter that never learns."""

    def __init__(self, width: int = 16, classes: int = 5) -> None:
        super().__init__(width, classes)
        self.anchor = nn.Parameter(torch.ones(width), requires_grad=False)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return super().features(x) * self.anchor


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def injected() -> nn.Module:
    """The net with CBAM behind both norms."""
    torch.manual_seed(0)
    rule = {"block": "cbam", "after": "units.*.norm", "args": {"reduction": 4}, "example_inputs": X}
    return ai.inject(Net(), **rule)


def train(model: nn.Module, steps: int = 3, optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """The model after a few steps on what learns."""
    torch.manual_seed(1)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.SGD(learning, lr=0.1, weight_decay=0.1)
    model.train()
    for _ in range(steps):
        model(torch.randn(4, 3, 8, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def learning(model: nn.Module) -> set[str]:
    """Names of the parameters that learn."""
    return {n for n, p in model.named_parameters() if p.requires_grad}


def values(model: nn.Module) -> dict[str, bytes]:
    """Key → bytes."""
    return {k: t.numpy().tobytes() for k, t in model.state_dict().items()}


def keys_of(path: Path) -> set[str]:
    """Keys in a delta file."""
    with safe_open(path, "pt") as file:
        return set(file.keys())


def test_a_frozen_backbone_does_not_change_in_a_hundred_steps() -> None:
    """Blocks and head learn; no weight or statistic of the backbone moves; eject gives it back."""
    torch.manual_seed(0)
    clean = Net()
    before = values(clean)
    model = ai.freeze(injected())
    train(model, 100)
    assert learning(model) == {n for n, _ in model.named_parameters() if "cbam" in n or n.startswith("head")}
    after = values(ai.eject(model))
    moved = {k for k in before if before[k] != after[k]}
    assert moved == {"head.weight", "head.bias"}


def test_norms_go_on_where_that_is_asked_for() -> None:
    """bn="train" freezes the affine parameters only; the statistics follow the data."""
    model = ai.freeze(Net(), bn="train")
    before = values(model)
    train(model)
    moved = {k for k in before if before[k] != values(model)[k]}
    assert moved == {"head.weight", "head.bias"} | {
        f"units.{i}.norm.{b}" for i in (0, 1) for b in ("running_mean", "running_var", "num_batches_tracked")
    }


def test_held_norms_survive_copies_and_follow_their_own_model() -> None:
    """Copies, pickles and a wrapper's .train() leave them in eval; unfreezing a copy leaves the original."""
    model = ai.freeze(injected())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), torch.load(file, weights_only=False)]
    torch.compile(model, backend="eager").train()
    assert not model.units[0].norm.training
    assert model.units[0].cbam.spatial.norm.training
    for other in copies:
        other.train()
        assert other.units[0].norm.train() is other.units[0].norm
        assert not other.units[0].norm.training
        ai.unfreeze(other)
        assert other.units[0].norm.training
        assert other.train().units[0].norm.training
        assert learning(other) == learning(injected())
    assert not model.train().units[0].norm.training
    assert set(model.state_dict()) == set(injected().state_dict())


def test_unfreeze_undoes_freeze_exactly() -> None:
    """requires_grad, modes and attributes are as before; what never learned does not begin to."""
    model = injected().train()
    before = {n: (type(m), m.training, set(m.__dict__)) for n, m in model.named_modules()}
    learned = learning(model)
    ai.unfreeze(ai.freeze(model, ["backbone", "head", "injected"]), ["backbone", "head", "injected"])
    assert learning(model) == learned
    assert "anchor" not in learned
    assert {n: (type(m), m.training, set(m.__dict__)) for n, m in model.named_modules()} == before


@pytest.mark.parametrize(
    ("what", "frozen"),
    [
        ("units", {"units.0.conv.weight", "units.0.norm.weight", "units.0.norm.bias", "units.1.conv.weight",
                   "units.1.norm.weight", "units.1.norm.bias"}),
        ("units.0", {"units.0.conv.weight", "units.0.norm.weight", "units.0.norm.bias"}),
        ("units.*.norm", {f"units.{i}.norm.{n}" for i in (0, 1) for n in ("weight", "bias")}),
        ("stem.bias", {"stem.bias"}),
        ("head", {"head.weight", "head.bias"}),
        ("**.spatial.conv", {f"units.{i}.cbam.spatial.conv.weight" for i in (0, 1)}),
        (["stem", "head"], {"stem.weight", "stem.bias", "head.weight", "head.bias"}),
    ],
)  # fmt: skip
def test_patterns(what: str | list[str], frozen: set[str]) -> None:
    """A pattern takes what it matches with all below; blocks only where it matches nothing else."""
    model = injected()
    before = learning(model)
    assert before - learning(ai.freeze(model, what)) == frozen
    held = {n for n, m in model.train().named_modules() if isinstance(m, nn.BatchNorm2d) and not m.training}
    assert held == {n.removesuffix(".weight") for n in frozen if n.endswith("norm.weight")}


def test_any_name_of_a_module_will_do() -> None:
    """Either name of a module freezes it, and a head that has a second one stays out of the backbone."""
    model = Net()
    model.alias, model.last = model.units[0], model.head
    assert not any(p.requires_grad for p in ai.freeze(model, "alias").units[0].parameters())
    ai.unfreeze(model, "units.0")
    assert all(p.requires_grad for p in model.units.parameters())
    ai.freeze(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}


def test_stages_of_a_real_network() -> None:
    """Stages count from 1, or from -1 at the end; together with the rest they are the whole network."""
    model = net("torchvision/resnet18")
    before = learning(model)
    ai.freeze(model, -1)
    assert before - learning(model) == {n for n in before if n.startswith("layer4.")}
    ai.freeze(model, [1, 2])
    assert before - learning(model) == {n for n in before if n.startswith(("layer1.", "layer2.", "layer4."))}
    with pytest.raises(errors.NoMatchError, match="there is no stage 5: ResNet has 4 stages"):
        ai.freeze(model, 5)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("torchvision/resnet18", ["fc"]),
        ("torchvision/squeezenet1_1", ["classifier"]),
        ("timm/convnext_atto", ["head.fc"]),
    ],
)
def test_heads_are_found(name: str, head: list[str]) -> None:
    """By timm's own word, as the last Linear, or as the classifier of a net without one."""
    assert head_of(net(name)) == head


def test_heads_of_segmenters_and_own_nets() -> None:
    """All beside a backbone; a head of one's own is given by name or as the module, and is remembered."""
    segmenter = torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None)
    assert head_of(segmenter) == ["classifier"]
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    with pytest.raises(errors.NoHeadError, match=r'name it, as in ai.freeze\(model, head="fc"\)'):
        ai.freeze(plain)
    with pytest.raises(errors.NoHeadError, match="no module matches head='3'"):
        ai.freeze(plain, head="3")
    ai.freeze(plain, head=plain[2])
    assert learning(plain) == {"2.weight", "2.bias"}
    assert [g["name"] for g in ai.param_groups(copy.deepcopy(plain))] == ["head", "head, no decay"]
    ai.unfreeze(plain)
    assert len(learning(plain)) == 6


def test_wrong_arguments_are_named() -> None:
    """A pattern that matches nothing, a mode that is none, and a wrapper that has counted what learns."""
    model = injected()
    with pytest.raises(errors.NoMatchError, match=r"no module or parameter matches 'unit\.0'.*units\.0"):
        ai.freeze(model, "unit.0")
    with pytest.raises(ValueError, match="expected 'eval' or 'train', found 'off'"):
        ai.freeze(model, bn="off")
    with pytest.raises(errors.NoMatchError, match="no injected blocks"):
        ai.freeze(Net(), "injected")
    assert learning(model) == learning(injected())


def test_trainable_is_one_line() -> None:
    """How much learns, of how much, in percent; wrappers do not matter."""
    model = ai.freeze(ai.inject(net("torchvision/resnet18"), "cbam_resnet"))
    assert ai.trainable(model) == "602.9 k of 11.8 M (5.1 %)"
    assert ai.trainable(torch.compile(model)) == ai.trainable(model)
    assert ai.trainable(nn.Linear(3, 2)) == "8 of 8 (100.0 %)"


# --- what a delta holds -------------------------------------------------------------------------


def test_delta_of_a_frozen_cbam_resnet50_holds_blocks_and_head_only(tmp_path: Path) -> None:
    """Neither a weight nor a batch norm statistic of the backbone is in the file."""
    base = torchvision.models.resnet50()
    fresh = copy.deepcopy(base)
    model = ai.freeze(ai.inject(base, "cbam_resnet"))
    with torch.no_grad():
        model.fc.weight.mul_(2)
    ai.save(model, tmp_path / "d.safetensors")
    keys = keys_of(tmp_path / "d.safetensors")
    assert keys == {k for k in model.state_dict() if ".cbam." in k or k.startswith("fc.")}
    assert len(keys) == 16 * 10 + 2
    assert torch.equal(ai.load(fresh, tmp_path / "d.safetensors").fc.weight, model.fc.weight)


def test_delta_holds_what_learned_before_it_was_frozen(tmp_path: Path) -> None:
    """Trained after injection and then frozen, by `freeze` or by hand: in the file, with the statistics."""
    torch.manual_seed(0)
    base, path = Net(), tmp_path / "d.safetensors"
    for by_hand in (False, True):
        model = train(injected())
        if by_hand:
            for p in model.parameters():
                p.requires_grad_(False)
        else:
            ai.freeze(model)
        ai.save(model.eval(), path)
        with torch.no_grad():
            assert torch.equal(ai.load(copy.deepcopy(base), path).eval()(X), model(X))


def test_delta_after_gradual_unfreezing_and_freezing_again(tmp_path: Path) -> None:
    """A unit that learned for a while is in the file, the one that never did is not."""
    model = ai.freeze(injected().to("cpu", memory_format=torch.channels_last))
    train(ai.unfreeze(model, "units.1"))
    ai.freeze(model)
    ai.save(model, tmp_path / "d.safetensors")
    keys = {k for k in keys_of(tmp_path / "d.safetensors") if "cbam" not in k and not k.startswith("head")}
    assert keys == {f"units.1.{k}" for k in small.Unit(4).state_dict()}


def test_a_copy_keeps_what_freeze_knew(tmp_path: Path) -> None:
    """The delta of a deepcopy (an EMA model) of a frozen model is as small as the model's own."""
    model = ai.freeze(injected())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.add_(0)
    ai.save(model, tmp_path / "a.safetensors")
    ai.save(twin, tmp_path / "b.safetensors")
    assert keys_of(tmp_path / "a.safetensors") == keys_of(tmp_path / "b.safetensors")


# --- gradual unfreezing -------------------------------------------------------------------------


def test_gradual_unfreezing_by_epoch() -> None:
    """Each part begins to learn at its epoch and is reported once; a resumed run catches up."""
    model = ai.freeze(injected())
    steps = GradualUnfreezing(model, {2: "backbone", 1: "units.1"})
    assert steps.step(0) == []
    found = steps.step(1)
    assert {id(p) for p in found} == {id(p) for n, p in model.named_parameters() if n in {
        "units.1.conv.weight", "units.1.norm.weight", "units.1.norm.bias"}}  # fmt: skip
    assert steps.step(1) == []
    assert model.train().units[1].norm.training
    assert not model.units[0].norm.training
    late = ai.freeze(injected())
    GradualUnfreezing(late, {2: "backbone", 1: "units.1"}).step(5)
    assert learning(late) == learning(injected())
    with pytest.raises(errors.NoMatchError, match="'unitz'"):
        GradualUnfreezing(model, {1: "unitz"})
