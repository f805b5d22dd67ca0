"""What `share:` promises: one block for several sites of one width, which is counted, saved and trained once."""

from __future__ import annotations

import copy
import json
import pickle
import re
from typing import Any

import pytest
import torch
import torchvision
from pair_nets import UNet
from safetensors import safe_open
from small import Calls, Net, images, se, stir
from torch import Tensor, nn

import attninject as ai
from attninject.delta_file import METADATA_KEY, metadata, save_tensors
from attninject.errors import BlockError, DeltaError, PlanError

X = images(size=32)
SHARED = se(after="units.*", share="model")


def net() -> nn.Module:
    """Two residual units of one width, seeded."""
    torch.manual_seed(0)
    return Net()


def injected(model: nn.Module) -> nn.Module:
    """With one SE for both units, and values in it that change what the net computes."""
    ai.inject(model, **SHARED)
    stir(model)
    return model


def test_one_block_serves_all_sites_of_one_width() -> None:
    """It stands at each, runs at each, is counted once, and the net computes what it did."""
    base, model = net().eval(), net().eval()
    plan = ai.plan(model, **SHARED)
    first, second = plan.sites
    assert (second.shares, second.parameters, first.shares) == (first.name, 0, "")
    assert plan.parameters == first.parameters > 0
    assert second.to_dict()["shares"] == first.name
    assert "rule 1: se (reduction=4), after units.*, one per model and width, init identity: 2 sites" in str(
        plan
    )
    assert re.search(r"after units\.1 +32×\d+×\d+ +NCHW +units\.1\.se +module +shared", str(plan))
    ai.inject(model, plan)
    blocks = ai.injected(model)
    assert len(blocks) == 2
    assert len({id(block) for block in blocks.values()}) == 1
    assert (
        sum(p.numel() for p in model.parameters())
        == sum(p.numel() for p in base.parameters()) + first.parameters
    )
    assert torch.equal(model(X), base(X))
    with Calls(model) as calls:
        model(X)
    assert list(calls.counts.values()) == [2, 2]  # both names are of the one block, which ran twice


def test_keys_are_those_of_a_module_in_several_places() -> None:
    """As torch has it: a key under each name, one parameter; a state dict of the model loads into its twin."""
    model = injected(net())
    names = list(ai.injected(model))
    keys = {k for k in model.state_dict() if ".se." in k}
    assert {k.partition(".se.")[0] + ".se" for k in keys} == set(names)
    assert len(keys) == 2 * len([n for n, _ in model.named_parameters() if ".se." in n])
    twin = ai.inject(net(), **SHARED)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin.eval()(X), model.eval()(X))


def test_each_stage_has_a_block_of_its_own() -> None:
    """`stage` and `owner` draw the line more closely; sites of another width never share."""
    model = torchvision.models.resnet18()

    def blocks(**rule: Any) -> dict[str, str]:
        return {
            s.name: s.shares or s.name
            for s in ai.plan(model, **se(**rule), example_inputs=images(size=64)).sites
        }

    stages = blocks(place="block_end", share="stage")
    assert len(stages) == 8
    assert set(stages.values()) == {f"layer{n}.0.se" for n in (1, 2, 3, 4)}
    assert blocks(place="block_end", share="model") == stages  # each stage has a width
    owners = blocks(after="layer[12].*.conv[12]", share="owner")
    assert len(set(owners.values())) == 4
    assert owners["layer1.0.se_2"] == "layer1.0.se"
    assert len(set(blocks(after="layer[12].*.conv[12]", share="stage").values())) == 2
    assert len(set(blocks(after="layer[12].*.conv[12]").values())) == 8


def test_copies_and_files_keep_it_one_block(tmp_path) -> None:
    """Deep copies, pickles and deltas share as the model does; in a delta each tensor stands once."""
    model = injected(net()).eval()
    expected = model(X)
    ai.save(model, tmp_path / "delta.safetensors")
    with safe_open(tmp_path / "delta.safetensors", framework="pt") as file:
        kept = [key for key in file.keys() if ".se." in key]  # noqa: SIM118
    assert len(kept) == len([n for n, _ in model.named_parameters() if ".se." in n])
    loaded = ai.load(net(), tmp_path / "delta.safetensors").eval()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert torch.equal(other(X), expected)
        blocks = list(ai.injected(other).values())
        assert blocks[0] is blocks[1] is not next(iter(ai.injected(model).values()))
    again = tmp_path / "again.safetensors"
    ai.save(loaded, again)
    assert torch.equal(ai.load(net(), again).eval()(X), expected)


def test_a_part_is_ejected_and_the_rest_stays(tmp_path) -> None:
    """Without its first place the block goes on at the others, where a delta then finds it."""
    model = injected(net()).eval()
    first, second = ai.injected(model)
    block = ai.injected(model)[second]
    ai.eject(model, first)
    assert list(ai.injected(model)) == [second]
    assert ai.injected(model)[second] is block
    ai.save(model, tmp_path / "delta.safetensors")
    loaded = ai.load(net(), tmp_path / "delta.safetensors").eval()
    assert torch.equal(loaded(X), model(X))
    ai.eject(model)
    assert torch.equal(model(X), net().eval()(X))


