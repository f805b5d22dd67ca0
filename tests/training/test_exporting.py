"""Exported models compute what the trained ones compute, at other batch sizes and resolutions too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from nets import net, pretrained
from safetensors.torch import load_file
from small import skip_onnx_of_norms, stir
from torch import nn

import attninject as ai
from attninject import errors, models
from attninject.training import exporting
from attninject.training.exporting import export


def stirred(net_name: str, **rule: Any) -> nn.Module:
    """A network with blocks whose weights are no longer those of the beginning."""
    model = ai.inject(net(net_name), **rule)
    stir(model)
    return model.eval()


@pytest.mark.parametrize("to", ["pt2", "state_dict", "onnx"])
def test_parity_at_two_batch_sizes_and_resolutions(to: str, tmp_path: Path) -> None:
    """A resnet with CBAM comes out of every format as it went in, at a second size and shape too."""
    model = stirred("timm/test_resnet", block="cbam", place="residual_branch")
    if to == "onnx":
        skip_onnx_of_norms(model)
    first, second = export(model, tmp_path / "out", to, size=64)
    assert (first.shape, second.shape) == ((2, 3, 64, 64), (3, 3, 96, 128))
    assert max(first.difference, second.difference) < 1e-4 * first.scale
    assert (tmp_path / "out").stat().st_size > 4 * sum(p.numel() for p in model.parameters())


def test_a_network_of_one_resolution_varies_its_batch(tmp_path: Path) -> None:
    """A ViT is exported for its own size and any batch."""
    model = stirred("timm/vit_tiny_patch16_224", block="se", place="stage_end")
    found = export(model, tmp_path / "v.pt2", "pt2", size=224)
    assert [p.shape for p in found] == [(2, 3, 224, 224), (3, 3, 224, 224)]
    loaded = torch.export.load(tmp_path / "v.pt2").module()
    assert loaded(torch.zeros(5, 3, 224, 224)).shape == (5, 1000)


def test_a_copy_that_does_not_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the copy's runtime raises (onnxruntime's errors are plain Exceptions): said, the file removed."""

    def written(model: nn.Module, path: Path, *_: Any) -> Any:
        def run(x: torch.Tensor) -> torch.Tensor:
            raise Exception("invalid feed")

        path.touch()
        return run

    monkeypatch.setattr(exporting, "_state_dict", written)
    with pytest.raises(errors.ExportError, match=r"does not run on .*: invalid feed"):
        export(
            stirred("timm/test_resnet", block="se", place="stage_end"), tmp_path / "x", "state_dict", size=64
        )
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("init", ["identity", "paper"])
def test_se_becomes_timms_own_seresnet(init: str, tmp_path: Path) -> None:
    """timm's network with attn_layer="se", and its seresnet, load the file strictly and give the same outputs."""
    args = {"divisor": 8}
    model = stirred("timm/resnet18", block="se", place="residual_branch", init=init, args=args)
    export(model, tmp_path / "t.safetensors", "state_dict", size=64, like="timm", name="timm/resnet18")
    x = torch.randn(2, 3, 64, 64)
    for name, more in (("timm/resnet18", {"block_args": {"attn_layer": "se"}}), ("timm/seresnet18", {})):
        theirs = models.build(name, **more).eval()
        theirs.load_state_dict(load_file(tmp_path / "t.safetensors"))
        with torch.no_grad():
            torch.testing.assert_close(theirs(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("block", "args"), [("cbam", {"bias": False, "concat": "mean_max"}), ("eca", {})])
def test_published_blocks_become_timms(block: str, args: dict[str, Any], tmp_path: Path) -> None:
    """attn_layer="cbam", whose module has other names, which are translated, and attn_layer="eca"."""
    rule = {"block": block, "place": "residual_branch", "init": "paper", "args": args, "name": "se"}
    model = stirred("timm/test_resnet", **rule)
    export(model, tmp_path / "t.safetensors", "state_dict", size=64, like="timm", name="timm/test_resnet")
    theirs = models.build("timm/test_resnet", block_args={"attn_layer": block}).eval()
    theirs.load_state_dict(load_file(tmp_path / "t.safetensors"))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("rule", "base", "message"),
    [
        ({"block": "cbam", "place": "residual_branch"}, "timm/resnet18", "must be `paper`, or identity SE"),
        (
            {"block": "se", "place": "stage_end", "args": {"divisor": 8}},
            "timm/resnet18",
            "needs a batch norm",
        ),
        (
            {"block": "se", "after": "layer1.*.bn2"},
            "timm/resnet18",
            "these tensors.*multiple of 8: args {divisor: 8}",
        ),
        ({"block": "se", "after": "layer1.*.bn2"}, "torchvision/resnet18", "must be one of timm's"),
    ],
)
def test_what_timm_has_not_is_refused(rule: dict[str, Any], base: str, message: str, tmp_path: Path) -> None:
    """Other blocks, other places, other bases: refused with the reason, and no file."""
    model = ai.inject(net("timm/resnet18"), **rule)
    with pytest.raises(errors.ExportError, match=message):
        export(model, tmp_path / "t", "state_dict", size=64, like="timm", name=base)
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_differs_is_removed(tmp_path: Path) -> None:
    """A model that gives other numbers each time cannot be compared: refused, and no file is left."""

    class Restless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x).mean((2, 3)) + torch.rand(4)

    with pytest.raises(errors.ExportError, match="computes something else"):
        export(pretrained(Restless()), tmp_path / "r.pt2", "pt2", size=32)
    assert list(tmp_path.iterdir()) == []
