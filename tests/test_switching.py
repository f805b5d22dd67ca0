"""Several deltas on one base: which is active, what switching changes, and that nothing else is touched."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from small import Net
from torch import nn

import attninject as ai
from attninject import errors

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def base() -> Net:
    """A base with weights and statistics of its own, the same at every call."""
    torch.manual_seed(0)
    net = Net()
    net.train()(X)
    return net.eval()


def with_classes(net: Net, count: int | None) -> Net:
    """The net with a head of so many classes, as a fine-tuning would give it."""
    if count is not None:
        torch.manual_seed(count)
        net.head = nn.Linear(net.head.in_features, count)
    return net


def make(
    file: Path, block: str, classes: int | None = None, seed: int = 1, whole: bool = False, **where: Any
) -> Any:
    """The answer of a trained model on X, whose delta is in the file then: blocks, head, norms, and all if `whole`."""
    net = with_classes(base(), classes)
    ai.inject(net, **{"block": block, "after": "units.*.norm", "example_inputs": X, "args": {}, **where})
    if not whole:
        ai.freeze(net, bn="train", head="head")
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    net.train()
    for _ in range(2):
        net(X + torch.randn_like(X)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    ai.save(net.eval(), file)
    with torch.no_grad():
        return net(X)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three deltas of the base: `a` and `b` of other heads, blocks and sites, `c` with every layer trained."""
    folder = tmp_path_factory.mktemp("deltas")
    torch.manual_seed(0)
    kinds: dict[str, dict[str, Any]] = {
        "a": {"block": "se", "args": {"reduction": 4}},
        "b": {"block": "cbam", "args": {"reduction": 8}, "classes": 7, "after": ["units.1", "stem"]},
        "c": {"block": "se", "args": {"reduction": 2}, "whole": True, "after": "units.1.norm"},
    }
    outputs = {name: make(folder / f"{name}.safetensors", **kind) for name, kind in kinds.items()}
    return {"folder": folder, "outputs": outputs}


@pytest.fixture
def net(made: dict[str, Any]) -> nn.Module:
    """The base with all three: a is active."""
    model = base()
    for name in "abc":
        ai.load(model, made["folder"] / f"{name}.safetensors", name=name, example_inputs=X)
    return model