def test_what_is_said_of_a_shared_block_counts_it_once() -> None:
    """Status, table, notebook, groups of parameters, freezing and attention maps."""
    model = injected(net())
    first, second = ai.injected(model)
    size = sum(p.numel() for p in ai.injected(model)[first].parameters())
    status = ai.status(model)
    assert [(b.name, b.parameters, b.shares) for b in status.blocks] == [
        (first, size, ""),
        (second, 0, first),
    ]
    assert [b.site for b in status.blocks] == ["after units.0", "after units.1"]
    assert re.search(rf"{second} +SE +after units.1 +shared +as {first}", str(status))
    assert ["shares" in b for b in status.to_dict()["blocks"]] == [False, True]
    assert ai.injected(model)._repr_html_().count("shared") == 1
    ai.freeze(model)
    groups = ai.param_groups(model, lr=1e-3)
    assert sum(p.numel() for g in groups for p in g["params"]) == ai.trainable(model).learning
    maps = ai.attention_maps(model, X)
    assert set(maps[first]) == {"gate", "gate_2"}
    assert maps[second] == {}
    with pytest.raises(
        PlanError, match=re.escape(f"lets {second} share {first}: a ranking asks what a block does")
    ):
        ai.rank_sites(net(), {"rules": [SHARED]}, [(X, torch.tensor([0, 1]))] * 8, images=8, batch_size=2)


def test_gradients_of_all_sites_meet_in_it() -> None:
    """The gradient is the sum of those that a block of the same values has at each site."""
    shared, apart = injected(net()), net()
    ai.inject(apart, **se(after="units.*"))
    apart.load_state_dict(shared.state_dict())
    for model in (shared, apart):
        model.train()(X).square().mean().backward()
    (block,) = {id(b): b for b in ai.injected(shared).values()}.values()
    first, second = ai.injected(apart).values()
    for name, p in block.named_parameters():
        parts = first.get_parameter(name).grad + second.get_parameter(name).grad
        torch.testing.assert_close(p.grad, parts)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_compilers_take_a_shared_block() -> None:
    """torch.compile, compiled blocks, export, jit.trace and TorchScript compute the same."""
    model = injected(net()).eval()
    expected = model(X)
    others = [torch.export.export(model, (X,)).module(), torch.jit.trace(model, X), torch.jit.script(model)]
    others += [torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)]
    others += [ai.compile_blocks(copy.deepcopy(model), backend="eager")]
    with torch.no_grad():
        for other in others:
            torch.testing.assert_close(other(X), expected)


class Twice(nn.Module):
    """Two maps of one width, each beside a third of another."""

    def __init__(self) -> None:
        super().__init__()
        self.third, self.maps = nn.Conv2d(3, 4, 2, 2), nn.ModuleList([nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)])

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, 3, H, W) → (B, 8, H, W)."""
        third = self.third(x)
        return self.maps[1](self.maps[0](x)) + third.mean()


def test_blocks_of_two_inputs_share_where_both_widths_agree() -> None:
    """Gates of skips of several widths have a block each; two maps beside one value have one gate."""
    rule = {
        "block": "attention_gate",
        "before": "up.*::cat",
        "with_": {"before": "up.*.up"},
        "share": "model",
    }
    assert [s.shares for s in ai.plan(UNet(), **rule, example_inputs=X).sites] == ["", ""]
    rule = {"block": "attention_gate", "after": "maps.*", "with_": "third", "share": "model"}
    model = ai.inject(Twice(), **rule, example_inputs=X).eval()
    assert model.attention_gate is model.attention_gate_2
    stir(model)
    gate, third = model.attention_gate, model.third(X)
    y = gate(model.maps[1](gate(model.maps[0](X), third)), third)
    assert torch.equal(model(X), y + third.mean())


def test_a_block_made_for_one_size_is_refused_where_sizes_differ() -> None:
    """Its parameters would have to be of several shapes; the message names the site that it does not fit."""
    sizes = {"mode": "theta_plus", "extent": 0, "feat_size": 32}
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.MaxPool2d(2), nn.Conv2d(8, 8, 1))
    with pytest.raises(BlockError, match=r"at 2: .*"):
        ai.plan(model, block="ge", after=["0", "2"], share="model", args=sizes, example_inputs=X)


def test_a_delta_that_shares_what_is_not_there_is_refused(tmp_path) -> None:
    """A name of no block, and of one of another width; the model stays as it was."""
    path = tmp_path / "delta.safetensors"
    ai.save(injected(net()), path)
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        record = json.loads(file.metadata()[METADATA_KEY])
    record["sites"][1]["shares"] = "units.7.se"
    save_tensors(tensors, path, metadata(record, tensors))
    model = net()
    with pytest.raises(
        DeltaError, match=r"shares the block units\.7\.se, which is none that would fit it here"
    ):
        ai.load(model, path)
    assert ai.injected(model) == {}
