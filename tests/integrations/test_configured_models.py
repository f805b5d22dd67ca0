"""Models of transformers, tiny and offline: blocks ride in the config, as plain data, and come back with the weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small import calls_of, images, stir
from torch import nn

import attninject as ai
from attninject import errors
from attninject.blocks import registry
from attninject.integrations import transformers as with_blocks

transformers = pytest.importorskip("transformers", reason="comes with the extra `test`, by PEFT")
X = images(size=32)
CBAM = {"block": "cbam", "place": "residual_branch"}


def vit(kind: str = "ViTForImageClassification") -> Any:
    """Two layers; its file has the layers under other names than the model has."""
    torch.manual_seed(0)
    width = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(image_size=32, patch_size=8, num_labels=3, **width)
    return getattr(transformers, kind)(config).eval()


def trained() -> Any:
    """With blocks that do something."""
    model = with_blocks.inject(vit(), **CBAM)
    stir(model)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `save_pretrained` writes of such a model, in several files."""
    path = tmp_path_factory.mktemp("vit")
    trained().save_pretrained(path, max_shard_size="20KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    return path


def logits(model: nn.Module) -> torch.Tensor:
    """For the images of every test here."""
    with torch.no_grad():
        return model(X).logits


def test_blocks_come_back_with_their_values(folder: Path) -> None:
    """The same class, keys, logits; each block runs once; what is saved again is the same."""
    model, loaded = trained(), with_blocks.from_pretrained(transformers.ViTForImageClassification, folder)
    assert type(loaded) is type(model)
    assert list(ai.injected(loaded)) == list(ai.injected(model))
    assert list(loaded.state_dict()) == list(model.state_dict())
    torch.testing.assert_close(logits(loaded), logits(model))
    assert calls_of(loaded, X) == dict.fromkeys(ai.injected(model), 1)
    assert loaded.config.attninject == model.config.attninject
    torch.testing.assert_close(logits(copy.deepcopy(loaded)), logits(model))


def test_an_auto_class_and_options_of_the_library(folder: Path) -> None:
    """As its own `from_pretrained`: a dtype, a config given, what was missing and unexpected."""
    auto = transformers.AutoModelForImageClassification
    config = transformers.AutoConfig.from_pretrained(folder)
    loaded, info = with_blocks.from_pretrained(
        auto, str(folder), config=config, dtype=torch.bfloat16, output_loading_info=True
    )
    assert type(loaded) is transformers.ViTForImageClassification
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_what_the_librarys_own_reader_does(folder: Path) -> None:
    """It leaves the blocks out: what the warning of `ai.inject` speaks of."""
    assert ai.injected(transformers.ViTForImageClassification.from_pretrained(folder)) == {}
    with pytest.warns(errors.RebuiltModelWarning, match=r"ViTForImageClassification\.from_pretrained makes"):
        ai.inject(vit(), **CBAM)


def test_the_record_is_plain_and_follows_the_model(tmp_path: Path) -> None:
    """JSON as it stands in the file; gone with the last block; also for blocks that came by other ways."""
    model = trained()
    record = model.config.attninject
    assert json.loads(json.dumps(record)) == record
    assert [site["rule"]["block"] for site in record["sites"]] == ["cbam"] * 4
    ai.save(model, tmp_path / "a.safetensors")
    other = with_blocks.remember(ai.load(vit(), tmp_path / "a.safetensors"))
    assert other.config.attninject == record
    ai.eject(model, "vit.layers.0")
    assert len(with_blocks.remember(model).config.attninject["sites"]) == 2
    assert not hasattr(with_blocks.remember(ai.eject(model)).config, "attninject")


def test_buffers_that_are_in_no_file_are_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library leaves such buffers empty; a block of one's own may have some."""
    monkeypatch.setattr(registry, "_REGISTERED", {})

    class Scaled(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.register_buffer("by", torch.full((channels,), 2.0), persistent=False)
            self.gain = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return x + self.gain * self.by.view(-1, 1, 1) * x

    ai.register_block("scaled_by_two")(Scaled)
    model = with_blocks.inject(vit(), block="scaled_by_two", place="residual_branch", init="paper")
    stir(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(with_blocks.from_pretrained(type(model), tmp_path)), logits(model))


# --- what is refused -----------------------------------------------------------------------------


def test_a_config_without_blocks_is_refused(tmp_path: Path) -> None:
    """With the two ways in which they get there."""
    vit().save_pretrained(tmp_path)
    with pytest.raises(errors.DeltaError, match=r"tells of no blocks.*inject, or by remember\(model\)"):
        with_blocks.from_pretrained(transformers.ViTForImageClassification, tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "in format 2, this attninject reads 1"),
        ({"sites": "all"}, "is damaged .ValueError: no sites"),
        ({"sites": [{"qualified": "a", "layout": "b", "mechanism": "c", "rule": "d"}]}, "without a name or a rule"),
        ([], "is damaged .TypeError"),
    ],
)  # fmt: skip
def test_a_damaged_record_is_refused(folder: Path, change: Any, said: str) -> None:
    """Nothing of it is carried out."""
    config = transformers.AutoConfig.from_pretrained(folder)
    config.attninject = {**config.attninject, **change} if isinstance(change, dict) else change
    with pytest.raises(errors.DeltaError, match=said):
        with_blocks.from_pretrained(transformers.ViTForImageClassification, folder, config=config)


def test_a_block_that_nobody_knows_is_refused(folder: Path) -> None:
    """A name of a registry, never a path to code."""
    config = transformers.AutoConfig.from_pretrained(folder)
    config.attninject["sites"][0]["rule"]["block"] = "os.system"
    with pytest.raises(errors.DeltaError, match=r"unknown block 'os\.system'.*register the missing block"):
        with_blocks.from_pretrained(transformers.ViTForImageClassification, folder, config=config)


def test_weights_without_their_blocks_are_refused(tmp_path: Path) -> None:
    """Ejected after the config was written: none is filled with random values in silence."""
    model = trained()
    ai.eject(model, "vit.layers.0")
    model.save_pretrained(tmp_path)
    with pytest.raises(errors.DeltaError, match=r"no tensors for vit\.layers\.0\.cbam.*remember\(model\)"):
        with_blocks.from_pretrained(transformers.ViTForImageClassification, tmp_path)


def test_another_class_than_was_saved_is_refused(folder: Path) -> None:
    """The blocks' names begin elsewhere there."""
    with pytest.raises(errors.DeltaError, match="its recipe does not fit this model"):
        with_blocks.from_pretrained(transformers.ViTModel, folder)


def test_blocks_of_a_part_are_remembered_by_the_whole_alone() -> None:
    """Injected by `root`, their names begin at the whole model."""
    model = vit()
    with_blocks.inject(model.vit, **CBAM)
    with pytest.raises(errors.DeltaError, match=r"vit\.layers\.0\.cbam.*with root= for the part"):
        with_blocks.remember(model)
    whole = with_blocks.inject(vit(), **CBAM, root="vit")
    assert whole.config.attninject["sites"][0]["qualified"] == "vit.layers.0.cbam"
