"""Attention gates in U-Nets of other packages, and the gate that MONAI has beside ours."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from small import calls_of, images, stir
from torch import nn

import attninject as ai

pytestmark = [pytest.mark.strangers, pytest.mark.filterwarnings("ignore")]


def check(base: nn.Module, x: torch.Tensor, recipe: object, names: list[str]) -> None:
    """Bit-equal in both modes, each gate once; after training copies compute the same, and eject gives the net back."""
    model = ai.inject(copy.deepcopy(base), recipe, example_inputs=x)
    assert list(ai.injected(model)) == names
    for training in (True, False):
        outputs = []
        for net in (base, model):
            torch.manual_seed(1)
            outputs.append(net.train(training)(x))
        assert torch.equal(*outputs)
    assert calls_of(model, x) == dict.fromkeys(names, 1)
    stir(model)
    expected = model(x)
    assert not torch.equal(expected, base(x))
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    ai.eject(model)
    assert torch.equal(model(x), base(x))


@pytest.mark.parametrize("encoder", ["resnet18", "efficientnet-b0", "mobilenet_v2"])
def test_the_shipped_recipe_gates_every_skip_of_a_unet(encoder: str) -> None:
    """Four skips of five decoder blocks, in the block's own forward, by what the block is given from below."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    base = smp.Unet(encoder, encoder_weights=None)
    plan = ai.plan(base, "attention_unet", example_inputs=images(size=64))
    assert [site.second.channels for site in plan.sites] == [
        block.conv1[0].in_channels - site.channels
        for block, site in zip(base.decoder.blocks, plan.sites, strict=False)
    ]
    check(base, images(size=64), "attention_unet", [f"decoder.blocks.{n}.attention_gate" for n in range(4)])


def test_the_skips_of_a_unet_of_monai() -> None:
    """Its skips are modules around what lies below, each within the other: the map in front, gated by what is behind."""
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    base = nets.UNet(2, 1, 2, channels=(8, 16, 32), strides=(2, 2), num_res_units=1)
    rule = {"block": "attention_gate", "before": "**::cat", "with": "**.submodule"}
    check(
        base,
        images(size=32, channels=1),
        {"rules": [rule]},
        ["model.1.attention_gate", "model.1.submodule.1.attention_gate"],
    )


def test_the_skips_of_a_volume() -> None:
    """In three dimensions, where the skip is an operand of the module that joins it."""
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    base = nets.BasicUNet(3, 1, 2, features=(4, 4, 8, 8, 16, 4))
    rule = {"block": "attention_gate", "before": "upcat_[123]", "input": 1, "with": {"before": "upcat_[123]"}}
    x = torch.randn(2, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    check(base, x, {"rules": [rule]}, ["attention_gate", "attention_gate_2", "attention_gate_3"])


def test_the_gate_is_monais_where_it_has_norms() -> None:
    """MONAI's AttentionBlock, given the same weights, gives the same; the biases in front of its norms do nothing."""
    blocks = pytest.importorskip("monai.networks.nets.attentionunet")
    torch.manual_seed(0)
    theirs = blocks.AttentionBlock(2, f_int=8, f_g=24, f_l=16).train()
    ours = ai.create_block("attention_gate", 16, other_channels=24, init="paper", norm=True).train()
    for mine, their in ((ours.inputs, theirs.W_x), (ours.signal, theirs.W_g), (ours.score, theirs.psi)):
        mine.conv.weight.data.copy_(their[0].conv.weight)
        mine.norm.load_state_dict(their[1].state_dict())
    x, g = images(channels=16), images(channels=24, seed=1)
    torch.testing.assert_close(ours(x, g), theirs(g=g, x=x))
