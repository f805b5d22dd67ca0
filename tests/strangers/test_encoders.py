"""EfficientNets of the older package, and encoders of segmentation models: forwards that decide by numbers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from small import calls_of, images, se, stir

import attninject as ai

pytestmark = [pytest.mark.strangers, pytest.mark.filterwarnings("ignore")]
X = images(size=64)


def test_residual_branches_of_an_older_efficientnet() -> None:
    """Where a unit adds its input; at another drop rate and in both modes it computes what the bare net does."""
    efficientnet = pytest.importorskip("efficientnet_pytorch").EfficientNet
    torch.manual_seed(0)
    base = efficientnet.from_name("efficientnet-b0", num_classes=5).eval()
    adding = [
        n for n, unit in enumerate(base._blocks) if unit.id_skip and unit._block_args.stride in (1, [1])
    ]
    adding = [
        n
        for n in adding
        if base._blocks[n]._block_args.input_filters == base._blocks[n]._block_args.output_filters
    ]
    model = copy.deepcopy(base)
    plan = ai.plan(model, **se(place="residual_branch"), example_inputs=X)
    assert [(site.owner, site.mechanism) for site in plan.sites] == [
        (f"_blocks.{n}", "graph") for n in adding
    ]
    ai.inject(model, plan)
    for rate in (0.2, None, 0.5):
        for net in (base, model):
            net._global_params = net._global_params._replace(drop_connect_rate=rate)
        for training in (True, False):
            outputs = []
            for net in (base, model):
                torch.manual_seed(1)
                outputs.append(net.train(training)(X))
            assert torch.equal(*outputs)
    stir(model)
    assert torch.equal(pickle.loads(pickle.dumps(model))(X), model(X))


ENCODERS = {  # the encoder's own list of maps, the input aside: how many strides it has
    "resnet18": 5, "efficientnet-b0": 5, "mobilenet_v2": 5, "densenet121": 5,
    "timm-regnetx_002": 5, "mit_b0": 4, "tu-convnext_atto": 4,
}  # fmt: skip


@pytest.mark.parametrize("name", ENCODERS)
def test_stage_ends_are_the_encoders(name: str) -> None:
    """Not the decoder's, at most one per stride, the deepest among them; each block runs once and changes nothing."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    model = smp.Unet(name, encoder_weights=None).eval()
    before = model(X)
    sites = ai.plan(model, **se(place="stage_end"), example_inputs=X).sites
    sides = [site.shape[-1] for site in sites]
    assert all(site.path.startswith("encoder") for site in sites), [site.path for site in sites]
    assert sides == sorted(set(sides), reverse=True)
    assert sides[-1] == model.encoder(X)[-1].shape[-1]
    assert len(sides) in (ENCODERS[name], ENCODERS[name] - 1)
    ai.inject(model, **se(place="stage_end"), example_inputs=X)
    assert torch.equal(model(X), before)
    assert calls_of(model, X) == dict.fromkeys(ai.injected(model), 1)