def answers(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(X)


def tensors(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Each tensor's identity, place in memory, and how often it was written to."""
    state = model.state_dict(keep_vars=True)
    return {key: (id(t), t.data_ptr(), t._version) for key, t in state.items()}


def everything(model: nn.Module) -> Any:
    """What an error must leave alone."""
    return tensors(model), [type(m) for m in model.modules()], ai.active(model), ai.status(model).to_dict()


def test_each_delta_computes_as_it_was_saved(net: nn.Module, made: dict[str, Any]) -> None:
    """Whatever the order of switching, each computes bit for bit what its own model did, and the base what it did."""
    assert ai.active(net) == "a"
    for name in ["b", "a", "c", None, "c", "b", "base", "a"]:
        assert ai.activate(net, name) is net
        assert ai.active(net) == (None if name == "base" else name)
        expected = made["outputs"].get(name, answers(base()))
        assert torch.equal(answers(net), expected)


def test_switching_copies_and_writes_nothing(net: nn.Module) -> None:
    """Each delta's tensors and the base's are the same objects at the same place, unwritten, when their turn comes."""
    first = {}
    for name in ["a", "b", "c", None]:
        ai.activate(net, name)
        first[name] = tensors(net)
    for name in ["b", None, "a", "c"]:
        ai.activate(net, name)
        assert tensors(net) == first[name]
    frozen = "units.0.conv.weight"
    assert first["a"][frozen] == first["b"][frozen] == first[None][frozen] != first["c"][frozen]


def test_the_base_is_as_it_was_before_any_delta(made: dict[str, Any]) -> None:
    """Loading, switching and unloading leave keys, tensor objects, values and classes of the base as they were."""
    model = base()
    before, classes = tensors(model), [type(m) for m in model.modules()]
    for name in "ab":
        ai.load(model, made["folder"] / f"{name}.safetensors", name=name, example_inputs=X)
    assert ai.unload(model) is model
    assert (tensors(model), [type(m) for m in model.modules()]) == (before, classes)
    assert ai.injected(model) == {}
    assert not [key for key in model.__dict__ if "deltas" in key]


def test_only_the_active_delta_is_part_of_the_model(net: nn.Module) -> None:
    """Parameters and keys are those of a model with this delta alone: nothing that waits reaches an optimizer."""
    ai.activate(net, "b")
    names = [name for name, _ in net.named_parameters()]
    assert [n for n in names if ".cbam." in n]
    assert not [n for n in names if ".se." in n]
    assert [k for k in net.state_dict() if "deltas" in k] == []


def test_heads_of_other_sizes_say_so(net: nn.Module) -> None:
    """The layer knows its number of outputs after each switch, and is the same object."""
    head = net.head
    counts = []
    for name in ["a", "b", None]:
        ai.activate(net, name)
        assert net.head is head
        counts.append((head.out_features, len(head.weight), len(head.bias), answers(net).shape[1]))
    assert counts[1] == (7,) * 4
    assert counts[0] == counts[2] == (base().head.out_features,) * 4


def test_training_one_leaves_the_others_alone(net: nn.Module, made: dict[str, Any]) -> None:
    """An optimizer made of one delta trains that one, also after others were active in between."""
    ai.freeze(net, bn="train", head="head")
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for other in ["b", None]:
        net(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        trained = answers(net.eval())
        ai.activate(net, other)
        assert torch.equal(answers(net), made["outputs"]["b"] if other else answers(base()))
        ai.activate(net, "a")
        assert torch.equal(answers(net), trained)
    assert not torch.equal(trained, made["outputs"]["a"])


def test_saving_writes_the_active_one(net: nn.Module, made: dict[str, Any], tmp_path: Path) -> None:
    """Its file loads into a base of its own classes, and beside the others; norms held since do not take it out."""
    ai.freeze(net)
    ai.activate(net, "c")
    ai.save(net, tmp_path / "c2.safetensors")
    assert torch.equal(
        answers(ai.load(base(), tmp_path / "c2.safetensors", example_inputs=X)), made["outputs"]["c"]
    )
    ai.activate(net, "b")
    ai.freeze(net)
    ai.save(net, tmp_path / "b2.safetensors")
    ai.load(net, tmp_path / "b2.safetensors", name="b2", example_inputs=X)
    assert torch.equal(answers(ai.activate(net, "b2")), made["outputs"]["b"])


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_switch_for_themselves(net: nn.Module, made: dict[str, Any], way: str) -> None:
    """A copy has every delta, and what is done to it does not reach the original."""
    ai.activate(net, "b")
    twin = copy.deepcopy(net) if way == "deepcopy" else pickle.loads(pickle.dumps(net))
    assert ai.active(twin) == "b"
    for name in ["a", "c", "b"]:
        assert torch.equal(answers(ai.activate(twin, name)), made["outputs"][name])
    for name in ["a", "c", "b"]:
        for parameter in ai.activate(twin, name).parameters():
            parameter.data.zero_()
    for name in ["c", "a"]:
        assert torch.equal(answers(ai.activate(net, name)), made["outputs"][name])


def test_what_waits_follows_the_model(net: nn.Module, made: dict[str, Any]) -> None:
    """After `.double()` and `.train()` while they waited, deltas come back in the model's dtype and mode."""
    net.double().train()
    for name in ["b", "c"]:
        ai.activate(net, name)
        assert {p.dtype for p in net.parameters()} == {torch.float64}
        assert all(m.training for m in net.modules())
    torch.testing.assert_close(net.eval()(X.double()), made["outputs"]["c"].double(), rtol=1e-4, atol=1e-5)


def test_unloading_one(net: nn.Module, made: dict[str, Any]) -> None:
    """The active one gives way to the base; one that waits goes without a trace; the rest stay."""
    ai.unload(net, "a")
    assert ai.active(net) is None
    assert torch.equal(answers(net), answers(base()))
    ai.unload(net, "c")
    assert ai.status(net).deltas == ("b",)
    assert torch.equal(answers(ai.activate(net, "b")), made["outputs"]["b"])


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda m, f: ai.activate(m, "aa"), "no delta 'aa'; .*a, b, c"),
        (lambda m, f: ai.unload(m, "d"), "no delta 'd'"),
        (lambda m, f: ai.load(m, f / "a.safetensors", name="a"), "a delta 'a' already"),
        (lambda m, f: ai.load(m, f / "a.safetensors", name="base"), "'base' is no name"),
        (lambda m, f: ai.load(m, f / "a.safetensors"), r"named deltas \(a, b, c\): give .* a name too"),
        (lambda m, f: ai.load(m, f / "missing", name="d"), "no delta file"),
        (lambda m, f: ai.activate(nn.DataParallel(m), "b"), "wrapped in DataParallel"),
    ],
)
def test_a_refusal_leaves_everything(net: nn.Module, made: dict[str, Any], act: Any, said: str) -> None:
    """Each refused call says why, and model and deltas are as they were."""
    before = everything(net)
    with pytest.raises(errors.AttnInjectError, match=said):
        act(net, made["folder"])
    assert everything(net) == before


