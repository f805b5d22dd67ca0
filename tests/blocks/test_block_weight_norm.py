"""Norms of weights divide by the zero layer that makes a block the identity: said before a loss is not finite."""

from __future__ import annotations

import warnings

import pytest
import torch
from block_cases import noise
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import attninject as ai
from attninject.blocks.both import CBAM
from attninject.blocks.channel import SE
from attninject.blocks.descriptors import GC
from attninject.blocks.gate import divided_zeros

NORMS = {
    "weight": parametrizations.weight_norm,
    "spectral": parametrizations.spectral_norm,
    "old weight": nn.utils.weight_norm,
    "old spectral": nn.utils.spectral_norm,
}
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_a_norm_on_the_zero_layer_is_said(norm):
    """When the block is put into a mode, as every training loop does, with the layer's name and what to do."""
    block = SE(16)
    norm(block.fc2)
    assert not torch.isfinite(block(noise(2, 16, 4, 4))).all()
    for mode in (True, False):
        with pytest.warns(UserWarning, match=r'SE: the weight of fc2 is zero.*init="blend"'):
            block.train(mode)


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_nothing_is_said_where_it_divides_by_something(norm):
    """Other layers, other inits, a layer that has learnt."""
    for init, learnt in (("blend", False), ("identity", True)):
        block = SE(16, init=init)
        if learnt:
            nn.init.normal_(block.fc2.weight)
        norm(block.fc1), norm(block.fc2)
        block.train().eval()
        assert torch.isfinite(block(noise(2, 16, 4, 4))).all()


def test_inner_layers_are_named_once_and_other_parametrizations_are_none_of_it():
    """A layer in a part of the block by its path; a part that is a block speaks for itself; pruning divides nothing."""
    block = GC(16, fusion="both")
    for mlp in (block.mlp_scale, block.mlp_add):
        parametrizations.weight_norm(mlp.fc2)
    with pytest.warns(UserWarning, match=r"GC: the weight of mlp_scale.fc2, mlp_add.fc2 is zero"):
        block.train()
    whole = CBAM(16)
    parametrizations.weight_norm(whole.channel.fc2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        whole.train()
    assert [str(w.message).split(":")[0] for w in said] == ["ChannelAttention"]
    pruned = SE(16)
    prune.l1_unstructured(pruned.fc2, "weight", 0.5)
    parametrize.register_parametrization(pruned.fc1, "weight", nn.Identity())
    assert divided_zeros(pruned.train()) == []


def test_a_loss_that_is_not_finite_for_it_names_the_layer():
    """Where nobody changed the mode in between."""
    from attninject.errors import NonFiniteError

    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    )
    ai.inject(model, block="se", after="1", example_inputs=noise(2, 3, 32, 32))
    for block in ai.injected(model).values():
        parametrizations.weight_norm(block.fc2)
    with (
        pytest.warns(UserWarning, match="divides by it"),
        pytest.raises(NonFiniteError, match=r"at step 1 \(.*fc2: a zero weight"),
    ):
        ai.training.finetune(model, epochs=1)
