"""Trainings with the tools that people have: transformers' Trainer, Lightning, a loop over masks; a few steps each."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pages
import pytest
import torch
from small import calls_of, images
from torch import nn

import attninject as ai
from attninject.integrations import transformers as with_blocks

pytestmark = [pytest.mark.strangers, pytest.mark.filterwarnings("ignore")]
X = images(size=32)
CBAM = {"block": "cbam", "place": "residual_branch"}


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    """The blocks' tensors."""
    names = tuple(f"{name}." for name in ai.injected(model))
    return {key: t.clone() for key, t in model.state_dict().items() if key.startswith(names)}


def moved(before: dict[str, torch.Tensor], model: nn.Module) -> list[str]:
    """Blocks of which a tensor is another than before."""
    after = values(model)
    return [
        n
        for n in ai.injected(model)
        if any(not torch.equal(before[k], after[k]) for k in before if k.startswith(f"{n}."))
    ]


# --- the Trainer of transformers -----------------------------------------------------------------


def classifier(kind: str) -> Any:
    """A tiny net of a family, with random weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "vit":
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = transformers.ViTConfig(image_size=32, patch_size=8, num_labels=3, **sizes)
        return transformers.ViTForImageClassification(config)
    config = transformers.ConvNextV2Config(
        hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_labels=3, image_size=32
    )
    return transformers.ConvNextV2ForImageClassification(config)


def settings(folder: Path, **more: Any) -> Any:
    """Of a run of four steps that writes a checkpoint every second."""
    transformers = pytest.importorskip("transformers")
    quiet = {"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True, "seed": 0}
    steps = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    return transformers.TrainingArguments(output_dir=str(folder), **{**steps, **quiet, **more})


DATA = [{"pixel_values": images(1, 32, seed=i)[0], "labels": i % 3} for i in range(8)]


@pytest.mark.parametrize(("kind", "checkpointing"), [("vit", False), ("vit", True), ("convnextv2", False)])
def test_a_trainer_trains_saves_and_resumes(kind: str, checkpointing: bool, tmp_path: Path) -> None:
    """Every block moves; its checkpoints load with blocks; a run that is resumed ends where one without a break does."""
    trainer = pytest.importorskip("transformers").Trainer
    more = {"gradient_checkpointing": checkpointing}
    model = with_blocks.inject(classifier(kind), **CBAM)
    before = values(model)
    whole = trainer(model=model, args=settings(tmp_path / "a", **more), train_dataset=DATA)
    whole.train()
    assert moved(before, model) == list(ai.injected(model))
    whole.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "final", tmp_path / "a" / "checkpoint-4"):
        loaded = with_blocks.from_pretrained(type(model), folder)
        torch.testing.assert_close(loaded(X).logits, model.eval()(X).logits)
    resumed = with_blocks.from_pretrained(type(model), tmp_path / "a" / "checkpoint-2")
    second = trainer(model=resumed, args=settings(tmp_path / "b", **more), train_dataset=DATA)
    second.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert second.state.global_step == 4
    torch.testing.assert_close(resumed.eval()(X).logits, model(X).logits, rtol=1e-3, atol=1e-3)


# --- Lightning -----------------------------------------------------------------------------------


def test_lightning_fits_saves_and_restores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module of the page: a checkpoint gives the trained blocks, a second fit goes on from it."""
    lightning = pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    (fence,) = [f for f in pages.fences("attninject/integrations/README.md") if "needs Lightning" in f.mark]
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(fence.text, fence.page, "exec"), names)
    kind = names["Classifier"]
    data = torch.utils.data.TensorDataset(images(8, 32), torch.arange(8) % 4)
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    module = kind()
    before = values(module)
    trainer = lightning.Trainer(max_epochs=1, enable_checkpointing=False, **quiet)
    trainer.fit(module, loader)
    assert moved(before, module) == [f"net.layer{i}.{j}.se" for i in (1, 2, 3, 4) for j in (0, 1)]
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    restored = kind.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert torch.equal(restored.eval().net(X), module.eval().net(X))
    again = kind()
    second = lightning.Trainer(max_epochs=2, enable_checkpointing=False, **quiet)
    second.fit(again, loader, ckpt_path=tmp_path / "a.ckpt")
    assert second.global_step == 2 * trainer.global_step
    ai.save(again.net, tmp_path / "net.safetensors")


# --- a loop over masks ---------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["resnet18", "efficientnet-b0", "mobilenet_v2", "timm-regnetx_002"])
def test_a_segmentation_model_learns_masks(encoder: str, tmp_path: Path) -> None:
    """Blocks at the encoder's and the decoder's ends; the Dice loss falls, a delta brings the model back."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    model = smp.Unet(encoder, encoder_weights=None, classes=1)
    base = copy.deepcopy(model)
    rules = [{"block": "se", "place": place} for place in ("stage_end", "decoder_end")]
    ai.inject(model, {"name": "both_ends", "rules": rules}, example_inputs=images(size=64))
    assert calls_of(model.eval(), images(size=64)) == dict.fromkeys(ai.injected(model), 1)
    before, loss = values(model), smp.losses.DiceLoss("binary")
    pictures = images(4, 64)
    masks = (pictures.mean(1, keepdim=True) > 0).float()
    optimizer = torch.optim.Adam(ai.param_groups(model.train(), lr=3e-3))
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        losses.append(loss(model(pictures), masks))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert moved(before, model) == list(ai.injected(model))
    ai.save(model, tmp_path / "a.safetensors")
    loaded = ai.load(base, tmp_path / "a.safetensors", example_inputs=images(size=64), strict_base=False)
    assert torch.equal(loaded.eval()(pictures), model.eval()(pictures))