def test_a_delta_of_another_base_is_refused_beside_the_others(net: nn.Module, tmp_path: Path) -> None:
    """Values of frozen layers, and other shapes than a head's, are compared with the base, not with the active one."""
    other = base()
    with torch.no_grad():
        other.units[0].conv.weight.add_(1)
    ai.freeze(ai.inject(other, block="se", after="stem", args={"reduction": 4}, example_inputs=X))
    ai.save(other, tmp_path / "d.safetensors")
    before = everything(net)
    with pytest.raises(errors.DeltaError, match="frozen tensors have other values"):
        ai.load(net, tmp_path / "d.safetensors", name="d", example_inputs=X)
    assert everything(net) == before


def test_a_switch_that_fails_half_way_is_undone(net: nn.Module, made: dict[str, Any]) -> None:
    """Where a module was replaced since, that delta says so, and the active one stays in."""
    ai.activate(net, "a")
    net.units[1].norm = nn.Identity()
    before = everything(net)
    for name in ["b", "c"]:
        with pytest.raises(errors.AttnInjectError, match=r"units\.1\.norm"):
            ai.activate(net, name)
        assert everything(net) == before


def test_unnamed_blocks_are_not_lost(made: dict[str, Any]) -> None:
    """A model whose blocks have no name takes no named delta: nobody kept the base that is under them."""
    model = ai.load(base(), made["folder"] / "a.safetensors", example_inputs=X)
    with pytest.raises(errors.DeltaError, match="belong to no named delta"):
        ai.load(model, made["folder"] / "b.safetensors", name="b", example_inputs=X)
    assert torch.equal(answers(model), made["outputs"]["a"])


def test_status_names_the_deltas(net: nn.Module) -> None:
    """The table's line says which is active and which wait."""
    assert "a of the deltas a, b, c is active" in str(ai.status(net))
    assert ai.status(ai.activate(net, None)).to_dict()["active"] is None


def test_compiled_after_a_switch(net: nn.Module, made: dict[str, Any]) -> None:
    """A torch.compile made after a switch computes the delta that is active; a compiled model is not switched."""
    compiled = torch.compile(net, backend="eager")
    assert torch.equal(answers(compiled), made["outputs"]["a"])
    assert ai.active(compiled) == "a"
    with pytest.raises(errors.UnsupportedModelError, match="compiled"):
        ai.activate(compiled, "b")
    ai.activate(net, "b")
    torch.testing.assert_close(answers(torch.compile(net, backend="eager")), made["outputs"]["b"])
