"""Models of transformers, tiny and without weights: places where a reader puts them, checkpointing after injection."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small import Calls, calls_of, images, se, stir

import attninject as ai

pytestmark = [pytest.mark.strangers, pytest.mark.filterwarnings("ignore")]
T = pytest.importorskip("transformers")
NO_DROP = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
SWIN = {
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 2],
    "window_size": 4,
    "image_size": 32,
    "patch_size": 2,
}
SEGFORMER = {"hidden_sizes": [16, 32, 48, 64], "depths": [1] * 4, "num_attention_heads": [1, 2, 2, 2]}


def net(kind: str, size: int = 32) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model in eval mode, and what it is called with."""
    torch.manual_seed(0)
    if kind == "vit":
        model = T.ViTForImageClassification(T.ViTConfig(**VIT, intermediate_size=64, **NO_DROP))
    elif kind == "dinov2":
        model = T.Dinov2ForImageClassification(T.Dinov2Config(**VIT, mlp_ratio=2, drop_path_rate=0.0))
    elif kind == "swin":
        model = T.SwinForImageClassification(T.SwinConfig(**SWIN, drop_path_rate=0.0, **NO_DROP))
    elif kind == "segformer":
        config = T.SegformerConfig(**SEGFORMER, decoder_hidden_size=32, drop_path_rate=0.0)
        model = T.SegformerForSemanticSegmentation(config)
    elif kind == "mobilevit":
        model = T.MobileViTForImageClassification(T.MobileViTConfig(image_size=64))
    else:
        sizes = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "image_size": 32}
        model = T.ConvNextV2ForImageClassification(T.ConvNextV2Config(**sizes))
    return model.eval(), {"pixel_values": images(size=size)}


# --- places --------------------------------------------------------------------------------------

STAGES = {
    "mobilevit": [f"mobilevit.encoder.layer.{i}" for i in range(5)],
    "segformer": [f"segformer.stages.{i}" for i in range(4)],
    "convnextv2": [f"convnextv2.encoder.stages.{i}" for i in range(4)],
}


@pytest.mark.parametrize("kind", STAGES)
def test_stage_ends(kind: str) -> None:
    """One at each of the stages, the last layer of it or the stage itself."""
    model, given = net(kind, 64)
    paths = [site.path for site in ai.plan(model, **se(place="stage_end"), example_inputs=given).sites]
    assert len(paths) == len(STAGES[kind])
    assert all(f"{path}.".startswith(f"{stage}.") for path, stage in zip(paths, STAGES[kind], strict=True)), (
        paths
    )


@pytest.mark.parametrize("options", [{}, {"output_hidden_states": True}, {"output_attentions": True}])
def test_segformer_after_a_forward(options: dict[str, bool]) -> None:
    """The library hangs hooks on layers at the first forward; they change nothing, and neither do the blocks."""
    model, given = net("segformer", 64)
    before = model(**given, **options).logits
    ai.inject(model, **se(place="residual_branch"), example_inputs=given)
    assert len(ai.injected(model)) == 8
    assert torch.equal(model(**given, **options).logits, before)
    stir(model)
    assert not torch.equal(model(**given, **options).logits, before)


def test_residual_branches_of_a_vit() -> None:
    """Two in each layer, behind attention and behind the MLP."""
    model, given = net("vit")
    sites = ai.plan(model, **se(place="residual_branch"), example_inputs=given).sites
    assert [site.owner for site in sites] == [f"vit.layers.{i}" for i in (0, 0, 1, 1)]
    assert {str(site.layout).split()[0].split("(")[0] for site in sites} == {"NLC"}


# --- checkpointing -------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("kind", "place"),
    [("vit", "residual_branch"), ("dinov2", "residual_branch"), ("swin", "block_end"), ("swin", "residual_branch")],
)  # fmt: skip
def test_checkpointing_switched_on_after_injection(kind: str, place: str, reentrant: bool) -> None:
    """The gradients of the same net without; each block runs again for the backward, as often as its layer does."""
    model, given = net(kind)
    times = (
        3 if kind == "swin" and place == "residual_branch" else 2
    )  # there stages are checkpointed as layers are
    ai.inject(model, **se(place=place), example_inputs=given)
    stir(model)
    plain = copy.deepcopy(model).train()
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    labels = torch.tensor([0, 1])
    for _ in range(2):
        for each in (model, plain):
            each.zero_grad()
        with Calls(model) as calls:
            model(**given, labels=labels).loss.backward()
        plain(**given, labels=labels).loss.backward()
        assert all(2 <= calls.order.count(name) <= times for name in ai.injected(model)), calls.order
        for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            if q.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, msg=lambda text, name=name: f"{name}: {text}")
    assert torch.equal(model.eval()(**given).logits, plain.eval()(**given).logits)


@pytest.mark.parametrize("kind", ["vit", "dinov2", "swin", "segformer", "mobilevit", "convnextv2"])
def test_blocks_change_nothing_until_they_are_trained(kind: str) -> None:
    """Bit for bit; each runs once, ejecting gives the net back."""
    model, given = net(kind, 32 if kind in ("vit", "dinov2", "swin") else 64)
    before, keys = model(**given).logits, list(model.state_dict())
    block = "se" if kind == "mobilevit" else "cbam"  # its layers hold tokens in an order of their own
    ai.inject(model, block=block, place="residual_branch", example_inputs=given)
    assert torch.equal(model(**given).logits, before)
    assert calls_of(model, given["pixel_values"]) == dict.fromkeys(ai.injected(model), 1)
    assert list(ai.eject(model).state_dict()) == keys
